"""The file of measured times: shared, whole, and never fatal."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from op_problems import Problem

from lhc_triton.planning.schema import ConvGeometry
from lhc_triton.runtime.choosing.timing_store import TimingStore, default_path, layer_key

CPU = torch.device("cpu")


def test_times_are_kept_between_stores(tmp_path):
    path = tmp_path / "deep" / "times.json"
    TimingStore(path).put("k", {"torch": 12.5})
    TimingStore(path).put("k", {"dense": 30})
    TimingStore(path).put("other", {"dense": 1.0})
    assert TimingStore(path).get("k") == {"torch": 12.5, "dense": 30}
    assert TimingStore(path).get("unknown") == {}
    assert json.loads(path.read_text())["version"] == 2
    assert {p.name for p in path.parent.iterdir()} <= {"times.json", "times.json.lock"}


def test_a_missing_file_is_empty_and_is_not_made_by_reading(tmp_path):
    assert TimingStore(tmp_path / "a" / "b.json").get("k") == {}
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b'{"version": 1, "records": {}}',
        b'{"version": 2}',
        b'{"version": 2, "records": []}',
        b'{"version": 2, "records": {"k": 3}}',
        b'{"version": 2, "records": {"k": {"torch": ""}}}',
        b'{"version": 2, "records": {"k": {"torch": -3}}}',
        b'{"version": 2, "records": {"k": {"torch": true}}}',
        b'{"version": 2, "records": {"k": {"torch": NaN}}}',
        b"[" * 100_000,
    ],
    ids=lambda content: content[:40].decode(errors="replace"),
)
def test_a_corrupt_file_is_skipped_with_a_warning_and_replaced(tmp_path, content):
    path = tmp_path / "times.json"
    path.write_bytes(content)
    store = TimingStore(path)
    with pytest.warns(UserWarning, match=r"times\.json is skipped: .*; measured times start anew"):
        assert store.get("k") == {}
    with pytest.warns(UserWarning, match="is skipped"):
        store.put("k", {"torch": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get("k") == {"torch": 1.0}


ODD = [5e-324, 1e-300, 1e-4, 1e13, 1e300, 10**400]


@pytest.mark.parametrize("value", ODD)
def test_a_time_that_no_call_takes_is_skipped_and_the_others_stay(tmp_path, value):
    path = tmp_path / "times.json"
    records = {"k": {"torch": value, "dense": 3.0}, "other": {"dense": "failed"}}
    path.write_text(json.dumps({"version": 2, "records": records}))
    store = TimingStore(path)
    with pytest.warns(UserWarning, match=r"times\.json: 1 times are skipped, which are not from 0.001 to"):
        assert store.get("k") == {"dense": 3.0}
    with pytest.warns(UserWarning, match="are skipped"):
        store.put("k", {"torch": 1.0})
    assert store.read() == {"k": {"torch": 1.0, "dense": 3.0}, "other": {"dense": "failed"}}


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), *ODD])
def test_a_time_that_cannot_be_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="time of 'torch' is"):
        TimingStore(tmp_path / "t.json").put("k", {"torch": value})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TimingStore(tmp_path / "file" / "times.json").put("k", {"torch": 1.0})


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "times.json"
    store = TimingStore(path)
    store.put("k", {"torch": 1.0})
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.put("k", {"torch": 2.0})
    monkeypatch.undo()
    assert store.get("k") == {"torch": 1.0}
    assert {p.name for p in tmp_path.iterdir()} <= {"times.json", "times.json.lock"}


def test_writers_at_once_lose_nothing(tmp_path):
    path = tmp_path / "times.json"

    def put_many(writer: int) -> None:
        for i in range(15):
            TimingStore(path).put(f"{writer}/{i}", {"torch": float(i + 1)})

    # Threads stand for processes: every put opens the lock file anew, and the lock belongs to that opening.
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put_many, range(4)))
    store = TimingStore(path)
    assert all(store.get(f"{w}/{i}") == {"torch": i + 1} for w in range(4) for i in range(15))


def test_a_lock_that_is_not_given_back_is_waited_for_once(tmp_path, monkeypatch):
    monkeypatch.setattr("lhc_triton.runtime.choosing.timing_store.LOCK_S", 0.1)
    path = tmp_path / "times.json"
    TimingStore(path).put("k", {"torch": 1.0})
    waits = []
    with FileLock(f"{path}.lock"):
        acquire = FileLock.acquire
        monkeypatch.setattr(FileLock, "acquire", lambda *a, **k: waits.append(1) or acquire(*a, **k))
        for _ in range(5):
            with pytest.raises(TimeoutError, match=r"times\.json: another process"):
                TimingStore(path).put("k", {"torch": 2.0})
    assert len(waits) == 1
    assert TimingStore(path).get("k") == {"torch": 1.0}
    TimingStore(tmp_path / "another.json").put("k", {"torch": 3.0})


def test_links_and_pipes_under_the_names_of_a_store_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".times.json.tmp").symlink_to(tmp_path / "precious")
    TimingStore(tmp_path / "times.json").put("k", {"torch": 1.0})
    assert (tmp_path / "precious").read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.warns(UserWarning, match="pipe is skipped: .* is a pipe"):
        assert TimingStore(tmp_path / "pipe").get("k") == {}


def test_a_user_without_a_home_has_a_folder_among_the_temporary_files(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("LHC_TRITON_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert default_path() == Path(tempfile.gettempdir()) / f"lhc_triton-{os.getuid()}" / "timings.json"


UNWRITABLE = """
import json, warnings
from lhc_triton.runtime.choosing.timing_store import TimingStore, default_path
first, second = TimingStore(), TimingStore()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    first.put("k", {"torch": 1.0})
    second.put("k", {"dense": 2.0})
    TimingStore().put("l", {"torch": 3.0})
print(*(warning.message for warning in said), sep="\\n")
print(default_path())
print(json.dumps(TimingStore().read()))
"""


def test_a_default_store_that_cannot_be_written_has_a_temporary_one_in_its_place(tmp_path):
    kept = tmp_path / "cache" / "timings.json"
    TimingStore(kept).put("old", {"torch": 5.0})
    before = kept.read_bytes()
    Path(f"{kept}.lock").unlink(missing_ok=True)
    Path(f"{kept}.lock").mkdir()  # no lock, no writing
    (tmp_path / "temporary").mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path / "temporary"),
        "LHC_TRITON_CACHE": str(kept.parent),
    }
    done = subprocess.run(
        [sys.executable, "-c", UNWRITABLE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    said, path, found = done.stdout.splitlines()
    assert re.search(
        r"timings\.json cannot be written \(Is a directory\); set LHC_TRITON_CACHE to a folder that can be;"
        r" until this process ends, measured times are kept in .*/temporary/lhc_triton-",
        said,
    )
    assert path.startswith(f"{tmp_path}/temporary/lhc_triton-")
    assert json.loads(found) == {
        "old": {"torch": 5.0},
        "k": {"torch": 1.0, "dense": 2.0},
        "l": {"torch": 3.0},
    }
    assert kept.read_bytes() == before
    assert list((tmp_path / "temporary").iterdir()) == []
    with pytest.raises(OSError, match="Is a directory"):  # one that somebody names is not another
        TimingStore(kept).put("k", {"torch": 1.0})


def test_the_default_path_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LHC_TRITON_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_path() == tmp_path / "own" / "timings.json"
    monkeypatch.delenv("LHC_TRITON_CACHE")
    assert default_path() == tmp_path / "xdg" / "lhc_triton" / "timings.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_path() == tmp_path / "home" / ".cache" / "lhc_triton" / "timings.json"
    assert TimingStore().path == default_path()


def test_the_key_tells_apart_what_changes_a_time(monkeypatch):
    layer = Problem(ConvGeometry(1, 16, 16, 8, 8)).layer
    key = layer_key(layer, torch.float32, CPU)
    assert key == layer_key(dataclasses.replace(layer, reason="another", backend="dense"), torch.float32, CPU)
    renamed = dataclasses.replace(layer, topology=dataclasses.replace(layer.topology, name="elsewhere"))
    assert key == layer_key(renamed, torch.float32, CPU)
    geometry = dataclasses.replace(layer.topology.geometry, batch=2)
    larger = dataclasses.replace(layer, topology=dataclasses.replace(layer.topology, geometry=geometry))
    others = {
        layer_key(layer, torch.float16, CPU),
        layer_key(larger, torch.float32, CPU),
        layer_key(dataclasses.replace(layer, tiles=layer.tiles[::-1]), torch.float32, CPU),
        layer_key(dataclasses.replace(layer, tile_width=64), torch.float32, CPU),
    }
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    others.add(layer_key(layer, torch.float32, CPU))
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "9.9")
    others.add(layer_key(layer, torch.float32, CPU))
    monkeypatch.undo()
    monkeypatch.setattr("lhc_kernels.native_source_digest", lambda: "another")
    others.add(layer_key(layer, torch.float32, CPU))
    monkeypatch.undo()
    monkeypatch.setenv("LHC_TRITON_NATIVE_FLAGS", "-O1")
    others.add(layer_key(layer, torch.float32, CPU))
    assert len(others) == 8
    assert key not in others


def test_keys_do_not_import_triton(monkeypatch):
    before = set(sys.modules)
    layer_key(Problem(ConvGeometry(1, 16, 16, 8, 8)).layer, torch.float32, CPU)
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] == "triton"}
