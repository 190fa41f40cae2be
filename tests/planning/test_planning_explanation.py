import dataclasses

from planning_cases import CPU, CUDA, random_layer

from lhc_triton.planning import plan_topologies
from lhc_triton.planning.schema import OtherWork


def made():
    layers = [
        random_layer(0, name="features.3.conv", in_blocks=16, groups=32, size=28),
        random_layer(1, name="b", density=0.9),
    ]
    return plan_topologies(
        layers, CPU, skipped=[("stem", "no zeros"), ("dw", "groups=8; only groups=1 is planned")]
    )


def test_the_table_says_how_each_layer_runs_and_why():
    plan = made()
    lines = plan.explain().splitlines()
    assert lines[0] == "Times in us: predicted by the cost model; measured where that is known."
    assert lines[1].split() == [
        "layer", "density", "patterns", "tiles", "waste", "backend", "predicted", "measured",
    ]  # fmt: skip
    assert lines[2].startswith("features.3.conv   0.097    32/32")
    first = plan["features.3.conv"]
    choice, second = sorted(first.predicted_us.items(), key=lambda item: item[1])
    assert lines[2].split()[-3:] == [choice[0], f"{choice[1]:.0f}", "-"]
    assert lines[3].split() == ["runner-up", second[0], f"{second[1]:.0f}", "-"]
    assert lines[4] == f"    512->512 3x3 @ 1x28x28: {first.reason}"
    assert lines[5].split()[5] == "dense"


def test_measured_times_stand_beside_the_predicted_ones():
    plan = made()
    text = plan.explain({"features.3.conv": {"torch": 1234.4, "other": 7.0}, "gone": {"torch": 1.0}})
    lines, before = text.splitlines(), plan.explain().splitlines()
    assert lines[2].split()[-1] == "1234"
    assert lines[3].split()[-1] == "-"
    assert [line for line in lines if line not in before] == [lines[2]]


def test_tiles_that_are_not_full_show_their_padding():
    (planned,) = plan_topologies([random_layer(0, groups=3, density=0.9)], CUDA, backend="triton").layers
    filled = sum(len(tile.entries) * 16 * len(tile.groups) for tile in planned.tiles)
    room = sum(len(tile.entries) for tile in planned.tiles) * planned.tile_width
    assert planned.padding == 1 - filled / room > 0
    text = plan_topologies([planned.topology], CUDA, backend="triton").explain()
    assert f"256->48 3x3 @ 1x14x14, {planned.padding:.0%} padding: forced" in text
    assert "padding" not in made().explain()


def test_the_rest_of_the_network_and_the_whole_are_told():
    others = [OtherWork("pooling", 2, 0, 10_000_000), OtherWork("matrix products", 1, 0, 1_000_000)]
    plan = plan_topologies([random_layer(0, name="a")], CPU, others=others)
    totals, text = plan.totals, plan.explain()
    assert totals.others_us == 1100  # at 10 GB/s
    assert totals.network_us == totals.planned_us + 1100
    assert "predicted us of the rest 1,100: pooling 1,000, matrix products 100" in text
    assert f"-> {totals.network_us:,.0f} ({totals.dense_network_us / totals.network_us:.1f}x faster" in text
    assert "whole network" in text
    assert "whole network" not in made().explain()


def test_the_columns_are_aligned_and_fit_80():
    text = made().explain()
    table = text.splitlines()[1 : text.splitlines().index("")]
    assert len({len(row) for row in table if not row.startswith("    ")}) == 1
    name = "a." * 40 + "conv"
    reason = "a reason of many words " * 9
    odd = plan_topologies([random_layer(0, name=name)], CPU, skipped=[("dw", reason)]).explain()
    assert all(len(line) <= 80 for line in (*text.splitlines(), *odd.splitlines()) if name not in line)
    assert "..a.a." in odd


def test_totals_and_skipped_layers_follow():
    text = made().explain()
    assert "2 layers planned for cpu in float32, 1 sparse" in text
    assert "1 layer planned for cpu" in plan_topologies([random_layer(0)], CPU).explain()
    assert "live MACs" in text
    assert "live weights" in text
    assert "faster, these layers alone" in text
    assert text.splitlines()[-2:] == [
        "left as it is: stem (no zeros)",
        "left as it is: dw (groups=8; only groups=1 is planned)",
    ]


def test_a_plan_without_layers_says_so():
    empty = dataclasses.replace(made(), layers=())
    assert empty.explain().splitlines()[0] == "no layer is planned (cpu, float32)"


def test_names_cannot_write_to_the_terminal():
    odd = plan_topologies([random_layer(0, name="a\x1b[2J\nb")], CPU, skipped=[("c\r", "d\n")])
    text = odd.explain()
    assert "a?[2J?b" in text
    assert "left as it is: c? (d?)" in text
    assert "\x1b" not in text
