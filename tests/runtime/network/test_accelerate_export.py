"""Accelerated networks under torch.compile, torch.export, AOTInductor, jit.trace and ONNX."""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch.export import Dim
from zoo.mine import Mine

import lhc_triton as lhc


@pytest.fixture(scope="module")
def pair():
    """A pruned network, and what accelerate made of it."""
    torch.manual_seed(0)
    model = lhc.prune(Mine().eval(), torch.zeros(1, 3, 24, 24), budget=0.3)
    return model, lhc.accelerate(model, torch.randn(2, 3, 24, 24), tune="off")


def images(batch=3, side=24):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(side))


def test_torch_export_takes_dynamic_sizes(pair):
    model, fast = pair
    sizes = {0: Dim("batch"), 2: Dim("height", min=8), 3: Dim("width", min=8)}
    program = torch.export.export(fast, (images(),), dynamic_shapes=((sizes,),))
    for x in (images(), images(5, 16), images(2, 20)):
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_script_is_traced_without_a_warning_and_takes_other_batches(pair):
    model, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        script = torch.jit.trace(fast, images(2))
    torch.testing.assert_close(script(images(4)), model(images(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_of_an_accelerated_network_is_refused_in_one_line(pair):
    with pytest.raises(RuntimeError, match=r"no ONNX form.*after lhc\.to_dense\(model\)") as caught:
        torch.onnx.export(pair[1], (images(),), "never.onnx", dynamo=False)
    assert "\n" not in str(caught.value)


HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs onnx, onnxscript and onnxruntime")


@needs_onnx
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_exporter_that_torch_export_is_under_quotes_the_same_line(pair, tmp_path):
    """It frames whatever it meets with advice of its own, and tries the tracer of torch.compile as well."""
    with pytest.raises(Exception, match=r"no ONNX form.*after lhc\.to_dense\(model\)") as caught:
        torch.onnx.export(pair[1], (images(),), tmp_path / "never.onnx", dynamo=True)
    assert str(caught.value.__cause__).startswith("an accelerated network has no ONNX form")
    assert "\n" not in str(caught.value.__cause__)


@needs_onnx
def test_a_pruned_network_goes_through_onnx_after_to_dense(pair, tmp_path):
    import onnxruntime

    model = lhc.to_dense(copy.deepcopy(pair[0]))
    path = str(tmp_path / "net.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(),), path, dynamo=True)
    session = onnxruntime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pair[0](images()).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.aot
def test_torch_compile_takes_dynamic_sizes(pair):
    model, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(fast, dynamic=True)
        for x in (images(), images(5, 16)):
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.aot
def test_an_aotinductor_package_computes_the_same(pair, tmp_path):
    model, fast = pair
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(fast, (images(),), dynamic_shapes=(({0: Dim("batch")},),))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
        loaded = torch._inductor.aoti_load_package(package)
        torch.testing.assert_close(loaded(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)
