"""Tries accelerate() on thousands of random networks; run by ``make soak``.

Each network is drawn from its seed, so ``python tests/runtime/soak.py --first SEED --cases 1`` repeats one.
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
from random_trials import Outcome, try_seed

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


def main() -> int:
    """Run the trials, and return 1 if a network was wrong in silence."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--cases", type=int, default=5000, help="networks to try (5000)")
    parser.add_argument("--seconds", type=float, default=900.0, help="begin none after this time (900)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (one a core)")
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    sparse = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["LHC_TRITON_CACHE"] = cache
        for outcome in outcomes_of(options.first, options.cases, options.seconds, options.workers):
            counts[outcome.verdict] += 1
            sparse += outcome.sparse > 0
            if outcome.verdict == "wrong":
                print(outcome, flush=True)
    total = sum(counts.values())
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
    print(f"{total} of {options.cases} networks from seed {options.first}: {verdicts}; {sparse} ran sparse")
    return 1 if counts["wrong"] or sparse < 0.3 * total else 0


if __name__ == "__main__":
    sys.exit(main())
