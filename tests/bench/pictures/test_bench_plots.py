"""Pictures come from a results file only."""

import json
from dataclasses import replace

import pytest

from lhc_bench.measure import rows
from lhc_bench.pictures import drawing

ROW = rows.Row(
    "m/a", "m", "a", "cpu", "float32", 1, 64, 64, 3, 1, 8, 8, 0.1, 32, 16,
    "torch", "eager contiguous", 200.0, 100.0, 90.0, 110.0, 2.0, 10.0, 1e-7, 0,
)  # fmt: skip


def test_both_pictures_are_drawn(tmp_path):
    made = (ROW, replace(ROW, density=0.5, speedup=0.8), replace(ROW, case="m/b", layer="b", out_block=64))
    path, _ = rows.write_results(tmp_path, rows.Results({"rounds": 3}, made, rows.summarise(made)))
    found = drawing.draw(path, tmp_path / "out")
    assert [picture.name for picture in found] == ["speedup.png", "layers.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in found)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        drawing.draw(tmp_path / "nowhere.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def drawn(tmp_path, made):
    path, _ = rows.write_results(tmp_path, rows.Results({}, tuple(made), rows.summarise(made)))
    return [picture.name for picture in drawing.draw(path, tmp_path / "out")]


def test_layers_with_a_rate_get_the_picture_of_the_peak(tmp_path):
    layer = replace(ROW, peak_share=0.5)
    masks = [replace(layer, density=d, out_block=b) for d in (0.1, 0.5) for b in (16, 64, 128)]
    rivals = [replace(layer, backend="narrow"), replace(layer, backend="2:4", density=0.5)]
    assert drawn(tmp_path, [*masks, *rivals]) == ["speedup.png", "layers.png", "peak.png"]
    assert drawn(tmp_path, [replace(layer, kernel=0, stride=0)]) == ["speedup.png", "layers.png"]


def test_several_batches_or_threads_get_the_picture_of_scaling(tmp_path):
    network = replace(ROW, kernel=0, stride=0, threads=2)
    batches = [replace(network, batch=batch) for batch in (1, 8)]
    assert drawn(tmp_path, batches) == ["scaling.png"]
    assert drawn(tmp_path, [network, replace(network, threads=1, time_us=180.0)]) == ["scaling.png"]


@pytest.mark.parametrize("text", ["", "[]", '{"env": {}, "rows": [{}], "summary": {}}'])
def test_a_damaged_file_is_named_and_no_folder_is_made(tmp_path, text):
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"damaged\.json"):
        drawing.draw(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"env": {}, "rows": [], "summary": {}}))
    with pytest.raises(ValueError, match="holds no rows"):
        drawing.draw(path, tmp_path / "out")
