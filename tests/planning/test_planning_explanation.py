import dataclasses

from planning_cases import CPU, random_layer

from lhc_triton.planning import plan_topologies


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
    assert lines[0] == "Times are predicted, not measured."
    assert lines[1].split() == [
        "layer", "density", "patterns", "tiles", "waste", "choice,", "us", "runner-up,", "us",
    ]  # fmt: skip
    assert lines[2].startswith("features.3.conv    0.097     32/32")
    first = plan["features.3.conv"]
    times = [f"{name} {us:.0f}" for name, us in sorted(first.predicted_us.items(), key=lambda item: item[1])]
    assert " ".join(lines[2].split()[-4:]) == " ".join(times)
    assert lines[3] == f"    512->512 3x3 @ 1x28x28: {first.reason}"
    assert lines[4].split()[5] == "dense"


def test_the_columns_are_aligned_and_fit_80():
    text = made().explain()
    rows = [line for line in text.splitlines()[1:] if not line.startswith(" ")][:3]
    assert len({len(row) for row in rows}) == 1
    name = "a." * 40 + "conv"
    reason = "a reason of many words " * 9
    odd = plan_topologies([random_layer(0, name=name)], CPU, skipped=[("dw", reason)]).explain()
    assert all(len(line) <= 80 for line in (*text.splitlines(), *odd.splitlines()) if name not in line)
    assert "..a.a." in odd


def test_totals_and_skipped_layers_follow():
    text = made().explain()
    assert "2 layers planned for cpu in float32, 1 sparse" in text
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
