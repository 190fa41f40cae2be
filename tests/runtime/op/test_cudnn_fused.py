"""When dense layers run on cuDNN's fused convolution, and that they give the same; the kernel needs a GPU."""

import pytest
import torch
from oracle import norm_error
from torch import nn

from lhc_triton.runtime.op import cudnn_fused
from lhc_triton.runtime.op.dense import DenseConv2d

CPU = torch.device("cpu")


def layer(activation="relu", pool="none", **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 16, 3, 3, generator=generator) / 12
    bias = torch.randn(24, generator=generator)
    return DenseConv2d(weight, bias, padding=(1, 1, 1, 1), activation=activation, pool=pool, **options)


def test_without_a_gpu_it_does_not_serve():
    assert not cudnn_fused.serves(CPU, torch.float32)


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return torch.device(request.param, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("pool", ["none", "max2x2"])
def test_a_dense_layer_gives_the_same_with_and_without_it(gpu, dtype, with_residual, pool):
    if not cudnn_fused.serves(gpu, dtype):
        pytest.skip("cuDNN does not fuse this type here with the same results")
    conv = layer(pool=pool).to(gpu, dtype)
    x = torch.randn(4, 16, 14, 14, device=gpu).to(dtype, memory_format=torch.channels_last)
    z = torch.randn(4, 24, 14, 14, device=gpu).to(dtype, memory_format=torch.channels_last)
    x[0, 3, 5, 5] = float("nan")
    residual = z if with_residual else None
    with torch.inference_mode(), torch.profiler.profile(acc_events=True) as profile:
        found = conv(x, residual)
    names = {event.key for event in profile.key_averages()}
    assert any("cudnn_convolution_" in name and "relu" in name for name in names)
    plain = layer("none").to(gpu, dtype)
    expected = plain(x) if residual is None else plain(x) + residual
    expected = expected.relu()
    expected = nn.functional.max_pool2d(expected, 2) if pool != "none" else expected
    assert norm_error(found, expected) <= 2e-2


def test_which_types_it_serves_is_known_before_a_capture(gpu):
    conv = layer().to(gpu, torch.float16)
    x = torch.randn(4, 16, 14, 14, device=gpu).to(torch.float16, memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = conv(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = conv(x)
        graph.replay()
    assert torch.equal(y, expected)
