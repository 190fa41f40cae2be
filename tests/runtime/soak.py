"""Tries accelerate() on thousands of random networks, and disturbs processes at work; run by ``make soak``.

Each network and each disturbance is drawn from its seed. ``python tests/runtime/soak.py --first SEED`` with
``--cases 1 --disturbances 0`` repeats a network, with ``--only train --disturbances 1`` a run that is killed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context

import torch
from disturbances import CASES, try_case
from random_trials import Outcome, try_seed

from lhc_kernels.cpu import problem

BLOCK = 20


def try_block(seeds: range) -> list[Outcome]:
    """Try some seeds, warnings being errors."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    return [try_seed(seed) for seed in seeds]


def outcomes_of(first: int, cases: int, seconds: float, workers: int) -> Iterator[Outcome]:
    """Try ``cases`` seeds from ``first`` on, begin none after ``seconds``, and yield what comes of each.

    Raises:
        RuntimeError: a process died; the message says on which seeds.
    """
    end = time.monotonic() + seconds
    blocks = (range(at, min(at + BLOCK, first + cases)) for at in range(first, first + cases, BLOCK))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        running: dict[Future[list[Outcome]], range] = {
            pool.submit(try_block, block): block for block in islice(blocks, workers)
        }
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                block = running.pop(future)
                try:
                    yield from future.result()
                except BrokenProcessPool as error:
                    raise RuntimeError(f"the process died on one of the seeds {block}") from error
                following = next(blocks, None) if time.monotonic() < end else None
                if following is not None:
                    running[pool.submit(try_block, following)] = following


def try_networks(first: int, cases: int, seconds: float, workers: int) -> bool:
    """Try random networks; return whether none was wrong in silence, and enough ran sparse."""
    counts: Counter[str] = Counter()
    sparse = 0
    for outcome in outcomes_of(first, cases, seconds, workers):
        counts[outcome.verdict] += 1
        sparse += outcome.sparse > 0
        if outcome.verdict == "wrong":
            print(outcome, flush=True)
    total = sum(counts.values())
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"{total} of {cases} networks from seed {first}: {verdicts}; {sparse} ran sparse", flush=True)
    return not counts["wrong"] and sparse >= 0.3 * total


def try_disturbances(kind: str, first: int, cases: int, seconds: float) -> bool:
    """Try disturbances of one kind, begin none after ``seconds``; return whether all was well."""
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    tried = bad = 0
    for seed in range(first, first + cases):
        if tried and time.monotonic() > end:
            break
        problem = try_case(kind, seed)
        tried += 1
        bad += problem != ""
        if problem:
            print(f"{kind}, seed {seed}: {problem}", flush=True)
    print(f"{tried} of {cases} times {kind} disturbed from seed {first}: {bad} went wrong", flush=True)
    return bad == 0


def main() -> int:
    """Run the trials, and return 1 if a network was wrong in silence or a disturbance did harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=5000, help="networks to try (5000)")
    parser.add_argument("--disturbances", type=int, default=100, help="of each kind (100)")
    parser.add_argument("--only", choices=CASES, help="this kind of disturbance, and no networks")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin nothing after this time (900)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    options = parser.parse_args()
    kinds = [options.only] if options.only else list(CASES)
    each = options.seconds / (3 * len(kinds)) if options.disturbances else 0.0  # a third of the time
    problem()  # builds the native kernel where it is kept for good, before the rest has a cache of its own
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LHC_TRITON_CACHE"] = cache
        well = [try_disturbances(kind, options.first, options.disturbances, each) for kind in kinds]
        if not options.only and options.cases:
            left = options.seconds - each * len(kinds)
            well.append(try_networks(options.first, options.cases, left, options.workers))
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
