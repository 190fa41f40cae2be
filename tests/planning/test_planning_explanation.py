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
    lines = made().explain().splitlines()
    assert lines[0].split() == [
        "layer", "shape", "density", "patterns", "tiles", "width", "waste", "dense", "us", "sparse", "us",
        "backend", "why",
    ]  # fmt: skip
    assert lines[1].startswith("features.3.conv  512->512 3x3 @ 1x28x28    0.097     32/32")
    assert lines[1].endswith(made()["features.3.conv"].reason)
    assert " dense " in lines[2]


def test_the_columns_are_aligned():
    header, first, second = made().explain().splitlines()[:3]
    end = header.index("backend") + len("backend")
    assert first[end : end + 2] == second[end : end + 2] == "  "
    assert first[:end].rstrip() == first[:end]
    assert second[:end].rstrip() == second[:end]


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
