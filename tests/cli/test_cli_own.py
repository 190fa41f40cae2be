"""The command line on one's own network: accelerate, prune, predict, plan, inspect, and what it refuses."""

import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from zoo.mine import Mine, grey, make

import lhc_triton as lhc

SHAPE = "2x3x24x24"
ACCELERATE = (
    "accelerate", "zoo.mine:make", "--weights", "w.safetensors", "--input", SHAPE, "--out", "f.safetensors",
)  # fmt: skip
SMALL = ("--in-block", "8", "--out-block", "8")


def sparse_weights(path, density=0.3):
    """Random weights of Mine with block zeros, as a trained network's would be."""
    torch.manual_seed(1)
    model = Mine()
    config = lhc.LHCConfig(in_block=16, out_block=16)
    lhc.to_dense(lhc.prune(model, torch.zeros(1, 3, 24, 24), config, budget=density))
    save_file(model.state_dict(), path)
    return model.eval()


def test_a_factory_with_weights_becomes_an_artefact(run, tmp_path):
    model = sparse_weights(tmp_path / "w.safetensors")
    done = run(*ACCELERATE)
    assert done.returncode == 0, done.stderr
    assert "Written: f.safetensors" in done.stdout
    x = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(lhc.load(tmp_path / "f.safetensors")(x), model(x), rtol=1e-4, atol=1e-5)


def test_accelerate_speaks_json(run, tmp_path):
    sparse_weights(tmp_path / "w.safetensors")
    done = run("accelerate", "zoo.mine:make", "--weights", "w.safetensors", "--input", SHAPE, "--json")
    found = json.loads(done.stdout)
    assert {row["layer"] for row in found["layers"]} == {"stem", "body", "shortcut", "tail"}
    assert found["artifact"] is None


def test_accelerate_quantises_on_images(run, tmp_path):
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    model = sparse_weights(tmp_path / "w.safetensors")
    options = ("--weights", "w.safetensors", "--input", SHAPE, "--backend", "reference", "--dtype", "int8")
    done = run(
        "accelerate", "zoo.mine:make", *options, "--images", "photos", "--out", "f.safetensors", "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["layers"]
    assert "int8" in {row["dtype"] for row in rows}
    x = torch.rand(2, 3, 24, 24)
    y, expected = lhc.load(tmp_path / "f.safetensors")(x), model(x).detach()
    assert 1e-5 < float((y - expected).norm() / expected.norm()) < 0.1
    done = run("accelerate", "zoo.mine:make", *options)
    assert "int8 is fitted to random numbers; give --images" in done.stderr


def test_accelerate_names_the_dtypes_there_are(run):
    done = run("accelerate", "zoo.mine:make", "--input", SHAPE, "--dtype", "int4")
    assert done.returncode == 2
    assert "dtype='int4' is not supported; use 'int8'" in done.stderr


@pytest.mark.parametrize("how", ["safetensors", "pt", "checkpoint", "data parallel", "pruned"])
def test_weights_come_as_files_of_tensors(run, tmp_path, how):
    model = sparse_weights(tmp_path / "w.safetensors")
    state, path = dict(model.state_dict()), tmp_path / "w.pt"
    if how == "safetensors":
        path = tmp_path / "w.safetensors"
    elif how == "pt":
        torch.save(state, path)
    elif how == "checkpoint":
        torch.save({"epoch": 3, "state_dict": state}, path)
    elif how == "data parallel":
        torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    else:
        state["tail.weight_orig"] = torch.where(state["tail.weight"] == 0, 7.0, state["tail.weight"])
        state["tail.weight_mask"] = (state.pop("tail.weight") != 0).float()
        torch.save(state, path)
    done = run("plan", "zoo.mine:make", "--weights", path.name, "--input", SHAPE, "--json")
    assert done.returncode == 0, done.stderr
    planned = {layer["name"]: layer for layer in json.loads(done.stdout)["layers"]}
    x = torch.zeros(2, 3, 24, 24)
    assert planned.keys() == {layer.name for layer in lhc.plan(model, x).layers}


def test_prune_writes_weights_that_the_network_loads(run, tmp_path):
    save_file(make().state_dict(), tmp_path / "w.safetensors")
    arguments = ("zoo.mine:make", "--weights", "w.safetensors", "--input", SHAPE)
    done = run("prune", *arguments, "--budget", "0.25", *SMALL, "--out", "p.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert 0.2 < report["kept"] <= 0.25
    state = load_file(tmp_path / "p.safetensors")
    Mine().load_state_dict(state)
    live = sum(int((state[f"{row['layer']}.weight"] != 0).sum()) for row in report["layers"])
    assert live == sum(row["live_weights"] for row in report["layers"])
    assert run("inspect", *arguments[:1], "--weights", "p.safetensors", "--input", SHAPE).returncode == 0
    done = run("prune", *arguments, "--budget", "0.25", *SMALL, "--share", "32")
    assert "lost 0." in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_an_exported_program_runs_like_the_network(run, tmp_path):
    model = sparse_weights(tmp_path / "w.safetensors")
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.zeros(2, 3, 24, 24),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "net.pt2")
    done = run("accelerate", "net.pt2", "--out", "f.safetensors")
    assert done.returncode == 0, done.stderr
    x = torch.randn(3, 3, 24, 24)
    torch.testing.assert_close(lhc.load(tmp_path / "f.safetensors")(x), model(x), rtol=1e-4, atol=1e-5)
    done = run("plan", "net.pt2", "--json")
    assert {layer["name"] for layer in json.loads(done.stdout)["layers"]} >= {"body", "tail"}


def test_an_exported_program_that_would_run_code_is_refused(run, tmp_path):
    program = torch.export.export(make().eval(), (torch.zeros(2, 3, 24, 24),))
    torch.export.save(program, tmp_path / "net.pt2")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "gotcha"), "w"))

    def changed(change):
        with zipfile.ZipFile(tmp_path / "net.pt2") as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))

    changes = {
        "a size is an expression": lambda n, b: b.replace(b'"as_int": 24', b'"expr_str": "open(1)"'),
        "a tensor is pickled": lambda n, b: b.replace(b'"use_pickle": false', b'"use_pickle": true'),
        "its example holds pickled": lambda n, b: pickle.dumps(Evil()) if "sample_inputs" in n else b,
    }
    for said, change in changes.items():
        changed(change)
        done = run("plan", "bad.pt2")
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert not (tmp_path / "gotcha").exists()
    (tmp_path / "net.pt2").write_bytes((tmp_path / "net.pt2").read_bytes()[:2000])
    assert "is no intact archive" in run("plan", "net.pt2").stderr


def test_several_inputs(run):
    done = run("accelerate", "zoo.mine:two_inputs", "--input", "2x3x8x8,2x4", "--json")
    assert done.returncode == 0, done.stderr
    assert "no --weights given" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("zoo.mine:raises", "--input", SHAPE), "zoo.mine:raises raised RuntimeError: no such checkpoint"),
        (("zoo.mine:leaves", "--input", SHAPE), "zoo.mine:leaves raised SystemExit: 3"),
        (("zoo.mine:on_meta", "--input", SHAPE), "zoo.mine:on_meta cannot run on cpu: NotImplementedError: "),
        (("zoo.mine:needs", "--input", SHAPE), "it needs width: give a function of no arguments"),
        (("zoo.mine:gives_text", "--input", SHAPE), "gave a str, not a torch.nn.Module"),
        (("zoo.mine:NUMBER", "--input", SHAPE), "is a int; give a function or class"),
        (("zoo.mine:absent", "--input", SHAPE), "has no 'absent'; it has "),
        (("zoo.absent:make", "--input", SHAPE), "importing zoo.absent failed: ModuleNotFoundError"),
        (("zoo.mine:make",), "does not say what it takes: give --input, such as 1x3x224x224"),
        (("zoo.mine:make", "--input", "3,,4"), "'3,,4' is no shape; give one such as 1x3x224x224"),
        (("zoo.mine:make", "--input", "1x0x8x8"), "is no shape"),
        (("zoo.mine:make", "--input", "99999x99999x9x9"), "has more than"),
        (("zoo.mine:make", "--input", "1x4x8x8"), "Mine does not run on inputs of shape (1, 4, 8, 8)"),
        (("lhc", "--weights", "w.safetensors"), "lhc brings its own weights"),
        (("no/such.pt2",), "there is no such file; give package.module:factory with --weights FILE"),
        (("resnet9000",), "no network 'resnet9000' is known; give package.module:factory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_wrong_source_is_one_line_with_what_to_do(run, arguments, said):
    done = run("plan", *arguments)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "\n" not in done.stderr.split("they are made with\n")[-1].strip("\n").replace(
        "runs with the weights that it is made with\n", ""
    )


def fit(run, tmp_path, change):
    state = dict(make().state_dict())
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    return run("plan", "zoo.mine:make", "--weights", "w.safetensors", "--input", SHAPE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: (s.pop("tail.bias"), s.pop("head.bias")), "missing tail.bias and 1 more"),
        (lambda s: s.update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda s: s.update(more=s.pop("norm.bias")), "missing norm.bias, unexpected more"),
        (lambda s: s.update({"body.bias": torch.zeros(3)}), "body.bias is (3,), the network's (64,)"),
        (
            lambda s: s.update({"tail.weight": s["tail.weight"].int()}),
            "tail.weight is torch.int32, the network's torch.float32",
        ),
        (
            lambda s: s.update({"body.bias": s["body.bias"].to(torch.complex64)}),
            "body.bias is torch.complex64, the network's torch.float32",
        ),
    ],
)
def test_weights_that_do_not_fit_name_the_first_that_does_not(run, tmp_path, change, said):
    done = fit(run, tmp_path, change)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"its weights do not fit Mine: {said}" in done.stderr


def test_a_pickled_model_is_refused_with_what_to_do(run, tmp_path):
    torch.save(make(), tmp_path / "model.pt")
    done = run("plan", "model.pt")
    assert "give package.module:factory --weights model.pt" in done.stderr
    done = run("plan", "zoo.mine:make", "--weights", "model.pt", "--input", SHAPE)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "pickled objects, which run code" in done.stderr
    assert "safetensors.torch.save_file(model.state_dict(), FILE)" in done.stderr
    save_file(make().state_dict(), tmp_path / "w.safetensors")
    assert "does not say of which network: give package.module" in run("inspect", "w.safetensors").stderr


def pictures(folder, count=5, size=(40, 30)):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def test_predict_classifies_files_as_the_network_does(run, tmp_path):
    sparse_weights(tmp_path / "w.safetensors")
    run(*ACCELERATE)
    pictures(tmp_path / "photos")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    options = (
        "--mean",
        "0.5,0.4,0.3",
        "--std",
        "0.2",
        "--batch",
        "2",
        "--top",
        "2",
        "--classes",
        "names.txt",
    )
    done = run("predict", "f.safetensors", "photos", *options, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images_per_s"] > 0
    fast = lhc.load(tmp_path / "f.safetensors")
    for index, row in enumerate(found["images"]):
        assert row["file"].endswith(f"{index}.png")
        side = 224 / 256 * 30
        box = (20 - side / 2, 15 - side / 2, 20 + side / 2, 15 + side / 2)
        image = Image.open(tmp_path / "photos" / f"{index}.png")
        pixels = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR, box=box))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
        x = (x - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
        shares, order = fast(x).softmax(1)[0].sort(descending=True)
        assert [c["index"] for c in row["classes"]] == order[:2].tolist()
        assert row["classes"][0]["name"] == ["ant", "bee", "cat", "dog", "eel"][order[0]]
        assert row["classes"][0]["share"] == pytest.approx(float(shares[0]), rel=1e-4)


def test_predict_tells_a_damaged_file_and_goes_on(run, tmp_path):
    pictures(tmp_path / "photos", 2)
    (tmp_path / "photos" / "1.png").write_bytes(b"no picture")
    done = run("predict", "zoo.mine:make", "photos", "--input", SHAPE)
    assert done.returncode == 1
    assert "1 images in" in done.stdout
    assert "not an image of a supported kind" in done.stdout
    assert "1 files could not be read" in done.stderr


def test_predict_makes_grey_of_coloured_files(run, tmp_path):
    pictures(tmp_path / "photos", 1)
    done = run("predict", "zoo.mine:grey", "photos", "--input", "1x1x16x16", "--json")
    image = Image.open(tmp_path / "photos" / "0.png")
    side = 224 / 256 * 30
    box = (20 - side / 2, 15 - side / 2, 20 + side / 2, 15 + side / 2)
    rgb = np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR, box=box)).astype(np.float32) / 255
    x = torch.from_numpy(rgb @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[None, None]
    shares = grey().eval()(x).softmax(1)[0]
    (row,) = json.loads(done.stdout)["images"]
    assert row["classes"][0]["index"] == int(shares.argmax())
    assert row["classes"][0]["share"] == pytest.approx(float(shares.max().detach()), rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("photos", "--mean", "a"), "mean='a' is not supported: give one number, or 3"),
        (("photos", "--std", "0"), "std=0 is not supported"),
        (("photos", "--batch", "0"), "batch=0 is not supported"),
        (("photos", "--classes", "names.txt"), "names 1 classes, the network has 5"),
        (("absent.png",), "absent.png: there is no such file"),
        (("empty",), "no image file in empty"),
    ],
)
def test_predict_refuses_what_it_cannot_use(run, tmp_path, arguments, said):
    pictures(tmp_path / "photos", 1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "names.txt").write_text("ant\n")
    done = run("predict", "zoo.mine:make", *arguments, "--input", SHAPE)
    assert done.returncode == 2
    assert said in done.stderr


def test_predict_needs_square_images(run, tmp_path):
    pictures(tmp_path / "photos", 1)
    assert "needs one [N, C, H, W]" in run("predict", "zoo.mine:make", "photos", "--input", "1x3x8x9").stderr
    assert isinstance(make(), nn.Module)


def test_bench_of_ones_own_network_compares_its_dense_forms_with_ours(run, tmp_path):
    sparse_weights(tmp_path / "w.safetensors")
    arguments = ("zoo.mine:make", "--weights", "w.safetensors", "--input", SHAPE)
    done = run("bench", "--suite", "mine", *arguments, "--out", "b", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    rows = {row["backend"]: row for row in found["rows"]}
    assert "auto" in rows
    for row in rows.values():
        assert row["model"] == "zoo.mine:make"
        assert row["speedup"] == pytest.approx(row["baseline_us"] / row["time_us"])
        assert row["rel_err"] < 1e-4
    assert json.loads((tmp_path / "b" / "results.json").read_text()) == found
    assert run("bench", "--suite", "mine", "--out", "c").returncode == 2
    assert "belongs to --suite mine" in run("bench", "zoo.mine:make", "--out", "c").stderr


def test_build_compiles_ahead_of_time_and_doctor_shows_how(run, monkeypatch, tmp_path, native_kernel):
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run("build")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 2)
    assert "CXX names the compiler 'no-such-compiler'" in done.stderr
    found = json.loads(run("doctor", "--json").stdout)
    assert found["environment"]["CXX"] == "no-such-compiler"
    assert "no-such-compiler" in found["native"]["problem"]
    monkeypatch.delenv("CXX")
    if native_kernel is not None:
        return
    monkeypatch.delenv("LHC_TRITON_CACHE")
    found = json.loads(run("build", "--json").stdout)
    assert found["library"].endswith(".so")
    assert "-std=c++20" in found["flags"]
    assert json.loads(run("doctor", "--json").stdout)["native"]["compiler"] == found["compiler"]


def test_load_warns_where_the_fastest_kernel_is_missing(tmp_path):
    """In a process of its own: whether the kernel can be built is remembered."""
    model = sparse_weights(tmp_path / "w.safetensors")
    lhc.save(lhc.accelerate(model, torch.zeros(2, 3, 24, 24), tune="off"), tmp_path / "f.safetensors")
    code = (
        "import warnings, lhc_triton as lhc\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    lhc.load('f.safetensors')\n"
        "print([str(w.message) for w in seen])\n"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "the fastest sparse kernel is left out: " in done.stdout
    assert "no-such-compiler" in done.stdout
