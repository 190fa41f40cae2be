import copy
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_cases import CPU, CUDA, layer, random_layer

from lhc_triton.planning import ConvGeometry, LayerTopology, Plan, plan_topologies
from lhc_triton.planning.schema import OtherWork

TEXT = plan_topologies(
    [layer([[0, 1], [2], [0, 1], [2], [0]], name="a", size=56), random_layer(0, name="b", groups=4)],
    CPU,
    skipped=[("stem", "no zeros")],
    others=[OtherWork("pooling", 1, 0, 4096)],
).to_json()
DOCUMENT = json.loads(TEXT)


def places(value, path=()):
    """The paths of all values inside a document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


# Layer "b" has hundreds of entries and nothing that "a" lacks; damage goes to the rest.
PLACES = [path for path in places(DOCUMENT) if path and path[:2] != ("layers", 1)]
KEYS = [path for path in PLACES if isinstance(path[-1], str)]


def damaged(path, change):
    document = copy.deepcopy(DOCUMENT)
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(document)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([(1, 1), (3, 3), (2, 5)]),
    st.floats(0, 1),
    st.sampled_from([CPU, CUDA]),
)
def test_plans_of_random_masks_come_back_equal(seed, in_channels, out_channels, kernel, density, cost):
    shape = (-(-out_channels // 8), -(-in_channels // 16), *kernel)
    mask = np.random.default_rng(seed).random(shape) < density
    geometry = ConvGeometry(2, in_channels, out_channels, 9, 11, kernel)
    plan = plan_topologies([LayerTopology.from_mask("conv", geometry, 16, 8, mask)], cost)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    np.testing.assert_array_equal(again["conv"].topology.block_mask(), mask)


@pytest.mark.parametrize("path", KEYS, ids=lambda path: ".".join(map(str, path)))
def test_every_key_is_needed(path):
    text = damaged(path, lambda parent, key: parent.pop(key))
    if path[-2:-1] == ("predicted_us",):  # a backend that was not priced
        assert path[-1] not in Plan.from_json(text)["a"].predicted_us
        return
    if path == ("others",):  # plans of before do not have it
        assert Plan.from_json(text).others == ()
        return
    with pytest.raises(ValueError, match=path[-1]) as caught:
        Plan.from_json(text)
    if path[:2] == ("layers", 0):
        assert (
            "layer 0 of" in str(caught.value) if path[-1] == "name" else "layer 'a' of" in str(caught.value)
        )


@pytest.mark.parametrize("value", [True, None, 1.5, "1", -1, 2**70, [], {}], ids=repr)
@pytest.mark.parametrize(
    "key", ["batch", "in_channels", "out_channels", "height", "width", "in_block", "out_block", "tile_width"]
)
def test_sizes_are_whole_numbers_in_range(key, value):
    path = ("layers", 0, key) if key in DOCUMENT["layers"][0] else ("layers", 0, "geometry", key)
    with pytest.raises(ValueError, match=f"layer 'a' of the plan: {key} is .*; a whole number from"):
        Plan.from_json(damaged(path, lambda parent, last: parent.__setitem__(last, value)))


def test_a_group_in_two_tiles_is_refused():
    def again(parent, key):
        parent[key].append(parent[key][0])

    with pytest.raises(ValueError, match="layer 'a' of the plan: the tiles must hold each of the 5 filter"):
        Plan.from_json(damaged(("layers", 0, "tiles"), again))


def test_deep_nesting_inside_a_layer_is_refused_in_one_line():
    text = TEXT.replace('"tiles": [', '"tiles": [' + "[" * 100_000, 1)
    with pytest.raises(ValueError, match="the plan is not JSON") as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(TEXT) - 1))
def test_text_that_ends_early_is_no_json(length):
    with pytest.raises(ValueError, match="the plan is not JSON"):
        Plan.from_json(TEXT[:length])


def read(text):
    """The plan and no problem, or no plan and the problem."""
    try:
        return Plan.from_json(text), ""
    except ValueError as error:
        return None, str(error)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-1, 5), max_size=5),
    st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PLACES), VALUES)
def test_any_other_value_is_refused_in_one_line_or_gives_a_whole_plan(path, value):
    text = damaged(path, lambda parent, key: parent.__setitem__(key, value))
    plan, problem = read(text)
    if plan is None:
        assert "\n" not in problem
        assert len(problem) < 300
        return
    assert Plan.from_json(plan.to_json()) == plan
    for planned in plan.layers:
        assert sorted(planned.filter_order) == list(range(planned.topology.geometry.out_channels))
        assert planned.planned_macs >= planned.topology.live_macs
        filters = [sum(len(planned.topology.group_filters(g)) for g in tile.groups) for tile in planned.tiles]
        assert max(filters) <= planned.tile_width
    assert all(line.isprintable() for line in plan.explain().split("\n"))


@pytest.mark.parametrize("layers", [DOCUMENT["layers"], []], ids=["layers", "no layers"])
def test_a_device_cannot_write_to_the_terminal(layers):
    text = json.dumps(DOCUMENT | {"device": "cpu\x1b[2J\nx", "layers": layers})
    assert "cpu?[2J?x" in Plan.from_json(text).explain()
