"""What a budget gets to first, and that a suite's own layers are the ones that are tuned for it."""

import torch

from lhc_bench.measure.cases import LayerCase, batch_of, eligible_cases
from lhc_bench.measure.tuning_suite import measured_jobs, suite_jobs


def test_the_commonest_layers_come_first():
    counts = {}
    for case in eligible_cases():
        geometry = case.geometry(batch_of(case.model, "cuda"))
        counts[geometry] = counts.get(geometry, 0) + case.count
    jobs = suite_jobs("standard", torch.float16)
    first = [counts[job.layer.topology.geometry] for job in jobs[: len(counts)]]
    assert first == sorted(counts.values(), reverse=True)
    assert all(abs(job.layer.topology.density - 0.1) < 0.02 for job in jobs[:12])


def test_a_suite_s_layers_are_tuned_as_planned_and_without_a_union():
    case = LayerCase("tiny-imagenet", "conv", 64, 64, 4, 4)
    jobs = measured_jobs((case,), ((32, 16), (32, 64)), (0.2, 0.5), "cpu", torch.float16)
    assert len(jobs) == 8
    assert [job.layer.tile_width for job in jobs[::2]] == [16, 64, 16, 64]
    assert all(job.layer.backend == "triton" and not job.choose for job in jobs)
    assert {len(tile.groups) for job in jobs[::2] for tile in job.layer.tiles} == {1}
