"""What the native kernel keeps from call to call is never that of another call."""

import gc

import pytest
import torch
from op_problems import Problem
from oracle import norm_error

from lhc_kernels.cpu import problem
from lhc_triton.planning.schema import ConvGeometry

pytestmark = pytest.mark.skipif(problem() is not None, reason=str(problem()))
GEOMETRY = ConvGeometry(1, 64, 48, 9, 7)


def run(**arguments):
    return torch.ops.lhc.grouped_conv2d(**arguments)


@pytest.mark.parametrize("inference", [False, True], ids=["normal", "inference tensors"])
def test_tables_that_are_written_to_are_read_again(inference):
    case = Problem(GEOMETRY, in_block=32, out_block=16)
    with torch.inference_mode(inference):
        arguments = case.arguments("native")
        arguments["tables"] = [table.clone() for table in arguments["tables"]]
        before = run(**arguments)
        filters = arguments["tables"][2]
        filters.copy_(filters.flip(0))
        flipped = {**arguments, "bias": None}
        expected = {**flipped, "backend": "reference"}
        assert norm_error(run(**flipped), run(**expected).double()) < 1e-6
        filters[0, 0] = filters[0, 1]
        with pytest.raises(ValueError, match="filters table"):
            run(**arguments)
        filters.copy_(case.arguments("native")["tables"][2])
        assert torch.equal(run(**arguments), before)


@pytest.mark.parametrize("out_block", [16, 3], ids=["whole vectors", "a tile narrower than a vector"])
def test_weights_and_bias_are_read_at_every_call(out_block):
    case = Problem(GEOMETRY, in_block=32, out_block=out_block, has_scale=True)
    arguments = case.arguments("native")
    run(**arguments)
    for name in ("weight", "bias", "scale"):
        arguments[name].numpy()[...] *= 2  # no version counts this
        expected = run(**{**arguments, "backend": "reference"})
        assert norm_error(run(**arguments), expected.double()) < 1e-6


def test_one_layer_on_many_sizes_in_turn():
    cases = [
        Problem(
            ConvGeometry(batch, 64, 48, height, width, (3, 3), stride, padding), in_block=32, out_block=16
        )
        for batch, height, width in ((1, 9, 7), (2, 9, 7), (1, 7, 9), (1, 12, 20))
        for stride in ((1, 1), (2, 1))
        for padding in ((1, 1, 1, 1), (0, 2, 1, 0))
    ]
    first = cases[0].arguments("native")
    for _ in range(2):
        for case in cases:
            shared = {name: first[name] for name in ("weight", "tables", "bias")}
            arguments = {**case.arguments("native"), **shared}
            expected = run(**{**arguments, "backend": "reference"})
            assert norm_error(run(**arguments), expected.double()) < 1e-6
            pooled = {**arguments, "pool": "max2x2", "residual": None}
            expected = run(**{**pooled, "backend": "reference"})
            assert norm_error(run(**pooled), expected.double()) < 1e-6


def test_layers_that_come_and_go_at_the_same_addresses():
    for seed in range(150):
        case = Problem(GEOMETRY, in_block=32, out_block=16, seed=seed)
        assert norm_error(case.run("native"), case.oracle()) < 1e-6
        del case
        gc.collect(0)
