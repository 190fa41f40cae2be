"""The suite of loading, on few small pictures with a timer that takes every batch once."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lhc_bench.measure import loading
from lhc_bench.measure.rows import environment, write_document
from lhc_bench.pictures import drawing
from lhc_triton.runtime.choosing.timing import Timing

DECODE = loading.LoadingRow("decode", "decode", "none", 60, 40, 1, 8, 0, 100.0, 90.0, 110.0, 1.0)
TRAIN = replace(DECODE, case="train/0 workers", kind="train", augmentation="standard")


@pytest.fixture
def tiny(monkeypatch):
    for name, value in {"PICTURES": 16, "WIDTH": 60, "HEIGHT": 40, "WORKERS": (0, 1)}.items():
        monkeypatch.setattr(loading, name, value)


def once(calls, rounds, warmup, device, budget_s):
    for call in calls.values():
        call()
    return {name: Timing((1e6 * (1 + place),) * rounds) for place, name in enumerate(calls)}


@pytest.mark.usefixtures("tiny")
def test_the_suite_writes_a_row_for_each_kind_and_number_of_workers(tmp_path):
    seen = []
    found = loading.run_loading(tmp_path, lambda *step: seen.append(step), timer=once)
    results = loading.read_loading(tmp_path / "results.json")
    assert results.to_dict() == found
    assert [row.case for row in results.rows] == [
        "decode", "train/0 workers", "train/1 workers", "evaluation/0 workers", "evaluation/1 workers",
        "memory/0 workers",
    ]  # fmt: skip
    decode, train, memory = results.rows[0], results.rows[1], results.rows[-1]
    assert (decode.images_per_s, decode.width, decode.height) == (16.0, 60, 40)  # 16 images, one second
    assert (train.images_per_s, train.decode_share, train.width) == (8.0, 0.5, 224)
    assert (memory.images, memory.width, memory.decode_share) == (12_000, 28, None)
    assert found["summary"]["kinds"]["train"] == {"images_per_s": 8.0, "workers": 0, "scaling": 1.0}
    assert found["env"]["pictures"]["files"] == 16
    assert (tmp_path / "results.csv").read_text().splitlines()[0].startswith("case,kind,augmentation")
    assert seen[15] == (16, 16, "photographs")
    assert [label for *_, label in seen[16:]] == [*(row.case for row in results.rows), "done"]


@pytest.mark.usefixtures("tiny")
def test_passes_take_the_batches_that_training_and_evaluation_take(tmp_path, monkeypatch):
    taken = {}

    def watched(case, source, seed):
        original = type(source).batches

        def batches(self, steps, **options):
            taken[case.name] = (torch.cat(list(steps)).tolist(), options["augmentation"], options["workers"])
            yield from original(self, steps, **options)

        with monkeypatch.context() as patch:
            patch.setattr(type(source), "batches", batches)
            deliver(case, source, seed)

    deliver = loading._deliver
    monkeypatch.setattr(loading, "_deliver", watched)
    loading.run_loading(tmp_path, timer=once)
    order, *options = taken["train/1 workers"]
    assert options == ["standard", 1]
    assert order != list(range(16))
    assert sorted(order) == list(range(16))
    assert taken["evaluation/0 workers"] == (list(range(16)), "none", 0)
    assert taken["train/0 workers"][0] == order


@pytest.mark.usefixtures("tiny")
def test_rates_fall_where_times_rise(tmp_path):
    def spread(calls, **options):
        return {name: Timing((1e6, 2e6, 4e6)) for name in calls}

    row = loading.run_loading(tmp_path, timer=spread, only="evaluation")["rows"][1]
    assert (row["kind"], row["images_per_s"]) == ("evaluation", 8.0)
    assert 4 < row["p20_images_per_s"] < 8 < row["p80_images_per_s"] < 16


def test_pictures_compress_like_photographs(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "PICTURES", 8)
    files = loading.make_photographs(tmp_path, seed=0, threads=2)
    assert len(files) == 8
    assert len({file.parent for file in files}) == 8
    bits = [8 * file.stat().st_size / (loading.WIDTH * loading.HEIGHT) for file in files]
    assert 3.5 < min(bits) <= max(bits) < 5.5  # those of ImageNet have about 4.7 a pixel
    pixels = [np.asarray(Image.open(file), dtype=float) for file in files]
    assert pixels[0].shape == (loading.HEIGHT, loading.WIDTH, 3)
    assert all(40 < image.std() < 90 for image in pixels)
    assert np.abs(pixels[0] - pixels[1]).mean() > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"only": "paper"},
            "no case of suite 'loading' has 'paper' in its name; the cases are train/0 workers",
        ),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        loading.run_loading(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_pictures_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "make_photographs", lambda *arguments: pytest.fail("too late"))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match="cannot be a folder"):
        loading.run_loading(tmp_path / "out")


def written(folder, *rows, **env):
    document = loading.LoadingResults({**environment(suite="loading"), **env}, rows, {}).to_dict()
    return write_document(folder, document, list(document["rows"][0]))[0]


@pytest.mark.parametrize(
    "rows",
    [
        (DECODE,),
        (DECODE, TRAIN, replace(TRAIN, workers=2, images_per_s=105.0)),
        (DECODE, replace(TRAIN, kind="evaluation"), replace(TRAIN, kind="memory", decode_share=None)),
    ],
    ids=["decoding alone", "one kind", "others"],
)
def test_the_picture_is_drawn_from_the_file(tmp_path, rows):
    path = written(tmp_path, *rows, cpus=2, rounds=5)
    (picture,) = drawing.draw(path, tmp_path / "out")
    assert picture.name == "loading.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_ideal_is_bare_decoding_on_each_thread_up_to_the_cpus():
    from lhc_bench.pictures.loading_curves import loading_figure

    rows = (DECODE, *(replace(TRAIN, workers=count) for count in (0, 1, 2, 4)))
    figure = loading_figure(loading.LoadingResults({"cpus": 2}, rows, {}))
    ideal = figure.axes[0].get_lines()[0]
    assert list(ideal.get_ydata()) == [100, 100, 200, 200]


@pytest.mark.parametrize(
    ("changes", "env", "message"),
    [
        ({"kind": "train"}, {"cpus": 2}, 'one row of the kind "decode"'),
        ({"kind": "nothing"}, {"cpus": 2}, "row 0: kind is 'nothing'"),
        ({"images_per_s": 0}, {"cpus": 2}, "row 0: images_per_s is 0, expected a number above 0"),
        ({"images_per_s": 120}, {"cpus": 2}, "row 0: images_per_s is not from p20_images_per_s to p80"),
        ({"workers": 0.5}, {"cpus": 2}, r"row 0: workers is 0\.5, expected an integer"),
        ({}, {}, '"cpus" in "env" is None'),
    ],
)
def test_a_damaged_file_is_named_and_no_folder_is_made(tmp_path, changes, env, message):
    path = written(tmp_path, DECODE, **env)
    document = json.loads(path.read_text())
    document["rows"][0] |= changes
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"results\.json .*{message}"):
        drawing.draw(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
