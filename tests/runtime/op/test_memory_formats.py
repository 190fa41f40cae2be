"""Which tensors count as channels_last."""

import numpy as np
import pytest
import torch
from torch._prims_common import suggest_memory_format

from lhc_triton.runtime.op.epilogue import is_channels_last


def strided(rng):
    """A view of some memory with sizes and strides that may or may not belong together."""
    sizes = [int(size) for size in rng.integers(0 if rng.random() < 0.1 else 1, 4, 4)]
    if rng.random() < 0.3:
        strides = [int(stride) for stride in rng.integers(0, 30, 4)]
    else:
        strides, step = [0] * 4, int(rng.integers(1, 3))
        for axis in (1, 3, 2, 0) if rng.random() < 0.7 else rng.permutation(4):
            strides[axis], step = step, step * (sizes[axis] + int(rng.random() < 0.1))
    return torch.empty(4096).as_strided(sizes, strides)


def test_channels_last_is_what_torch_takes_for_it():
    rng = np.random.default_rng()
    answers = set()
    for _ in range(3000):
        tensor = strided(rng)
        expected = suggest_memory_format(tensor) == torch.channels_last
        assert is_channels_last(tensor) == expected, (tensor.shape, tensor.stride())
        answers.add(expected)
    assert answers == {True, False}


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 3, 4, 5, 6)])
def test_only_four_dimensions_can_be_channels_last(shape):
    assert not is_channels_last(torch.empty(shape))


def test_images_in_another_layout_are_not_channels_last():
    assert not is_channels_last(torch.ones(2, 3, 4, 4).to_sparse())
