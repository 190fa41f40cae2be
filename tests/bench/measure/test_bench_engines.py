"""Other engines on the same network: exported, loaded, checked, timed; those that are missing are named."""

import dataclasses
import functools
import sys

import numpy as np
import pytest
import torch
from torch import nn

import lhc_triton as lhc
from lhc_bench.measure import engines, networks, rows, suites
from lhc_bench.measure.engines import Engines
from lhc_bench.measure.networks import NetworkCase
from lhc_bench.pictures import drawing
from lhc_triton.runtime.choosing.timing import Timing

# What the engines below "load": the export leaves the network here, under the name of its file.
EXPORTED = {}


def export(model, x, path):
    path.write_text("a network")
    EXPORTED[path.name] = engines.plain(model)


def load(path, x, threads, change=lambda y: y):
    assert path.read_text() == "a network"
    assert threads == torch.get_num_threads()
    model, image = EXPORTED[path.name], torch.from_numpy(x)
    return lambda: change(model(image)).detach().numpy()


def missing(path, x, threads):
    raise ModuleNotFoundError("No module named 'openvino'", name="openvino")


def broken(path, x, threads):
    raise RuntimeError("operator Frobnicate is not supported\nstack of 40 lines")


def call_all(calls, rounds=1, **options):
    """Call everything once; the n-th function takes 1000 n us."""
    with torch.inference_mode():
        for call in calls.values():
            call()
    return {name: Timing((1000.0 * place,) * rounds) for place, name in enumerate(calls, 1)}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """VGG16 with a few narrow layers at both image sizes, no compiler, and no times from elsewhere."""
    monkeypatch.setattr(
        "lhc_triton.runtime.choosing.timing_store.default_path", lambda: tmp_path / "timings.json"
    )
    monkeypatch.setattr(networks, "VGG16_WIDTHS", (32, "M", 64, "M", 64, "M"))
    monkeypatch.setattr("lhc_bench.measure.networks.compiled_or_reason", lambda model, x: (None, "not here"))
    cases = (NetworkCase("vgg16", "cifar", 2), NetworkCase("vgg16", "cifar", 1, "features"))
    suite = dataclasses.replace(suites.SUITES["cpu-engines"], cases=lambda: cases)
    monkeypatch.setitem(suites.SUITES, "cpu-engines", suite)


def run(tmp_path, loaders, timer=call_all, **choice):
    chosen = Engines(**{"loaders": loaders, "export": export} | choice)
    return suites.run_suite("cpu-engines", tmp_path / "out", rounds=1, timer=timer, engines=chosen)


@pytest.mark.usefixtures("small")
def test_every_engine_runs_the_masked_network_and_has_its_rows(tmp_path):
    found = run(tmp_path, {"openvino": load, "onnxruntime": load})
    results = rows.read_results(tmp_path / "out" / "results.json")
    assert results.to_dict() == found
    assert [(row.case, row.batch, row.backend) for row in results.rows] == [
        (f"vgg16-cifar/{part}", batch, backend)
        for part, batch in (("all", 2), ("features", 1))
        for backend in ("auto", "openvino", "onnxruntime")
    ]
    for row in results.rows:
        assert row.density == pytest.approx(0.1, abs=0.02)
        assert row.rel_err <= 1e-5
        assert row.baseline == "folded eager"
    ours, first, second = results.rows[:3]
    assert ours.gmacs * ours.time_us == pytest.approx(first.gmacs * first.time_us)
    assert ours.gmacs * ours.time_us == pytest.approx(second.gmacs * second.time_us)
    assert found["env"]["notes"] == [
        "vgg16-cifar/all, blocks 32x16, density 0.1 and 1 more: deepsparse: not asked for: give"
        " --deepsparse-python, an interpreter with deepsparse==1.8.0 and numpy<2"
    ]


@pytest.mark.usefixtures("small")
def test_the_summary_has_our_speed_up_over_each_engine_and_over_the_faster_compiler(tmp_path):
    # Timed in this order: folded, two eager forms, ours, OpenVINO, ONNX Runtime; 1 to 6 ms.
    found = run(tmp_path, {"openvino": load, "onnxruntime": load})["summary"]
    (whole, features) = found["engines"]
    assert (whole["case"], whole["batch"], features["case"]) == ("vgg16-cifar/all", 2, "vgg16-cifar/features")
    assert whole["ours_us"] == 4000
    assert whole["dense"] == pytest.approx(1 / 4)
    assert whole["engines"] == {"openvino": pytest.approx(5 / 4), "onnxruntime": pytest.approx(6 / 4)}
    assert whole["compilers"] == pytest.approx(5 / 4)
    head, lines = engines.engines_table(found["engines"])
    assert head[3:] == ("over openvino", "over onnxruntime", "over the faster compiler")
    assert lines[0] == ("vgg16-cifar/all, batch 2", "4 ms", "0.25x", "1.25x", "1.50x", "1.25x")


@pytest.mark.usefixtures("small")
def test_the_picture_is_drawn_from_the_file(tmp_path):
    run(tmp_path, {"openvino": load})
    (picture,) = drawing.draw(tmp_path / "out" / "results.json", tmp_path / "pictures")
    assert picture.name == "engines.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("small")
def test_engines_that_are_missing_or_fail_are_named_and_the_others_measured(tmp_path):
    found = run(tmp_path, {"openvino": missing, "onnxruntime": broken})
    assert {row["backend"] for row in found["rows"]} == {"auto"}
    reasons = [note.split(": ", 1)[1] for note in found["env"]["notes"]]
    assert "openvino: openvino is not installed: pip install 'lhc-triton[peers]'" in reasons
    assert "onnxruntime: RuntimeError: operator Frobnicate is not supported" in reasons
    assert found["summary"]["engines"][0]["engines"] == {}
    assert found["summary"]["engines"][0]["compilers"] is None
    pictures = drawing.draw(tmp_path / "out" / "results.json", tmp_path / "pictures")
    assert [picture.name for picture in pictures] == ["speedup.png", "layers.png"]


@pytest.mark.usefixtures("small")
def test_a_missing_exporter_is_told_once_and_not_asked_again(tmp_path):
    asked = []

    def no_onnx(model, x, path):
        asked.append(path)
        raise ModuleNotFoundError("No module named 'onnx'", name="onnx")

    found = run(tmp_path, {"openvino": load, "onnxruntime": load}, export=no_onnx)
    assert len(asked) == 1
    reasons = [note.split(": ", 1)[1] for note in found["env"]["notes"]]
    for name in ("openvino", "onnxruntime"):
        assert f"{name}: onnx is not installed: pip install 'lhc-triton[peers]'" in reasons


@pytest.mark.usefixtures("small")
def test_a_network_that_cannot_be_exported_gives_its_reason(tmp_path):
    def refuse(model, x, path):
        raise ValueError("no symbolic for aten::frobnicate\nmore")

    found = run(tmp_path, {"openvino": load}, export=refuse)
    assert any(
        note.endswith("openvino: the network cannot be written as ONNX: no symbolic for aten::frobnicate")
        for note in found["env"]["notes"]
    )


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.001, "wrong result, norm error 1.0e-03 > 1e-04"),
        (lambda y: y * float("nan"), "wrong result, norm error nan > 1e-04"),
        (lambda y: y[..., :1], "output (2, 1) in place of (2, 10)"),
    ],
)
def test_an_engine_whose_output_differs_is_not_timed(tmp_path, change, reason):
    found = run(tmp_path, {"openvino": functools.partial(load, change=change), "onnxruntime": load})
    assert {row["backend"] for row in found["rows"]} == {"auto", "onnxruntime"}
    assert any(f"openvino: {reason}" in note for note in found["env"]["notes"])


def masked(kernel=3):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 40, kernel, padding="same", bias=False),
        nn.BatchNorm2d(40), nn.Conv2d(40, 16, kernel, stride=2, dilation=2),
    )  # fmt: skip
    lhc.convert(model, lhc.LHCConfig(in_block=8, out_block=4))
    for layer in (model[2], model[4]):
        layer.set_topology(torch.rand(layer.topology.shape) < 0.3, allow_dead=True)
    return model.eval()


def test_the_plain_network_computes_the_same_with_zeros_in_ordinary_convolutions():
    model, x = masked(), torch.randn(2, 3, 17, 13)
    plain = engines.plain(model)
    assert {type(m) for m in plain.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert torch.equal(plain[2].weight != 0, model[2].mask() != 0)
    torch.testing.assert_close(plain(x), model(x))
    assert isinstance(model[2], lhc.LHCConv2d)


@pytest.mark.parametrize("name", list(engines.LOADERS))
def test_engines_that_are_installed_run_what_is_exported(tmp_path, name):
    pytest.importorskip("onnx")
    pytest.importorskip(name)
    model, x = masked(), torch.randn(2, 3, 17, 13)
    with Engines().open() as opened:
        loaded = opened.load(model, x, [name], 1)
        assert loaded.left_out == {}
        with torch.no_grad():
            expected = model.double()(x.double())
        torch.testing.assert_close(loaded.outputs[name].double(), expected, rtol=1e-4, atol=1e-5)
        assert opened.versions[name]
        loaded.runs[name]()


# The interpreter of its own: a wrapper of this one in which a module stands for DeepSparse. Its networks are
# files of the output that is right.
FAKE = """
import sys, numpy
__version__ = "1.8.0"
class Engine:
    def __init__(self, path, batch_size, num_cores):
        assert num_cores >= 1
        if open(path, "rb").read(4) == b"bad!":
            raise ValueError("unsupported network\\nmore")
        self.output, self.batch = numpy.load(path), batch_size
        print("DeepSparse, a banner on stdout")
    def run(self, inputs):
        assert inputs[0].shape[0] == self.batch
        self.calls = getattr(self, "calls", 0) + 1
        LIMIT
        print("a line per call")
        return [self.output]
"""


@pytest.fixture
def interpreter(tmp_path):
    """Return what makes a Python with a module `deepsparse`, a line of its choice run in each call."""

    def make(line="pass"):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / "deepsparse.py").write_text(FAKE.replace("LIMIT", line))
        path = tmp_path / "python"
        # -I, the first argument, would hide the folder of our module.
        path.write_text(f'#!/bin/sh\nshift\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
        path.chmod(0o755)
        return path

    return make


def export_output(model, x, path):
    with path.open("wb") as file, torch.no_grad():
        np.save(file, model(x).numpy())


@pytest.mark.usefixtures("small")
def test_deepsparse_runs_in_an_interpreter_of_its_own(tmp_path, interpreter):
    found = run(tmp_path, {}, export=export_output, deepsparse_python=interpreter())
    assert [row["backend"] for row in found["rows"]] == ["auto", "deepsparse"] * 2
    assert found["env"]["engines"] == {"deepsparse": "1.8.0"}
    assert found["env"]["notes"] == []


@pytest.mark.usefixtures("small")
def test_an_engine_that_dies_while_it_is_timed_leaves_the_others_their_rows(tmp_path, interpreter):
    python = interpreter("if self.calls > 1: sys.exit('out of licences')")
    found = run(tmp_path, {"openvino": load}, export=lambda *a: (export_output(*a), export_keeping(*a)),
                deepsparse_python=python)  # fmt: skip
    assert {row["backend"] for row in found["rows"]} == {"auto"}
    assert any(
        "deepsparse: the interpreter ended (exit code 1): out of licences" in note
        for note in found["env"]["notes"]
    )


def export_keeping(model, x, path):
    EXPORTED[path.name] = engines.plain(model)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("python", "reason"),
    [
        ("/nowhere/python", "cannot be started: No such file or directory"),
        ("/", "cannot be started: Permission denied"),
        ("/bin/true", r"the interpreter ended \(exit code 0\)"),
        (sys.executable, "ModuleNotFoundError: No module named 'deepsparse'"),
    ],
)
def test_an_interpreter_that_does_not_serve_is_refused_before_anything_is_written(tmp_path, python, reason):
    with pytest.raises(
        ValueError, match=f"--deepsparse-python {python} does not serve: .*{reason}"
    ) as caught:
        run(tmp_path, {}, deepsparse_python=python)
    assert "\n" not in str(caught.value)
    assert "give a Python with deepsparse==1.8.0" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_engines_are_refused_for_suites_without_them(tmp_path):
    for name in ("quick", "loading"):
        with pytest.raises(
            ValueError, match=f"suite '{name}' compares with no other engine; the suite 'cpu-engines'"
        ):
            suites.run_suite(name, tmp_path / "out", engines=Engines())
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small")
def test_the_command_line_measures_prints_and_draws(tmp_path, monkeypatch, run):
    def run_small(*arguments, engines, **options):
        chosen = Engines(loaders={"openvino": load}, export=export)
        return run_suite(*arguments, engines=chosen, rounds=1, timer=call_all, **options)

    run_suite = suites.run_suite
    monkeypatch.setattr(suites, "run_suite", run_small)
    out = tmp_path / "out"
    done = run("bench", "--suite", "cpu-engines", "--out", out, "--only", "features")
    assert done.returncode == 0
    assert "Not measured: vgg16-cifar/features" in done.stdout
    assert "over openvino" in done.stdout
    assert {path.name for path in out.iterdir()} == {"results.json", "results.csv", "engines.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "quick"], "suite 'quick' compares with no other engine"),
        (["--suite", "loading"], "suite 'loading' compares with no other engine"),
        (["--suite", "cpu-engines"], "--deepsparse-python /nowhere/python does not serve"),
    ],
)
def test_the_command_line_refuses_an_interpreter_in_one_line(tmp_path, run, arguments, message):
    done = run("bench", *arguments, "--out", tmp_path / "out", "--deepsparse-python", "/nowhere/python")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert message in line
