"""Rows: checked when read back, summed up under the wanted densities."""

import csv
import json
from dataclasses import asdict, replace

import pytest

from lhc_bench.measure import rows

ROW = rows.Row(
    "m/a", "m", "a", "cpu", "float32", 1, 64, 64, 3, 1, 8, 8, 0.0556, 32, 16,
    "torch", "eager contiguous", 200.0, 100.0, 90.0, 110.0, 2.0, 10.0, 1e-7, 0,
)  # fmt: skip


def write(folder, **change):
    made = rows.Results({"densities": [0.05]}, (ROW,), rows.summarise([ROW])).to_dict()
    path = folder / "results.json"
    path.write_text(json.dumps({**made, **change}))
    return path


def test_results_come_back_as_they_were_written(tmp_path):
    results = rows.Results({"densities": [0.05]}, (ROW,), rows.summarise([ROW]))
    as_json, as_csv = rows.write_results(tmp_path, results)
    assert rows.read_results(as_json) == results
    table = list(csv.DictReader(as_csv.read_text().splitlines()))
    assert [set(line) for line in table] == [set(asdict(ROW))]


def test_the_summary_is_the_geometric_mean_under_the_wanted_density():
    found = rows.summarise([ROW, replace(ROW, speedup=0.125)], densities=[0.05, 0.1])
    assert found["geomean_speedup"]["torch"] == {"0.05": pytest.approx(0.5)}
    assert (found["wins"], found["losses"]) == (1, 1)
    assert rows.summarise([]) == {"geomean_speedup": {}, "wins": 0, "losses": 0, "groups": []}


def test_the_summary_keeps_block_sizes_apart_and_names_the_least_gain():
    slow = replace(ROW, case="m/slow", speedup=0.5, time_us=400.0, peak_share=0.1)
    found = rows.summarise([replace(ROW, peak_share=0.4), slow, replace(ROW, out_block=64)], densities=[0.05])
    narrow, wide = found["groups"]
    assert (narrow["in_block"], narrow["out_block"], narrow["density"], narrow["cases"]) == (32, 16, 0.05, 2)
    assert narrow["speedup"] == pytest.approx(1.0)
    assert (narrow["worst_case"], narrow["worst_speedup"]) == ("m/slow", 0.5)
    assert narrow["floor_share"] == pytest.approx((10 / 100 * 10 / 400) ** 0.5)
    assert narrow["peak_share"] == pytest.approx(0.2)
    assert (wide["out_block"], wide["peak_share"]) == (64, None)


def test_a_file_from_before_the_later_columns_is_read(tmp_path):
    later = ("gmacs", "peak_share", "memory_mb", "baseline_memory_mb", "threads")
    old = {name: value for name, value in asdict(ROW).items() if name not in later}
    (row,) = rows.read_results(write(tmp_path, rows=[old])).rows
    assert row == ROW
    assert all(getattr(row, name) is None for name in later)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speedup": 0.0}, "row 0: speedup is 0.0, expected a number above 0"),
        ({"time_us": float("nan")}, "NaN is not a number that JSON has"),
        ({"batch": 1.5}, "row 0: batch is 1.5, expected an integer"),
        ({"density": 1.5}, r"row 0: density is 1.5, expected a share in \(0, 1\]"),
        ({"backend": None}, "row 0: backend is None, expected a text"),
        ({"peak_share": "most"}, "row 0: peak_share is 'most', expected a number"),
        ({"threads": 0}, "row 0: threads is 0, expected a number above 0"),
    ],
)
def test_a_damaged_row_is_refused_with_the_file_and_the_field(tmp_path, change, message):
    path = write(tmp_path, rows=[{**asdict(ROW), **change}])
    with pytest.raises(ValueError, match=message) as caught:
        rows.read_results(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_that_lacks_a_field_or_broken_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 0 lacks"):
        rows.read_results(write(tmp_path, rows=[{"case": "m/a"}]))
    broken = tmp_path / "broken.json"
    broken.write_text('{"env": ')
    with pytest.raises(ValueError, match=r"broken\.json is not a results file"):
        rows.read_results(broken)
    for text, problem in (
        ('{"env": {}, "env": {}}', "'env' is there twice"),
        ("[" * 10**5, "nested too deep"),
    ):
        broken.write_text(text)
        with pytest.raises(ValueError, match=problem):
            rows.read_results(broken)


def test_the_environment_names_device_versions_and_commit():
    env = rows.environment(suite="quick")
    assert env["device"]
    assert env["versions"]["torch"]
    assert {"threads", "clock_mhz", "commit", "command", "suite"} <= env.keys()
