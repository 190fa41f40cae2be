"""The signatures that are compiled ahead are those of the launches that follow, and benches wait for them."""

import pytest
import torch
from recorded_bench import CPU, HALF, layer_of, names_of

from lhc_kernels import INTERPRETED, KernelConfig, ahead, launch
from lhc_kernels.ahead import Compiled
from lhc_triton.runtime.choosing import compiled_ahead
from lhc_triton.runtime.choosing.compiled_ahead import launch_signature
from lhc_triton.runtime.choosing.timing_store import TimingStore
from lhc_triton.runtime.choosing.tuning_jobs import Job
from lhc_triton.runtime.choosing.workload import Workload


@pytest.mark.interpreter
@pytest.mark.skipif(not INTERPRETED, reason="launches on the CPU, which TRITON_INTERPRET=1 allows")
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_a_signature_is_the_launch_s_own(monkeypatch, density):
    layer = layer_of(64, density=density)
    config = KernelConfig(64, 16).to_list()
    asked = []

    def prepare(signature):
        asked.append(signature)
        raise InterruptedError

    monkeypatch.setattr(launch, "prepare", prepare)
    with pytest.raises(InterruptedError):
        Workload(layer, HALF, CPU).sparse("triton", config)()
    assert asked == [launch_signature(layer, HALF, CPU, config)]


class PaperCompilers:
    """Workers that compile nothing and say what they were told to."""

    found = Compiled(64)

    def __init__(self, **options):
        self.begun, self.waited = [], []

    def begin(self, signatures):
        self.begun += signatures

    def wait(self, signature):
        self.waited.append(signature)
        return self.found

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass


@pytest.fixture
def paper(monkeypatch):
    made = PaperCompilers()
    monkeypatch.setattr(ahead, "Compilers", lambda **options: made)
    monkeypatch.setattr(compiled_ahead, "GpuBench", lambda layer, dtype, device, compiled: compiled)
    return made


def test_configs_without_a_record_are_compiled_job_by_job(paper, tmp_path):
    store = TimingStore(tmp_path / "times.json")
    jobs = [Job(layer_of(pixels), HALF) for pixels in (64, 128, 64)]
    key, _ = compiled_ahead.planned(jobs[0].layer, HALF, CPU)
    names = names_of(jobs[0].layer)
    store.put(key, dict.fromkeys(names[:3], 5.0))
    with compiled_ahead.compiled_ahead(jobs, CPU, store):
        pass
    begun = [(s.x[0][2], ",".join(map(str, s.config))) for s in paper.begun]
    assert begun == [(8, name) for name in names[3:]] + [(16, name) for name in names_of(jobs[1].layer)]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (Compiled(64, 88), None),
        (Compiled(255, 648), "it spills 648 bytes a thread"),
        (Compiled(problem="PassManager: no"), "PassManager: no"),
    ],
)
def test_a_bench_tries_what_compiled_well(paper, tmp_path, found, said):
    paper.found = found
    jobs = [Job(layer_of(64), HALF)]
    with compiled_ahead.compiled_ahead(jobs, CPU, TimingStore(tmp_path / "times.json")) as benches:
        compiled = benches(jobs[0].layer, HALF, CPU)
        config = list(paper.begun[0].config)
        if said is None:
            compiled(config)
        else:
            with pytest.raises(RuntimeError, match=said):
                compiled(config)
    assert paper.waited == [paper.begun[0]]
    assert paper.begun[0].x[1] == torch.float16
