"""The command line: what it prints, where, and how it refuses."""

import json
import os

import pytest

from lhc_triton import LHCConfig, convert, freeze
from lhc_triton.cli import app
from lhc_triton.cli.console import print_table
from lhc_triton.models.architecture import Architecture
from lhc_triton.models.pretrained import save_network

COMMANDS = (
    "demo",
    "accelerate",
    "prune",
    "predict",
    "train",
    "report",
    "ablate",
    "plan",
    "tune",
    "bench",
    "plot",
    "inspect",
    "doctor",
    "build",
)


def test_every_command_of_the_contract_exists():
    assert {command.callback.__name__ for command in app.registered_commands} == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_and_json(run, command):
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"lhc-triton {command}" in done.stdout
    assert "--json" in done.stdout


def test_version_is_the_package_version(run):
    import lhc_triton

    assert run("--version").stdout.split() == ["lhc-triton", lhc_triton.__version__]


def test_doctor_json_names_devices_and_backends(run):
    found = json.loads(run("doctor", "--json").stdout)
    assert isinstance(found["notes"], list)
    assert found["devices"][0]["device"] == "cpu"
    names = {row["backend"] for row in found["backends"]["cpu"]}
    assert {"dense", "reference", "torch", "native", "triton"} <= names
    assert found["packages"]["torch"]


def test_plan_of_the_shipped_network_round_trips_through_json(run, tmp_path):
    from lhc_triton.planning.network_plan import Plan

    path = tmp_path / "plan.json"
    done = run("plan", "lhc", "--batch", "2", "--out", str(path), "--json")
    assert done.returncode == 0, done.stderr
    made = Plan.from_json(path.read_text())
    assert made == Plan.from_json(done.stdout)
    assert {layer.topology.geometry.batch for layer in made.layers} == {2}


def test_plan_prints_a_table_for_people(run):
    done = run("plan", "lhc")
    assert done.returncode == 0, done.stderr
    assert "features" in done.stdout


def test_plan_shows_what_was_measured_here_before(run, monkeypatch, tmp_path):
    import torch

    from lhc_triton.planning.network_plan import Plan
    from lhc_triton.runtime.choosing.timing_store import TimingStore, layer_key

    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "cache"))
    layer = Plan.from_json(run("plan", "lhc", "--json").stdout).layers[0]
    TimingStore().put(
        layer_key(layer, torch.float32, torch.device("cpu")), {layer.backend: 4321.0, "dense": 98765.0}
    )
    shown = run("plan", "lhc").stdout
    assert "4321" in shown
    assert "98765" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_train_shows_its_settings_as_the_file_it_takes_and_does_not_train(run, tmp_path):
    from lhc_triton.training import PRESETS, TrainConfig

    shown = run("train", "--preset", "paper", "--set", "network=resnet34", "--seed", "3", "--show-config")
    config = TrainConfig.from_toml(shown.stdout)
    assert config == PRESETS["paper"].changed({"network": "resnet34", "seed": "3"})
    (tmp_path / "mine.toml").write_text(shown.stdout)
    again = run("train", "--config", "mine.toml", "--show-config", "--json")
    assert TrainConfig.from_dict(json.loads(again.stdout)) == config
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


def test_inspect_writes_a_picture_and_numbers(run, tmp_path):
    path = tmp_path / "topology.png"
    done = run("inspect", "lhc", "--out", str(path), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert path.read_bytes().startswith(b"\x89PNG")
    for layer in found["layers"]:
        assert 0 < layer["density"] <= 1
        assert layer["live_weights"] <= layer["weights"]


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_trained_weights_are_told_from_artefacts(run, tmp_path, command):
    architecture = Architecture("small-vgg", (8, 16, 16), "cifar", 1, 10, 28)
    model = freeze(convert(architecture.build(), LHCConfig(density=0.3, in_block=4, out_block=4)))
    save_network(model, tmp_path / "lhc.safetensors", architecture)
    done = run(command, "lhc.safetensors", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("plan", "no-such-network"), "no-such-network"),
        (("plan", "lhc", "--batch", "0"), "batch"),
        (("plan", "lhc", "--batch", "100000000"), "from 1 to 4096"),
        (("plan", "lhc", "--backend", "magic"), "magic"),
        (("inspect", "dense"), "no layer"),
        (("bench", "--suite", "nothing"), "nothing"),
        (("plot", "missing.json"), "missing.json"),
        (("train", "--preset", "nothing"), "nothing"),
        (("train", "--data", "no-such-folder"), "no-such-folder"),
        (("train", "--density", "1.5"), "density"),
        (("train", "--config", "no-such.toml"), "no-such.toml"),
        (("train", "--set", "lr"), "'lr' is not of the form name=value"),
        (("train", "--set", "lr=fast"), "lr 'fast' is not a number"),
        (("train", "--preset", "shipped", "--set", "network=vgg16"), "it needs 32"),
        (("demo", "--batch", "0"), "batch"),
        (("demo", "--batch", "10001"), "10000 test images"),
        (("demo", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("demo", "--cifar10", "no-such-folder"), "no-such-folder"),
        (("bench", "--only", "nothing"), "nothing"),
        (("bench", "--seed", "-1"), "seed"),
        (("bench", "--suite", "loading", "--only", "nothing"), "the cases are train/0 workers"),
        (("bench", "--suite", "loading", "--out", f"{__file__}/out"), "cannot be a folder"),
        (("bench", "--out", f"{__file__}/out"), "cannot be a folder"),
        (("plan", "lhc", "--out", "."), "is a folder"),
        (("plan", "/dev"), "/dev: is no finished run of `lhc-triton train`"),
        (("inspect", "/dev/zero"), "/dev/zero is a device; give the name of a file"),
        (("plan", "\x1b[2J" + "x" * 300), r"\x1b[2Jxxx"),
        (("plan", "lhc", "--batch", "x"), "--batch"),
        (("tune", "--suite", "nothing"), "tune"),
        (("doctor", "--unknown"), "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_users_mistake_is_one_line_and_exit_code_2(run, arguments, named, tmp_path):
    done = run(*arguments)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


IMPOSSIBLE = [
    (("batch_size=99999999999",), "batch_size 99999999999 is outside [2, 65536]"),
    (("batch_size=20000",), "batch_size 20000 and validation_images 1200 are more than the 12000"),
    (("validation_images=12000",), "batch_size 64 and validation_images 12000 are more than the 12000"),
    (("train_images=11000",), "train_images 11000 and validation_images 1200 are more than the 12000"),
    (("image_size=7",), "image_size 7: fashion-mnist images are 28x28; 28 to 256 are supported"),
    (("data=cifar10", "image_size=64"), "image_size 64: cifar10 images are 32x32; that alone is supported"),
    (("data=imagenet", "image_size=7"), "image_size 7; 8 to 1024 are supported"),
    (("data=imagenet", "network=vgg16", "widths=none", "image_size=16"), "widths 'none' is not a list"),
    (("widths=[8, 'M', 'M', 'M', 'M', 'M', 8]",), "pools 5 times, too often for images of 28"),
    (("widths=[8, 1000000]",), "hold 1000000; numbers of filters up to 8192"),
    (("widths=[" + "8," * 100 + "8]",), "widths have 101 entries; up to 64 are supported"),
    (("width=16", "widths=[8, 8000]"), "size 128000 is outside [1, 8192]"),
    (("coarse_epochs=1000000000",), "coarse_epochs 1000000000 is outside"),
    (("in_block=1" + "0" * 400,), "in_block 1000"),
    (("seed=" + "9" * 5000,), "seed '999"),
    (("lr=" + "9" * 5000,), "lr inf is outside [0, 10]"),
    (("out_block=0",), "out_block 0 is outside [1, 8192]"),
    (("parts=99999",), "parts 99999 is outside"),
    (("device=sofa",), "device 'sofa' is not one of cpu, cuda, cuda:N"),
    (("lr=nan",), "lr nan is outside"),
    (("data_folder=\x1b[2J",), r"data_folder '\x1b[2J' is not supported"),
    (("data=imagenet", "image_size=1025"), "image_size 1025; 8 to 1024"),
]


@pytest.mark.parametrize(("settings", "said"), IMPOSSIBLE, ids=[" ".join(s)[:40] for s, _ in IMPOSSIBLE])
def test_settings_that_no_run_can_have_are_not_shown(run, settings, said):
    done = run("train", *[word for setting in settings for word in ("--set", setting)], "--show-config")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert len(done.stderr) < 1100


@pytest.mark.parametrize("preset", ["quick", "shipped", "paper", "modern", "fashion-vgg16"])
def test_every_preset_is_shown(run, preset):
    done = run("train", "--preset", preset, "--show-config")
    assert done.returncode == 0, done.stderr


MISTAKE = ("train", "--set", "lr=fast")


def processes(monkeypatch, folder, *ranks):
    """Be one process of torchrun's on this machine after the other."""
    for rank in ranks:
        own = folder / "attempt_0" / str(rank)
        own.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(own / "error.json"))
        yield


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["rank 0 first", "rank 2 first"])
def test_under_torchrun_a_mistake_is_told_once_and_all_end_with_the_same_code(
    run, monkeypatch, tmp_path_factory, order
):
    folder = tmp_path_factory.mktemp("torchrun")
    done = [run(*MISTAKE) for _ in processes(monkeypatch, folder, *order)]
    assert [one.returncode for one in done] == [2, 2, 2]
    assert [len(one.stderr.splitlines()) for one in done] == [1, 0, 0]


def test_a_mistake_of_one_process_alone_is_told_by_it(run, monkeypatch, tmp_path_factory):
    each = processes(monkeypatch, tmp_path_factory.mktemp("torchrun"), 0, 1)
    next(each)
    assert "'lr' is not of the form" in run("train", "--set", "lr").stderr
    next(each)
    assert "'fast' is not a number" in run(*MISTAKE).stderr


def test_rank_0_tells_a_mistake_where_processes_share_no_folder(run, monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        done = run(*MISTAKE)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, lines)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "1" / "error.json"))
    assert len(run(*MISTAKE).stderr.splitlines()) == 1


def test_bench_of_loading_prints_a_table_and_plot_draws_it_again(run, monkeypatch, tmp_path):
    from lhc_bench.measure import loading

    for name, value in {"PICTURES": 8, "WIDTH": 60, "HEIGHT": 40, "ROUNDS": 1, "WORKERS": (0, 1)}.items():
        monkeypatch.setattr(loading, name, value)
    done = run("bench", "--suite", "loading", "--only", "train", "--out", "loading")
    assert done.returncode == 0, done.stderr
    assert "train/1 workers" in done.stdout
    assert "of bare decoding" in done.stdout
    (tmp_path / "loading" / "loading.png").unlink()
    assert run("plot", "loading/results.json", "--out", "loading").returncode == 0
    assert {path.name for path in (tmp_path / "loading").iterdir()} == {
        "results.json", "results.csv", "loading.png",
    }  # fmt: skip


def test_bench_of_the_planner_says_whether_its_aims_are_met(run, monkeypatch, tmp_path):
    from lhc_bench.measure import planner
    from lhc_bench.measure.cases import LayerCase
    from lhc_bench.measure.planner_problems import PlannerCase

    wide = PlannerCase("wide-cifar", "conv", (LayerCase("wide-cifar", "conv", 32, 2048, 6, 6),))
    monkeypatch.setattr(planner, "planner_cases", lambda: (wide,))
    done = run("bench", "--suite", "planner", "--density", "0.2", "--out", "planner")
    assert done.returncode == 0, done.stderr
    assert "sort and cut" in done.stdout
    assert "a layer of 2,048 filters: at most" in done.stdout
    assert "aim of 2,000 ms is" in done.stdout
    assert (tmp_path / "planner" / "planner.png").is_file()


def test_the_help_of_bench_names_every_suite(run):
    from lhc_bench.measure.suites import SUITES

    told = " ".join(run("bench", "--help").stdout.replace("│", " ").split())
    assert all(f"{name}," in told for name in SUITES)
    assert "mine." in told


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": 3}'], ids=["empty", "cut", "list", "wrong"])
def test_plot_refuses_a_damaged_results_file(run, tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    done = run("plot", str(path), "--out", str(tmp_path / "plots"))
    assert done.returncode == 2
    assert "results.json" in done.stderr
    assert not (tmp_path / "plots").exists()


def test_an_artefact_brings_its_own_plan(run, tmp_path):
    import torch

    import lhc_triton as lhc
    from lhc_triton.models import load_pretrained

    path = str(tmp_path / "net.safetensors")
    fast = lhc.accelerate(load_pretrained("lhc"), torch.zeros(3, 1, 28, 28), backend="torch", tune="off")
    lhc.save(fast, path)
    done = run("plan", path, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(fast.plan.to_json())
    for option in (("--batch", "2"), ("--backend", "dense")):
        done = run("plan", path, *option)
        assert (done.returncode, "its own plan" in done.stderr) == (2, True)


def test_plan_refuses_a_file_that_is_no_network(run, tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"not a network")
    done = run("plan", str(path))
    assert done.returncode == 2
    assert "net.safetensors" in done.stderr


@pytest.mark.parametrize("command", ["plan", "inspect", "plot"])
def test_what_is_no_file_is_not_waited_for(run, tmp_path, command):
    os.mkfifo(tmp_path / "pipe")
    done = run(command, "pipe")
    assert (done.returncode, done.stderr) == (2, "lhc-triton: pipe is a pipe; give the name of a file\n")


def save_with(path, text):
    import torch

    from lhc_triton.runtime.saved.sealed_file import sealed

    path.write_bytes(b"".join(sealed(text, {"x": torch.zeros(1)})))


@pytest.mark.parametrize("command", ["plan", "inspect"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "its metadata are not JSON (it is nested too deep)"),
        ('{"format_version": 2, "plan": ' + "[" * 900 + "]" * 900 + "}", "missing or unknown fields"),
        ('{"format_version": "\\u001b[2J\\u0007"}', r"format version \x1b[2J\x07 is not supported"),
        ('{"format_version": 1' + "0" * 4000 + "}", "format version 10000000"),
        ('{"format_version": NaN}', "NaN is not a number that JSON has"),
        ('{"kind": "\\u001b[2J"}', r"\x1b[2J"),
    ],
    ids=["deep", "deep inside", "escapes", "digits", "nan", "kind"],
)
def test_a_hostile_artefact_is_one_line_and_exit_code_2(run, tmp_path, command, text, said):
    save_with(tmp_path / "net.safetensors", text)
    done = run(command, "net.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.rstrip("\n").isprintable()


def test_a_damaged_artefact_is_told_by_its_digest(run, tmp_path):
    import torch

    import lhc_triton as lhc
    from lhc_triton.models import load_pretrained

    path = tmp_path / "net.safetensors"
    fast = lhc.accelerate(load_pretrained("lhc"), torch.zeros(1, 1, 28, 28), backend="torch", tune="off")
    lhc.save(fast, path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = run("plan", "net.safetensors")
    assert (done.returncode, "its digest is not that of its content" in done.stderr) == (2, True)


def test_names_of_a_file_cannot_write_to_the_terminal(capsys):
    print_table(("layer\t", "why"), [("\x1b[2J", "x" * 5000)])
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert r"\x1b[2J" in shown
    assert shown.count("x") < 1010
