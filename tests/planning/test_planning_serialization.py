import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import CPU, CUDA, QUICK, layer, random_layer, topologies

from lhc_triton.planning import Plan, plan_topologies


@QUICK
@given(st.lists(topologies(), max_size=3), st.text(max_size=20), st.sampled_from([CPU, CUDA]))
def test_a_plan_comes_back_from_json_as_it_was(layers, reason, cost):
    named = [
        type(topology)(f"layer{i}", *(getattr(topology, f) for f in FIELDS))
        for i, topology in enumerate(layers)
    ]
    plan = plan_topologies(named, cost, dtype="float16", skipped=[("stem", reason)])
    assert Plan.from_json(plan.to_json()) == plan


FIELDS = ("geometry", "in_block", "out_block", "patterns", "group_pattern")


def document():
    # groups 0 and 2 share a pattern; tiles (0, 2) and (1,) at width 32
    topology = layer([[0, 1], [2], [0, 1]], name="a", size=56)
    return json.loads(plan_topologies([topology, random_layer(0, name="b")], CPU).to_json())


def test_the_document_under_test_is_valid():
    plan = Plan.from_json(json.dumps(document()))
    assert [planned.name for planned in plan.layers] == ["a", "b"]


def put(*path, value):
    def change(doc):
        *parents, last = path
        for key in parents:
            doc = doc[key]
        doc[last] = value

    return change


def drop(*path):
    def change(doc):
        *parents, last = path
        for key in parents:
            doc = doc[key]
        del doc[last]

    return change


A = ("layers", 0)
GEOMETRY = (*A, "geometry")
WRONG = [
    (put("version", value=2), "the plan has version 2; this package reads 1"),
    (put("version", value=True), "version True"),
    (drop("version"), "version None"),
    (put("version", value={"a": 1}), "version dict"),
    (put("device", value=3), "the plan: device must be a text"),
    (put("dtype", value="float8"), "the plan: dtype is 'float8'; one of float64"),
    (put("layers", value={}), "the plan: layers must be a list, not dict"),
    (drop("skipped"), "the plan: skipped must be a list"),
    (put("skipped", value=[["a"]]), "skipped must hold pairs"),
    (put("skipped", value=[["a", 1]]), "a reason must be a text"),
    (put(*A, value=[]), "layer 0 of the plan must be a JSON object, not list"),
    (put(*A, "name", value="b"), "the plan holds two layers of one name"),
    (put(*A, "name", value="x" * 1001), "layer 0 of the plan: name must be a text of at most 1000"),
    (put(*GEOMETRY, "batch", value=1.0), "layer 'a' of the plan: batch is 1.0; a whole number from 1"),
    (put(*GEOMETRY, "batch", value=0), "layer 'a' of the plan: batch is 0; a whole number from 1"),
    (put(*GEOMETRY, "height", value=0), "layer 'a' of the plan: height is 0"),
    (put(*GEOMETRY, "height", value=2**40), "layer 'a' of the plan: height is 1099511627776"),
    (put(*GEOMETRY, "in_channels", value=True), "layer 'a' of the plan: in_channels is True"),
    (put(*GEOMETRY, "kernel", value=[1]), "layer 'a' of the plan: kernel has 1 items, 2 are needed"),
    (put(*GEOMETRY, "padding", value=[0, 0, 0, -1]), "layer 'a' of the plan: padding is -1"),
    (put(*GEOMETRY, "kernel", value=[99, 99]), "the kernel does not fit into the padded image"),
    (put(*GEOMETRY, "out_channels", value=2**24), "group_pattern has 3 items, 1048576 filter groups need"),
    (drop(*A, "geometry"), "layer 'a' of the plan: geometry must be a JSON object"),
    (put(*A, "in_block", value=0), "layer 'a' of the plan: in_block is 0"),
    (put(*A, "out_block", value="16"), "layer 'a' of the plan: out_block is '16'"),
    (
        put(*A, "patterns", value=[[0, 1], [3]]),
        "layer 'a' of the plan: a pattern is 3; a whole number from 0 to 2",
    ),
    (put(*A, "patterns", value=[[1, 0], [2]]), r"layer 'a' of the plan: a pattern must rise: \[1, 0\]"),
    (put(*A, "patterns", value=[[0, 1], "2"]), "layer 'a' of the plan: a pattern must be a list, not str"),
    (put(*A, "patterns", value=[[0, 1], [0, 1]]), "the patterns must differ, and each one be used"),
    (put(*A, "patterns", value=[[0, 1], [2], [0]]), "the patterns must differ, and each one be used"),
    (put(*A, "group_pattern", value=[0, 1]), "group_pattern has 2 items, 3 filter groups need one"),
    (put(*A, "group_pattern", value=[0, 1, 2]), "group_pattern is 2; a whole number from 0 to 1"),
    (put(*A, "tiles", value=[]), "the tiles must hold each of the 3 filter groups once"),
    (put(*A, "tiles", 1, "groups", value=[0]), "a tile lacks entries of its filter group 0"),
    (put(*A, "tiles", 1, "groups", value=[]), "a tile has no filter group"),
    (put(*A, "tiles", 1, "entries", value=[0]), "a tile lacks entries of its filter group 1"),
    (put(*A, "tiles", 1, "entries", value=[2, 2]), "a tile's entries must rise"),
    (put(*A, "tiles", 1, "entries", value=[2, 3]), "a tile's entries is 3; a whole number from 0 to 2"),
    (put(*A, "tile_width", value=16), "a tile has 32 filters and a width of 16"),
    (put(*A, "backend", value="auto"), "backend is 'auto'; one of dense, reference"),
    (put(*A, "backend", value=["dense"]), "backend is list; one of dense"),
    (put(*A, "reason", value=None), "layer 'a' of the plan: reason must be a text"),
    (put(*A, "predicted_us", value=[]), "layer 'a' of the plan: predicted_us must be a JSON object"),
    (put(*A, "predicted_us", "dense", value=-1), "predicted_us of 'dense' is -1; a time in us"),
    (put(*A, "predicted_us", "dense", value=float("nan")), "the plan is not JSON: NaN is not a number"),
    (put(*A, "predicted_us", "dense", value=float("inf")), "the plan is not JSON: Infinity is not a number"),
    (put(*A, "predicted_us", "dense", value=10**400), "predicted_us of 'dense' is a number of more than"),
    (put(*A, "in_block", value=-(10**400)), "in_block is a number of more than 60 digits"),
    (put(*A, "tile_width", value=2**24), "layer 'a' of the plan: tile_width is 16777216; up to 128 are used"),
    (put(*A, "tiles", 1, "entries", value=[1, 2]), "a tile has entries that none of its filter groups has"),
    (put(*GEOMETRY, "stride", value=[2**13, 1]), "layer 'a' of the plan: stride is 8192; a whole"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[-40:] for _, message in WRONG])
def test_a_damaged_plan_is_refused_in_one_line(change, message):
    doc = document()
    change(doc)
    with pytest.raises(ValueError, match=message) as caught:
        Plan.from_json(json.dumps(doc))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"version": ' + "1" * 5000 + "}"])
def test_text_that_is_no_plan_is_refused_in_one_line(text):
    with pytest.raises(ValueError, match="the plan ") as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_small_file_cannot_ask_for_a_large_mask():
    doc = document()
    doc["layers"][0]["geometry"].update(in_channels=2**24, kernel=[50, 50], height=2**24)
    with pytest.raises(
        ValueError, match="layer 'a' of the plan: 3 filter groups of 1310720000 entries are more"
    ):
        Plan.from_json(json.dumps(doc))


def test_a_text_that_is_too_long_is_not_parsed(monkeypatch):
    monkeypatch.setattr("lhc_triton.planning.serialization.MAX_TEXT", 10)
    with pytest.raises(ValueError, match="the plan has 11 characters; at most 10 are read"):
        Plan.from_json(" " * 11)


def test_bytes_are_refused():
    with pytest.raises(TypeError, match="the plan is a bytes: give the text"):
        Plan.from_json(b"{}")
