"""What is timed when a layer is chosen for int8: whole numbers, on which both sides compute the same."""

import torch
from op_problems import Problem
from oracle import norm_error

from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.choosing.workload import Workload


def test_int8_is_timed_from_float32_to_float32_and_computes_what_the_dense_layer_does():
    layer = Problem(ConvGeometry(2, 16, 12, 9, 8), density=1.0).layer
    work = Workload(layer, torch.int8, torch.device("cpu"))
    sparse, dense = work.sparse("reference")(), work.dense()()
    assert sparse.dtype == dense.dtype == torch.float32
    assert norm_error(sparse, dense.double()) < 1e-5
    assert norm_error(sparse[:1], work.expected()) < 1e-5
