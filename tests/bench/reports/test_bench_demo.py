"""The demo on CIFAR-10, on images made for it; on the packaged ones `make demo` runs it."""

import json
import sys
from pathlib import Path

import pytest

from lhc_bench.pictures.demo_bars import draw_speedup
from lhc_bench.reports.demo import run_demo

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training"))

from dataset_files import write_cifar


def test_the_demo_runs_vgg16_where_cifar10_is_given(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", binary=True, packed=False)
    stages: list[str] = []
    report = run_demo(tmp_path / "out", batch=4, rounds=1, progress=stages.append, cifar10=folder)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert (report["data"], len(report["layers"])) == ("cifar10", 12)
    assert report["weight_reduction"] > 9.9
    # Of the layers as they were learned, dead channels included, for a batch.
    assert sum(row["macs"] for row in report["layers"]) == 4 * report["macs"]
    assert sum(row["live_macs"] for row in report["layers"]) == 4 * report["live_macs"]
    assert all(row["dense_us"] > 0 and row["lhc_us"] > 0 for row in report["layers"])
    assert "classify 20 test images with both" in stages
    for name in ("speedup.png", "topology.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_a_batch_needs_as_many_test_images(tmp_path):
    folder = write_cifar(tmp_path, "cifar10", binary=True, packed=False)
    with pytest.raises(ValueError, match="batch is 64; there are 20 test images"):
        run_demo(tmp_path / "out", cifar10=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "ticks", "label"),
    [
        (("features.3", "features.7"), ["3", "7"], "features.*"),
        (("layer1.0.conv1", "layer2.0.conv1"), ["layer1.0.conv1", "layer2.0.conv1"], ""),
        (("first", "second"), ["first", "second"], ""),
    ],
)
def test_what_all_layers_names_begin_with_is_said_once(names, ticks, label, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lhc_bench.pictures.demo_bars.write_figure", lambda path, figure, **how: drawn.append(figure)
    )
    row = {"dense_us": 4.0, "lhc_us": 2.0, "macs": 8, "live_macs": 2, "backend": "native"}
    report = {
        "layers": [{**row, "layer": name} for name in names],
        "times_us": {name: {"p20": 1.0, "median": 2.0, "p80": 3.0} for name in ("dense", "lhc")},
        "speedup": 2.0,
        "lhc_accuracy": 0.5,
        "dense_accuracy": 0.5,
        "device": "CPU",
        "threads": 1,
        "dtype": "float32",
        "batch": 1,
        "rounds": 1,
    }
    draw_speedup(report, tmp_path / "speedup.png")
    axis = drawn[0].axes[1]
    assert [text.get_text() for text in axis.get_xticklabels()] == [f"{tick}\nnative" for tick in ticks]
    assert axis.get_xlabel() == label
