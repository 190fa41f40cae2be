"""Reports on runs: what is read is checked, what is counted is right, the page stands alone."""

import json
import random
import re
import shutil
import statistics

import pytest
import torch
from fabricated_runs import fabricated_run

from lhc_bench.measure import peers
from lhc_bench.reports import experiment_rows
from lhc_bench.reports.experiment_pictures import pareto
from lhc_bench.reports.experiment_rows import describe, experiments, labels, with_measured
from lhc_bench.reports.page import RESULTS
from lhc_bench.reports.report import make_report
from lhc_bench.reports.runs import read_run, run_folders
from lhc_triton.cli.console import show_experiments
from lhc_triton.models import load_network, save_network
from lhc_triton.models.architecture import Architecture

SETTINGS = ({"seed": 0}, {"seed": 1}, {"out_block": 16}, {"density": 0.5, "dense_twin": "gone/<i>"})
NAMES = ("run0", "run1", "<b>", "run3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of one setting, and two other settings; one of them from before layers.csv."""
    here = tmp_path_factory.mktemp("runs")
    return [
        fabricated_run(here / NAMES[number], with_layers=number != 2, **settings)
        for number, settings in enumerate(SETTINGS)
    ]


@pytest.fixture(scope="module")
def reported(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return out, make_report(folders, out, batch=2)


@pytest.fixture
def run_folder(tmp_path):
    return fabricated_run(tmp_path / "run")


def test_a_run_is_read_as_it_was_written(folders):
    run = read_run(folders[1])
    assert (run.name, run.config.seed, run.seconds) == ("run1", 1, 12.5)
    assert [row["stage"] for row in run.epochs] == ["dense"] * 5 + ["coarse"] * 3 + ["fine"] * 2
    assert {row["layer"] for row in run.layers} == {"features.3", "features.7"}
    assert all(0.5 <= row["correlation"] <= 1 for row in run.layers)
    assert run.notes == ()
    assert "layers.csv" in read_run(folders[2]).notes[0]


def test_a_run_from_before_a_setting_has_its_default(run_folder, folders, tmp_path):
    path = run_folder / "config.toml"
    path.write_text(re.sub(r"(?m)^(mac_share|effect_lr) = .*\n", "", path.read_text()))
    result = json.loads((run_folder / "result.json").read_text())
    (run_folder / "result.json").write_text(json.dumps({**result, "settings": {"topology": "learned"}}))
    assert read_run(run_folder).config == read_run(folders[0]).config
    assert "mac_share" not in path.read_text()
    report = make_report([run_folder, folders[1]], tmp_path / "out", batch=1)
    assert [len(experiment.rows) for experiment in report.experiments] == [2]


@pytest.mark.parametrize(
    "name", ["config.toml", "result.json", "metrics.csv", "lhc.safetensors", "dense.safetensors"]
)
def test_a_missing_file_is_named(run_folder, name):
    (run_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        read_run(run_folder)


@pytest.mark.parametrize(
    ("name", "found", "put", "message"),
    [
        ("config.toml", "density = 0.3", "density = 3", "density"),
        ("config.toml", "seed = 0", "sead = 0", "sead"),
        ("result.json", "}", "", "not JSON"),
        ("result.json", '"seconds": 12.5', '"seconds": -1', "seconds"),
        ("result.json", '"seconds": 12.5', '"seconds": NaN', "NaN is not a number"),
        ("result.json", '"seconds": 12.5', '"seconds": 1, "seconds": 2', "'seconds' is there twice"),
        ("result.json", '"seconds": 12.5', '"seconds": 1' + "0" * 400, "seconds"),
        ("result.json", '"lhc_accuracy": 0', '"lhc_accuracy": 9', "lhc_accuracy"),
        ("result.json", '"density_reached": false', '"density_reached": 0', "density_reached"),
        ("metrics.csv", "val_accuracy", "accuracy", "val_accuracy"),
        ("metrics.csv", "\ndense,1,", "\ndense,one,", "line 3: epoch"),
        ("metrics.csv", ",1.0,1.0,0.", ",nan,1.0,0.", "line 2: density"),
        ("metrics.csv", ",1.0,1.0,0.", ",1.5,1.0,0.", "line 2: density"),
        ("metrics.csv", "\ndense,1,", "\ndense,1" + "0" * 400 + ",", "line 3: epoch"),
        ("metrics.csv", "\ndense,1,", "\n" + "d" * 200_000 + ",1,", "not CSV (field larger"),
        ("layers.csv", "correlation", "relation", "correlation"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(run_folder, name, found, put, message):
    path = run_folder / name
    text = path.read_text()
    assert found in text
    path.write_text(text.replace(found, put, 1))
    with pytest.raises(ValueError, match=rf"(?s){re.escape(name)}.*{re.escape(message)}"):
        read_run(run_folder)


def test_weights_that_are_no_network_are_named(run_folder):
    (run_folder / "lhc.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"lhc\.safetensors"):
        describe(read_run(run_folder), 1)


def test_weights_of_a_dense_network_are_named(run_folder):
    shutil.copy(run_folder / "dense.safetensors", run_folder / "lhc.safetensors")
    with pytest.raises(ValueError, match=r"lhc\.safetensors: no layer of the network is converted"):
        describe(read_run(run_folder), 1)


def test_a_twin_of_another_shape_is_refused_before_anything_is_timed(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_rows, "measure", lambda *_: pytest.fail("timed"))
    other = fabricated_run(tmp_path / "run", seed=5)
    architecture = Architecture("small-vgg", (8, 16), "cifar", 1, 10, 28)
    save_network(architecture.build(), other / "dense.safetensors", architecture)
    with pytest.raises(ValueError, match=r"dense\.safetensors: holds another network"):
        make_report([folders[0], other], tmp_path / "out", measure=True, batch=1)
    with pytest.raises(ValueError, match="same settings and seed"):
        make_report([folders[0], folders[0]], tmp_path / "out", measure=True, batch=1)
    assert not (tmp_path / "out").exists()


def test_structured_zeros_of_the_dense_first_layer_are_not_counted(folders, run_folder):
    path = run_folder / "lhc.safetensors"
    saved = load_network(path)
    with torch.no_grad():
        saved.model.get_submodule("features.0").weight[:, :, 0] = 0
    save_network(saved.model, path, saved.architecture, saved.training)
    row = describe(read_run(run_folder), 1)
    assert [topology.name for topology in row.topologies] == ["features.3", "features.7"]
    assert row.groups == describe(read_run(folders[0]), 1).groups


def test_counts_are_those_of_the_weights_that_are_left(folders):
    row = describe(read_run(folders[0]), 2)
    model = load_network(folders[0] / "lhc.safetensors").model
    sides = {"features.0": 28, "features.3": 28, "features.7": 14, "classifier": 1}
    weights = {name: model.get_submodule(name).weight for name in sides}
    live = {name: int((weight != 0).sum()) for name, weight in weights.items()}
    assert row.weights == sum(weight.numel() for weight in weights.values())
    assert row.live_weights == sum(live.values())
    assert row.macs == sum(weights[name].numel() * side**2 for name, side in sides.items())
    assert row.live_macs == sum(live[name] * side**2 for name, side in sides.items())
    converted = ("features.3", "features.7")
    assert row.density == sum(live[n] for n in converted) / sum(weights[n].numel() for n in converted)
    filters = [weights[name].flatten(1).unflatten(0, (-1, 8)).any(1) for name in converted]
    assert row.patterns == sum(len(torch.unique(groups, dim=0)) for groups in filters)
    assert row.groups == 4
    of_converted = sum(weights[n].numel() * sides[n] ** 2 for n in converted) / sum(
        live[n] * sides[n] ** 2 for n in converted
    )
    values = row.values
    assert values["weight_reduction"] == 1 / row.density
    assert values["mac_reduction"] == pytest.approx(of_converted)
    assert values["network_weight_reduction"] == row.weights / row.live_weights != 1 / row.density
    assert values["network_mac_reduction"] == row.macs / row.live_macs != pytest.approx(of_converted)


def test_the_tables_say_what_their_reductions_are_of(reported):
    out, report = reported
    text = (out / "report.html").read_text()
    found = report.experiments[1]
    for kind, of in (("weight", "weights"), ("mac", "MACs")):
        for name, where in (
            (f"{kind}_reduction", "converted layers"),
            (f"network_{kind}_reduction", "whole network"),
        ):
            place = re.findall(r"<th>(.*?)</th>", text).index(f"fewer {of}, {where}") - len(RESULTS)
            line = re.findall(r"<tr><td>out_block 16</td>.*</tr>", text)[1]
            assert re.findall(r"<td>(.*?)</td>", line)[place] == f"{found.mean(name):.2f}x"


def test_the_terminal_shows_the_reductions_of_the_converted_layers(reported, capsys):
    _, report = reported
    show_experiments([experiment.to_dict() for experiment in report.experiments])
    text, found = capsys.readouterr().out, report.experiments[1]
    line = next(line for line in text.splitlines() if line.split()[:2] == ["out_block", "16"])
    for name, form, factor in (
        ("gain", "+.2f", 100),
        ("weight_reduction", ".1f", 1),
        ("mac_reduction", ".1f", 1),
    ):
        assert f" {factor * found.mean(name):{form}} " in line
    assert "of the converted layers, times fewer" in text


def test_seeds_are_averaged_and_settings_kept_apart(reported):
    _, report = reported
    assert [experiment.label for experiment in report.experiments] == [
        "density 0.3, out_block 8", "out_block 16", "density 0.5"
    ]  # fmt: skip
    together = report.experiments[0]
    assert [row.run.config.seed for row in together.rows] == [0, 1]
    gains = [row.run.lhc_accuracy - row.run.dense_accuracy for row in together.rows]
    assert together.mean("gain") == pytest.approx(statistics.mean(gains))
    assert together.spread("gain") == pytest.approx(abs(gains[0] - gains[1]) / 2**0.5)
    assert report.experiments[1].spread("gain") is None
    assert report.experiments[1].mean("measured") is None


def test_the_same_run_twice_is_refused(folders):
    rows = [describe(read_run(folder), 1) for folder in (folders[0], folders[0])]
    with pytest.raises(ValueError, match="same settings and seed"):
        experiments(rows)


def test_the_front_holds_what_nothing_beats():
    chance = random.Random(3)
    points = [(chance.randrange(9), chance.randrange(9)) for _ in range(40)]

    def beaten(point):
        return any(x >= point[0] and y >= point[1] and (x, y) != point for x, y in points)

    assert pareto(points) == sorted({point for point in points if not beaten(point)})


def test_the_page_stands_alone_and_its_text_is_escaped(reported):
    out, report = reported
    text = (out / "report.html").read_text()
    pictures = sorted(path.name for path in out.glob("*.png"))
    own = [f"{n:02}_{kind}.png" for n in (1, 2, 3) for kind in ("layers", "shapes", "topology", "training")]
    assert pictures == [*own, "accuracy_cost.png", "accuracy_density.png", "accuracy_speedup.png"]
    assert text.count('src="data:image/png;base64,') == text.count("src=") == len(pictures)
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)
    assert "&lt;quick&gt;" in text
    assert "&lt;b&gt;: no layers.csv" in text
    assert "no curve of its dense twin: that of gone/&lt;i&gt; is not beside" in text
    assert not re.search(r"<(quick|b|i)>", text)
    assert "run0: trained on 1,234 images" in text
    assert "run3: the share of weights is not within 0.01 of the target 0.5" in text
    assert text.count("<td>–</td>") == len(report.experiments)  # the column of measured times


def test_the_json_holds_every_run(reported, folders):
    out, report = reported
    found = json.loads((out / "report.json").read_text())
    assert found["rounds"] == 0
    runs = [run for experiment in found["experiments"] for run in experiment["runs"]]
    assert sorted(run["run"] for run in runs) == sorted(folder.name for folder in folders)
    assert all(run["measured"] is None and run["predicted"]["cpu"]["lhc_us"] > 0 for run in runs)
    layer = runs[0]["layers"][1]
    assert sum(layer["shapes"].values()) <= layer["kernels"] == 4  # 2 groups x 2 input blocks
    assert found == json.loads(json.dumps(report.to_dict()))


def test_without_a_twin_there_is_no_dense_accuracy(tmp_path):
    folder = fabricated_run(tmp_path / "run", with_twin=False, dense_twin="none")
    report = make_report([folder], tmp_path / "out", batch=1)
    assert report.experiments[0].mean("dense_accuracy") is None
    assert report.experiments[0].mean("lhc_accuracy") is not None
    assert "small VGG" in report.experiments[0].label


@pytest.mark.parametrize("with_twin", [True, False])
def test_measured_is_the_whole_network_against_its_fastest_dense_form(tmp_path, monkeypatch, with_twin):
    monkeypatch.setattr(peers, "compiled_or_reason", lambda model, example: (None, "not in this test"))
    folder = fabricated_run(tmp_path / "run", with_twin=with_twin)
    row = with_measured(describe(read_run(folder), 2), 2, "cpu", 3)
    assert row.measured.source == ("dense, eager" if with_twin else "same network, dense")
    assert (row.measured.device, row.measured.dtype, row.measured.batch) == ("cpu", "float32", 2)
    assert row.values["measured"] == row.measured.dense_us / row.measured.lhc_us > 0


def test_a_dense_form_that_does_not_run_is_told_with_its_reason(folders, tmp_path, monkeypatch):
    resets = []
    monkeypatch.setattr(experiment_rows, "reset_compiler", lambda: resets.append(True))
    monkeypatch.setattr(peers, "compiled_or_reason", lambda model, example: (None, "of <this> test"))
    report = make_report(folders[:2], tmp_path, measure=True, batch=1, rounds=1)
    assert len(resets) == 2
    text = (tmp_path / "report.html").read_text()
    assert text.count("no dense, compiled: of &lt;this&gt; test") == 2
    run = report.to_dict()["experiments"][0]["runs"][0]
    assert run["measured_us"]["skipped"] == {"dense, compiled": "of <this> test"}


def test_other_images_are_another_experiment(tmp_path):
    runs = [
        read_run(fabricated_run(tmp_path / name, data="folder", data_folder=name, seed=seed))
        for seed, name in enumerate(("cats", "dogs"))
    ]
    assert labels(runs) == ["data_folder cats", "data_folder dogs"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": 1_000_000_000}, "batch is 1000000000"),
        ({"rounds": 0}, "rounds is 0"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"folders": []}, "no run"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_made(folders, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_report(**{"folders": folders, "out_dir": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_the_command_line_reports_and_refuses(folders, tmp_path, run):
    done = run("report", folders[0], "--out", tmp_path / "out", "--batch", 1, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())
    done = run("report", tmp_path / "nowhere")
    assert done.returncode == 2
    assert "nowhere" in done.stderr.splitlines()[-1]


def test_an_ablation_stands_for_its_runs_and_reports_are_left_out(tmp_path, run):
    runs = tmp_path / "runs"
    for name, seed in (("one", 0), ("grid/b", 1), ("grid/a", 2), ("grid/begun", 3)):
        fabricated_run(runs / name, seed=seed)
    (runs / "grid" / "begun" / "result.json").unlink()
    make_report([runs / "one"], runs / "grid" / "report", batch=1)
    make_report([runs / "one"], runs / "page", batch=1)
    said = []
    assert run_folders([runs / "page", runs / "one", runs / "grid"], said.append) == [
        runs / "one", runs / "grid" / "a", runs / "grid" / "b"
    ]  # fmt: skip
    assert said == [
        f"{runs / 'page'}: a report, left out",
        f"{runs / 'grid' / 'begun'}: a run that is not finished, left out",
    ]
    make_report([runs / "one"], runs / "one", batch=1)  # a run with its own report in it is a run
    make_report([runs / "one"], runs / "grid", batch=1)
    assert run_folders([runs / "one", runs / "grid"], said.append) == [
        runs / "one", runs / "grid" / "a", runs / "grid" / "b"
    ]  # fmt: skip

    def report(*folders):
        return run("report", *folders, "--out", tmp_path / "out", "--batch", 1, "--json")

    done = report(*sorted(runs.iterdir()))
    assert done.returncode == 0
    assert [run["run"] for run in json.loads(done.stdout)["experiments"][0]["runs"]] == ["one", "b", "a"]
    assert f"{runs / 'page'}: a report, left out" in done.stderr
    shutil.rmtree(runs / "grid" / "begun")
    done = report(*sorted(runs.glob("grid/*/")))
    assert done.returncode == 0
    assert f"{runs / 'grid' / 'report'}: a report, left out" in done.stderr
    done = report(runs / "page")
    assert (done.returncode, "no run to report on" in done.stderr) == (2, True)


def test_a_folder_without_a_run_is_an_error_beside_runs(folders, tmp_path):
    (tmp_path / "notes").mkdir()
    found = run_folders([folders[0], tmp_path / "notes", tmp_path / "gone"], pytest.fail)
    assert found == [folders[0], tmp_path / "notes", tmp_path / "gone"]
    with pytest.raises(FileNotFoundError, match=r"notes.config\.toml"):
        make_report(found[:2], tmp_path / "out", batch=1)
