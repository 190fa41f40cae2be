"""The command line: what it prints, where, and how it refuses."""

import json
import sys
from dataclasses import dataclass

import pytest

from lhc_triton import LHCConfig, convert, freeze
from lhc_triton.cli import app, main
from lhc_triton.models.architecture import Architecture
from lhc_triton.models.pretrained import save_network

COMMANDS = ("demo", "train", "report", "ablate", "plan", "tune", "bench", "plot", "inspect", "doctor")


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line as its entry point would, in an empty folder."""

    def call(*arguments: str) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["lhc-triton", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out = capsys.readouterr()
        return Done(stopped.value.code or 0, out.out, out.err)

    return call


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
    assert found["devices"][0]["device"] == "cpu"
    names = {row["backend"] for row in found["backends"]["cpu"]}
    assert {"dense", "reference", "torch", "native", "triton"} <= names
    assert found["packages"]["torch"]


def test_plan_of_the_shipped_network_round_trips_through_json(run, tmp_path):
    from lhc_triton.planning.schema import Plan

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
        (("bench", "--only", "nothing"), "nothing"),
        (("bench", "--seed", "-1"), "seed"),
        (("bench", "--suite", "loading", "--only", "nothing"), "the cases are train/0 workers"),
        (("bench", "--suite", "loading", "--out", f"{__file__}/out"), "cannot be a folder"),
        (("bench", "--out", f"{__file__}/out"), "cannot be a folder"),
        (("plan", "lhc", "--out", "."), "is a folder"),
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
    from lhc_bench import loading

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
