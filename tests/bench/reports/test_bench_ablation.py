"""Ablations: which runs a file asks for, and that runs which can share a dense twin do."""

import json
from dataclasses import replace

import pytest
import torch

from lhc_bench.reports import ablation, meaning
from lhc_bench.reports.ablation import dense_part, read_ablation, run_ablation
from lhc_triton.handcrafted import HANDCRAFTED, handcrafted
from lhc_triton.training import PRESETS, TrainConfig, epochs, read_config
from lhc_triton.training.data import open_data
from lhc_triton.training.stage import train_epoch

SPEC = """
seeds = [0, 1]

[base]
preset = "quick"
lr = 0.05
warmup_epochs = "none"

[[grid]]
out_block = [16, 64]
shapes = ["free", "rigid"]

[[grid]]
out_block = 16
penalty = ["weights", "macs"]
"""


@pytest.fixture
def spec(tmp_path):
    def write(text):
        path = tmp_path / "spec.toml"
        path.write_text(text)
        return path

    return write


def test_each_combination_is_trained_once_with_every_seed(spec):
    runs = read_ablation(spec(SPEC))
    base = replace(PRESETS["quick"], lr=0.05)
    wanted = [
        replace(base, out_block=out_block, shapes=shapes, penalty=penalty, seed=seed)
        for seed in (0, 1)
        for out_block, shapes, penalty in (
            (16, "free", "weights"), (16, "rigid", "weights"), (64, "free", "weights"),
            (64, "rigid", "weights"), (16, "free", "macs"),
        )
    ]  # fmt: skip
    assert list(runs.values()) == wanted
    assert list(runs)[:2] == ["out_block=16,shapes=free,seed=0", "out_block=16,shapes=rigid,seed=0"]
    assert list(runs)[-1] == "out_block=16,penalty=macs,seed=1"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            'topology = ["learned", "hetconv", "cross"]\nparts = [3, 4]',
            {
                "topology=learned,seed=0": {},
                "topology=hetconv,parts=3,seed=0": {"topology": "hetconv", "parts": 3},
                "topology=hetconv,parts=4,seed=0": {"topology": "hetconv"},
                "topology=cross,seed=0": {"topology": "cross"},
            },
        ),
        (
            'topology = ["cross", "learned"]\nin_block = [8, 32]\nshapes = ["free", "rigid"]\ndensity = 0.3',
            {
                "topology=cross,seed=0": {"topology": "cross"},
                **{
                    f"topology=learned,in_block={block},shapes={shapes},density=0.3,seed=0": {
                        "in_block": block,
                        "shapes": shapes,
                        "density": 0.3,
                    }
                    for block in (8, 32)
                    for shapes in ("free", "rigid")
                },
            },
        ),
        (
            'topology = ["learned", "1xn"]\npenalty = ["macs", "weights"]\neffect_lr = [1.0, 2.0]',
            {
                **{
                    f"topology=learned,penalty={penalty},effect_lr={rate},seed=0": {
                        "penalty": penalty,
                        "effect_lr": rate,
                    }
                    for penalty in ("macs", "weights")
                    for rate in (1.0, 2.0)
                },
                "topology=1xn,seed=0": {"topology": "1xn"},
            },
        ),
        (
            'topology = "pruned"\nstart = ["random", "twin"]\ndensity = [0.1, 0.2]\nmac_budget = 0.2\n'
            "mac_share = [0.01, 0.5]\nshapes = ['free', 'rigid']",
            {
                f"topology=pruned,density={density},mac_budget=0.2,seed=0": {
                    "topology": "pruned",
                    "density": density,
                    "mac_budget": 0.2,
                }
                for density in (0.1, 0.2)
            },
        ),
        (
            'density = [0.1, "none"]\nmac_share = [0.01, 0.5]\nout_block = [8]',
            {
                "density=0.1,mac_share=0.01,out_block=8,seed=0": {"out_block": 8},
                "density=0.1,mac_share=0.5,out_block=8,seed=0": {"mac_share": 0.5, "out_block": 8},
                "density=none,out_block=8,seed=0": {"density": None, "out_block": 8},
            },
        ),
    ],
)
def test_settings_that_mean_nothing_beside_the_others_make_no_run(spec, text, wanted):
    runs = read_ablation(spec(f"[[grid]]\n{text}"))
    assert runs == {name: TrainConfig(**settings) for name, settings in wanted.items()}


def test_what_means_nothing_keeps_the_value_of_the_base_if_that_goes_with_the_topology(spec):
    base = 'parts = 3\nin_block = 8\npenalty = "macs"'
    runs = read_ablation(spec(f'[base]\n{base}\n[[grid]]\ntopology = "cross"\nin_block = [4, 16]'))
    assert runs == {"topology=cross,seed=0": TrainConfig(topology="cross", parts=3, in_block=8)}


@pytest.mark.parametrize("name", HANDCRAFTED)
def test_parts_mean_something_for_the_topologies_that_are_said_to_have_them(name):
    conv = torch.nn.Conv2d(24, 24, 3)
    one, other = (handcrafted(name, conv, parts=parts).block_mask for parts in (2, 3))
    assert torch.equal(one, other) is (name not in meaning.WITH_PARTS)


def test_without_grid_and_seeds_the_base_is_trained_alone(spec):
    assert read_ablation(spec("[base]\nseed = 7\nlr = 0.2")) == {"seed=7": TrainConfig(seed=7, lr=0.2)}


def test_names_of_folders_are_plain_and_distinct(spec):
    text = '[[grid]]\ndata = "folder"\ndata_folder = ["a/b", "a:b", "../a"]\n'
    names = list(read_ablation(spec(text)))
    assert len(set(names)) == 3
    assert not any(character in name for name in names for character in "/: ")
    long = f"[[grid]]\nwidths = [[{', '.join(['32'] * 60)}], [{', '.join(['32'] * 61)}]]\n"
    first, second = read_ablation(spec(long))
    assert first != second
    assert len(first) == len(second) < 140


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base", "spec.toml"),
        (f"a = {'[' * 5000}", "nested too deeply"),
        ("[bases]\nlr = 1", "'bases' is not one of seeds, base, grid"),
        ("base = 3", "base is no table"),
        ("[grid]\nlr = [0.1]", "grid is no list of tables"),
        ("seeds = 3", "seeds is 3"),
        ("seeds = []", "seeds is"),
        ("seeds = [-1]", "seed"),
        ("[[grid]]\nseed = [1, 2]", "seed is in a grid"),
        ("grid = []", "grid is no list of tables"),
        ("[[grid]]\nlr = 0.1\nout_block = []", "out_block in a grid is an empty list"),
        ('[[grid]]\ntopology = ["learned", "cross"]\nparts = [4, 0]', "parts 0"),
        ('[[grid]]\ntopology = "cross"\nout_block = -1', "out_block"),
        ('[[grid]]\ntopology = "cross"\npenalty = "time"', "penalty 'time'"),
        ('[[grid]]\ntopology = "crass"\nparts = 3', "topology 'crass'"),
        ("[[grid]]\nout_blok = 16", "out_blok"),
        ('[[grid]]\nshapes = ["free", "round"]', "round"),
        ("[[grid]]\nlr = 2020-01-01", "spec.toml"),
        ('[base]\npreset = "tiny"', "preset 'tiny'"),
        (f"[[grid]]\nlr = {list(range(1, 9))}\nwarmup_epochs = {list(range(1, 11))}\nseeds = 1", "seeds"),
        (f"seeds = {list(range(1001))}", "more than 1000 runs"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(spec, text, message):
    with pytest.raises(ValueError, match=message) as refused:
        read_ablation(spec(text))
    assert "spec.toml" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.toml"):
        read_ablation(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("change", "shares"),
    [
        ({"out_block": 64}, True),
        ({"topology": "depthwise"}, True),
        ({"penalty": "macs"}, True),
        ({"fine_lr": 0.01}, True),
        ({"lr": 0.2}, False),
        ({"fine_epochs": 7}, False),
        ({"seed": 1}, False),
        ({"width": 0.5}, False),
    ],
)
def test_what_concerns_the_topology_alone_does_not_change_the_dense_twin(change, shares):
    base = TrainConfig()
    assert (dense_part(replace(base, **change)) == dense_part(base)) is shares


def test_runs_of_a_seed_share_the_dense_twin_of_the_first(spec, tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(ablation, "train", lambda config, folder: trained.append((config, folder)))
    said = []
    runs = read_ablation(spec(SPEC))
    folders = run_ablation(runs, tmp_path / "out", said.append).folders
    assert [folder.name for folder in folders] == list(runs)
    assert said[2] == f"run 3 of 10: {folders[2].name}"
    twins = [["train"] + 4 * [str(folders[first])] for first in (0, 5)]
    assert [config.dense_twin for config, _ in trained] == twins[0] + twins[1]
    kept = {**runs, "alone": replace(TrainConfig(), dense_twin="none")}
    trained.clear()
    run_ablation(kept, tmp_path / "out", said.append)
    assert trained[-1][0].dense_twin == "none"


def test_the_command_line_names_the_runs_without_training(spec, run):
    assert json.loads(run("ablate", spec(SPEC), "--dry-run", "--json").stdout)["runs"] == list(
        read_ablation(spec(SPEC))
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'seeds = [0, 1]\n[[grid]]\ntopology = ["learned", "groupwise"]\nparts = [4, 5]',
            "2 of 6 runs cannot be trained; the first is topology=groupwise,parts=5,seed=0: no convolution "
            "of VGG suits the topology 'groupwise': features.3: 32 input channels",
        ),
        (
            '[[grid]]\nnetwork = ["vgg16"]\nimage_size = [32, 28]',
            "1 of 2 runs cannot be trained; the first is network=vgg16,image_size=28,seed=0",
        ),
        (
            '[[grid]]\ndata = ["imagenet", "cifar100"]\ndata_folder = "nowhere"\nnetwork = "vgg19"\n'
            "image_size = [16, 64]",
            "2 of 4 runs cannot be trained; the first is data=imagenet,data_folder=nowhere,network=vgg19,"
            "image_size=16",
        ),
        (
            '[[grid]]\ntopology = "pruned"\ndensity = [0.5, 0.01]',
            "1 of 2 runs cannot be trained; the first is topology=pruned,density=0.01,seed=0: topology "
            "pruned cannot come down to 0.01 of the weights",
        ),
    ],
)
def test_a_dry_run_refuses_what_cannot_be_built(spec, run, text, message):
    done = run("ablate", spec(text), "--dry-run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"lhc-triton: {message}")
    assert len(done.stderr.splitlines()) == 1


def test_what_a_dry_run_checks_is_what_the_data_will_be():
    for settings in ({}, {"image_size": 32}):
        config = TrainConfig(**settings)
        data = open_data(config.data, image_size=config.image_size)
        found = ablation._image_format(config)
        assert (found.channels, found.size) == (data.format.channels, data.format.size)


def test_under_torchrun_the_first_process_alone_reports(spec, tmp_path, monkeypatch, run):
    monkeypatch.setattr(ablation, "train", lambda config, folder: None)
    done = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        done[rank] = run("ablate", spec(SPEC), "--out", tmp_path)
    assert (done["1"].returncode, done["1"].stdout, done["1"].stderr) == (0, "", "")
    assert done["0"].returncode == 2  # there is nothing to report on: nothing was trained
    assert "run 1 of 10" in done["0"].stderr


TINY = """
[base]
widths = [4, "M", 16, "M", 16]
train_images = 100
validation_images = 20
in_block = 8
density = 0.3
coarse_epochs = 2
fine_epochs = 1
batch_size = 20
augmentation = "none"

[[grid]]
topology = ["learned", "cross"]
"""


@pytest.mark.parametrize("error", [OSError("disk full"), ConnectionError("lost"), KeyboardInterrupt()])
def test_what_is_no_fault_of_a_run_ends_the_ablation(spec, tmp_path, monkeypatch, error):
    trained = []

    def train(config, folder):
        trained.append(folder)
        raise error

    monkeypatch.setattr(ablation, "train", train)
    with pytest.raises(type(error)):
        run_ablation(read_ablation(spec(SPEC)), tmp_path, lambda line: None)
    assert len(trained) == 1


def test_a_run_that_does_not_fit_into_memory_lets_the_others_go_on(spec, tmp_path, monkeypatch):
    def train(config, folder):
        if config.out_block == 64:
            raise MemoryError("no memory for steps of 64 images")

    monkeypatch.setattr(ablation, "train", train)
    trained = run_ablation(read_ablation(spec(SPEC)), tmp_path, lambda line: None)
    assert (len(trained.folders), len(trained.failures)) == (6, 4)


@pytest.fixture
def fail_in(monkeypatch):
    """Let runs of one topology fail in an epoch of a stage, as those do whose loss is not finite."""

    def patch(topology, *epoch):
        def failing(trainee, training, config, plan, *others):
            if (config.topology, plan.stage, plan.epoch) == (topology, *epoch):
                raise ValueError("the loss\nbecame nan")
            return train_epoch(trainee, training, config, plan, *others)

        monkeypatch.setattr(epochs, "train_epoch", failing)

    return patch


THREE = TINY.replace('"cross"', '"cross", "pointwise"')


@pytest.mark.parametrize(
    ("epoch", "twins"),
    [
        (("dense", 0), ["train", "topology=cross,seed=0"]),
        (("dense", 2), []),
        (("coarse", 0), ["topology=learned,seed=0"] * 2),
    ],
)
def test_a_run_that_fails_lets_the_others_go_on(spec, tmp_path, fail_in, epoch, twins):
    runs = read_ablation(spec(THREE))
    fail_in("learned", *epoch)
    for _ in range(2):  # the second time on what the first one has left
        said, failed = [], []
        trained = run_ablation(runs, tmp_path, said.append, failed.append)
        assert list(trained.folders) == [tmp_path / name for name in list(runs)[1:]][: len(twins)]
        used = [read_config(folder / "config.toml").dense_twin for folder in trained.folders]
        assert used == [twin if twin == "train" else str(tmp_path / twin) for twin in twins]
        why = "it needs the dense twin of run topology=learned,seed=0, which failed before that was trained"
        reasons = ["the loss became nan", *([] if twins else [why, why])]
        assert list(trained.failures.values()) == reasons
        assert failed == [f"run {name} failed: {reason}" for name, reason in trained.failures.items()]
        assert len(said) == 3


def test_a_twin_that_took_the_place_of_a_failed_one_stays(spec, tmp_path, fail_in):
    runs = read_ablation(spec(TINY))
    fail_in("learned", "dense", 0)
    assert len(run_ablation(runs, tmp_path, lambda line: None).folders) == 1
    fail_in("nothing")
    assert len(run_ablation(runs, tmp_path, lambda line: None).folders) == 2


def test_the_command_line_reports_on_what_finished_and_lists_what_failed(spec, tmp_path, fail_in, run):
    command = "ablate", spec(TINY), "--out", tmp_path, "--batch", 1, "--json"
    fail_in("learned", "dense", 1)
    done = run(*command)
    assert (done.returncode, done.stdout) == (1, "")
    assert "2 of 2 runs failed:\n- topology=learned,seed=0: the loss became nan\n- " in done.stderr
    assert not (tmp_path / "report").exists()
    fail_in("cross", "fine", 0)
    done = run(*command)
    assert done.returncode == 1
    found = json.loads(done.stdout)["experiments"]
    assert [run["run"] for experiment in found for run in experiment["runs"]] == ["topology=learned,seed=0"]
    assert "run topology=cross,seed=0 failed: the loss became nan\n" in done.stderr
    assert done.stderr.endswith("1 of 2 runs failed:\n- topology=cross,seed=0: the loss became nan\n")


def test_one_command_trains_resumes_and_reports(spec, tmp_path, run):
    out = tmp_path / "out"
    names = ["topology=learned,seed=0", "topology=cross,seed=0"]

    def ablate():
        done = run("ablate", spec(TINY), "--out", out, "--batch", 1, "--json")
        assert not done.returncode
        return json.loads(done.stdout)["experiments"], [
            (out / name / "metrics.csv").read_bytes() for name in names
        ]

    found, curves = ablate()
    assert [experiment["label"] for experiment in found] == ["topology learned", "topology cross"]
    runs = [run for experiment in found for run in experiment["runs"]]
    assert [run["run"] for run in runs] == names
    assert len({run["dense_accuracy"] for run in runs}) == 1
    for row in runs:
        result = json.loads((out / row["run"] / "result.json").read_text())
        for name in ("weight_reduction", "mac_reduction"):
            assert row[name] == pytest.approx(result[name])
    assert [b"dense,2," in curve for curve in curves] == [True, False]
    crosses = {shape for layer in runs[1]["layers"] for shape in layer["shapes"]}
    assert crosses == {"010/111/010"}
    assert (out / "report" / "report.html").stat().st_size > 10_000
    (out / names[1] / "result.json").unlink()  # as a kill before the end would
    again, same = ablate()
    assert same == curves
    assert [e["mean"] for e in again] == [e["mean"] for e in found]
