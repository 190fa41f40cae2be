"""The protocol between the benchmark and an engine in another interpreter."""

import sys
import time

import numpy as np
import pytest

from lhc_bench.measure.remote_engine import WORKER, EngineError, RemoteEngine

# A worker that serves an engine of the test's own by the real worker's code.
SERVING = f"""
import importlib.util, sys, time, numpy
spec = importlib.util.spec_from_file_location("engine_worker", {str(WORKER)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Engine:
    version = "3.2"
    def load(self, model, x, threads):
        if not open(model).read():
            raise ValueError("empty network\\nmore")
        def run():
            BODY
            return x * threads
        return run

module.serve(Engine, sys.stdin, sys.stdout)
"""


@pytest.fixture
def start(tmp_path):
    """Return what starts a worker from a script, and ends it with the test."""
    started = []

    def make(script, **limits):
        path = tmp_path / "worker.py"
        path.write_text(script)
        started.append(RemoteEngine(sys.executable, path, **limits))
        return started[-1]

    yield make
    for engine in started:
        engine.close()


def serving(body="pass"):
    return SERVING.replace("BODY", body)


def loaded(engine, folder, x, threads=3):
    (folder / "net.onnx").write_text("a network")
    engine.load(folder / "net.onnx", x, folder, threads)
    return engine


def test_inputs_go_there_and_outputs_come_back(tmp_path, start):
    engine = start(serving())
    assert engine.version == "3.2"
    for seed in (0, 1):
        x = np.random.default_rng(seed).standard_normal((2, 3, 5, 4)).astype(np.float32)
        loaded(engine, tmp_path, x)
        assert np.array_equal(engine.output(), 3 * x)


def test_what_a_call_takes_beyond_the_engines_time_is_waiting(tmp_path, start):
    engine = loaded(start(serving("time.sleep(0.05)")), tmp_path, np.ones(2, np.float32))
    begin = time.perf_counter()
    for _ in range(4):
        engine.run()
    took = time.perf_counter() - begin
    assert took >= 0.2
    assert 0 < engine.waited_s <= took - 0.2


def test_an_error_is_one_line_and_the_worker_goes_on(tmp_path, start):
    engine = start(serving())
    (tmp_path / "empty.onnx").write_text("")
    with pytest.raises(EngineError, match=r"^ValueError: empty network$"):
        engine.load(tmp_path / "empty.onnx", np.ones(2), tmp_path, 1)
    with pytest.raises(EngineError, match="RuntimeError: 'time' came before a network was loaded"):
        engine.run()
    loaded(engine, tmp_path, np.ones(2))
    engine.run()


def test_a_call_that_fails_is_told(tmp_path, start):
    engine = loaded(start(serving("raise MemoryError('no room')")), tmp_path, np.ones(2))
    for call in (engine.run, engine.output):
        with pytest.raises(EngineError, match="MemoryError: no room"):
            call()


ANSWER = "import sys\nfor line in sys.stdin:\n    print({}, flush=True)\n"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (ANSWER.format("'not JSON'"), "the engine answered b'not JSON', expected a JSON object"),
        (ANSWER.format("'[1]'"), "expected a JSON object"),
        (ANSWER.format("'[' * 60000"), "expected a JSON object"),
        (ANSWER.format("'x' * 70000"), "the engine's answer is longer than 65536 bytes"),
        ("raise SystemExit('no licence')", r"the interpreter ended \(exit code 1\): no licence"),
        ("import os; os.kill(os.getpid(), 9)", r"the interpreter ended \(exit code -9\)"),
        ("import time; time.sleep(60)", "no answer within 0.5 s"),
    ],
)
def test_a_worker_that_does_not_serve_is_refused_in_one_line(start, script, message):
    with pytest.raises(EngineError, match=message) as caught:
        start(script, start_s=0.5 if "sleep" in script else 60)
    assert "\n" not in str(caught.value)


def test_a_worker_without_an_answer_in_time_is_ended(tmp_path, start):
    engine = loaded(start(serving("time.sleep(60)"), call_s=0.3), tmp_path, np.ones(2))
    with pytest.raises(EngineError, match=r"no answer within 0\.3 s"):
        engine.run()
    with pytest.raises(EngineError, match=r"the interpreter ended \(exit code -9\)"):
        engine.run()


@pytest.mark.parametrize("time_us", ["'soon'", "-1", "None", "True"])
def test_a_time_that_is_none_is_refused(start, time_us):
    answer = f"'{{\"version\": \"1\"}}' if 'hello' in line else json.dumps({{'us': {time_us}}})"
    engine = start("import json\n" + ANSWER.format(answer))
    with pytest.raises(EngineError, match="expected a time in us"):
        engine.run()
