import dataclasses
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_cases import CPU, CUDA, QUICK, layer, random_layer, topologies

from lhc_triton.planning import (
    COST_MODELS,
    ConvGeometry,
    LayerTopology,
    Plan,
    plan,
    plan_layer,
    plan_topologies,
)
from lhc_triton.planning.backends import runs
from lhc_triton.planning.planner import choose_tiles


@QUICK
@given(topologies(), st.sampled_from(sorted(COST_MODELS)))
def test_a_plan_computes_every_filter_once_and_no_less_than_lives(topology, backend):
    planned = plan_layer(topology, COST_MODELS[backend])
    assert sorted(planned.filter_order) == list(range(topology.geometry.out_channels))
    assert planned.planned_macs >= topology.live_macs
    exact = all({topology.pattern_of(g) for g in tile.groups} == {tile.entries} for tile in planned.tiles)
    assert exact == (planned.planned_macs == topology.live_macs)


@QUICK
@given(topologies(), st.sampled_from(sorted(COST_MODELS)), st.sampled_from(["float32", "float16"]))
def test_planning_twice_gives_the_same_plan(topology, backend, dtype):
    again = LayerTopology.from_mask(
        topology.name, topology.geometry, topology.in_block, topology.out_block, topology.block_mask()
    )
    cost = COST_MODELS[backend]
    assert plan_layer(topology, cost, dtype=dtype) == plan_layer(again, cost, dtype=dtype)


@pytest.mark.parametrize("cost", [CPU, CUDA], ids=["cpu", "cuda"])
def test_auto_takes_the_cheaper_of_sparse_and_dense(cost):
    large = plan_layer(random_layer(0, in_blocks=16, groups=32, size=28, batch=64), cost)
    assert large.backend == cost.sparse_backend
    assert large.predicted_us[cost.sparse_backend] < large.predicted_us["dense"]
    ratio = large.predicted_us["dense"] / large.predicted_us[cost.sparse_backend]
    assert large.reason == f"predicted {ratio:.1f}x faster than dense"
    full = plan_layer(random_layer(0, density=1.0), cost)
    assert full.backend == "dense"
    assert re.fullmatch(rf"{cost.sparse_backend} is predicted at [01]\.\d\dx of dense's speed", full.reason)


def test_a_gain_within_the_margin_goes_to_dense():
    topology = random_layer(1, in_blocks=16, groups=32, size=28)
    planned = plan_layer(topology, CPU)
    share = planned.predicted_us["torch"] / planned.predicted_us["dense"]
    assert plan_layer(topology, dataclasses.replace(CPU, margin=share * 1.01)).backend == "torch"
    assert plan_layer(topology, dataclasses.replace(CPU, margin=share * 0.99)).backend == "dense"


@pytest.mark.parametrize("backend", runs())
def test_a_forced_backend_is_kept_whatever_it_costs(backend):
    for density in (0.1, 1.0):
        planned = plan_layer(random_layer(0, density=density), CPU, backend=backend)
        assert (planned.backend, planned.reason) == (backend, "forced")
        assert set(planned.predicted_us) == {"dense", "torch"}


def test_shared_patterns_make_wide_tiles_and_scattered_ones_narrow_tiles_on_a_gpu():
    shared = layer([[0, 3]] * 16, size=56, batch=64)
    assert choose_tiles(shared, CUDA, 2)[0] == 128
    rng = np.random.default_rng(0)
    mask = rng.random((16, 64, 1, 1)) < 0.05
    geometry = ConvGeometry(64, 64 * 32, 256, 56, 56, (1, 1), padding=(0, 0, 0, 0))
    scattered = LayerTopology.from_mask("a", geometry, 32, 16, mask)
    assert choose_tiles(scattered, CUDA, 2)[0] < 128


def test_a_layer_of_empty_patterns_is_planned():
    planned = plan_layer(layer([[], [], []]), CPU)
    assert planned.topology.density == 0
    assert planned.planned_macs == 0
    assert sorted(g for tile in planned.tiles for g in tile.groups) == [0, 1, 2]


def test_a_network_keeps_its_layers_order_and_what_was_skipped():
    layers = [random_layer(seed, name=f"conv{seed}") for seed in (3, 1, 2)]
    made = plan_topologies(layers, CUDA, dtype="float16", skipped=[("stem", "no zeros")])
    assert [planned.name for planned in made.layers] == ["conv3", "conv1", "conv2"]
    assert made.skipped == (("stem", "no zeros"),)
    assert (made.device, made.dtype) == ("cuda", "float16")
    assert made["conv1"].topology == layers[1]
    with pytest.raises(KeyError):
        made["conv9"]


def test_totals_add_up_the_layers():
    layers = [
        random_layer(0, name="a", in_blocks=16, groups=32, size=28),
        random_layer(1, name="b", density=1.0),
    ]
    made = plan_topologies(layers, CPU)
    assert [planned.backend for planned in made.layers] == ["torch", "dense"]
    totals = made.totals
    assert (totals.layers, totals.sparse_layers) == (2, 1)
    assert totals.weights == sum(topology.geometry.weights for topology in layers)
    assert totals.live_macs == sum(topology.live_macs for topology in layers)
    assert totals.planned_macs == made["a"].planned_macs + layers[1].geometry.macs
    assert totals.dense_us == pytest.approx(sum(planned.predicted_us["dense"] for planned in made.layers))
    assert totals.planned_us == pytest.approx(
        made["a"].predicted_us["torch"] + made["b"].predicted_us["dense"]
    )
    forced = plan_topologies(layers, CPU, backend="reference").totals
    assert (forced.planned_us, forced.sparse_layers) == (None, 2)


@pytest.mark.parametrize("call", [plan_layer, lambda *a, **k: plan_topologies([a[0]], *a[1:], **k)])
def test_unknown_names_are_refused(call):
    with pytest.raises(ValueError, match="backend 'cudnn' is not known; choose one of auto, dense"):
        call(random_layer(0), CPU, backend="cudnn")
    with pytest.raises(ValueError, match="dtype 'float8' is not supported"):
        call(random_layer(0), CPU, dtype="float8")


def test_the_function_plan_and_the_module_of_that_name_are_both_at_hand():
    assert callable(plan)
    assert sys.modules["lhc_triton.planning.network_plan"].Plan is Plan
