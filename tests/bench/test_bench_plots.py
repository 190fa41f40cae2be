"""Pictures come from a results file only."""

import json
from dataclasses import replace

import pytest

from lhc_bench import plots, rows

ROW = rows.Row(
    "m/a", "m", "a", "cpu", "float32", 1, 64, 64, 3, 1, 8, 8, 0.1, 32, 16,
    "torch", "eager contiguous", 200.0, 100.0, 90.0, 110.0, 2.0, 10.0, 1e-7, 0,
)  # fmt: skip


def test_both_pictures_are_drawn(tmp_path):
    made = (ROW, replace(ROW, density=0.5, speedup=0.8), replace(ROW, case="m/b", layer="b", out_block=64))
    path, _ = rows.write_results(tmp_path, rows.Results({"rounds": 3}, made, rows.summarise(made)))
    found = plots.draw(path, tmp_path / "out")
    assert [picture.name for picture in found] == ["speedup.png", "layers.png"]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in found)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        plots.draw(tmp_path / "nowhere.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"env": {}, "rows": [{}], "summary": {}}'])
def test_a_damaged_file_is_named_and_no_folder_is_made(tmp_path, text):
    path = tmp_path / "damaged.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"damaged\.json"):
        plots.draw(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_without_rows_is_refused(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"env": {}, "rows": [], "summary": {}}))
    with pytest.raises(ValueError, match="holds no rows"):
        plots.draw(path, tmp_path / "out")
