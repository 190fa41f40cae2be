"""accelerate(): random networks compute what they computed before, on inputs that it has never seen."""

from __future__ import annotations

import pytest
from random_trials import Outcome, try_seed

BLOCK = 25


@pytest.mark.parametrize("first", range(0, 6 * BLOCK, BLOCK))
def test_random_networks_compute_the_same_or_are_refused(first: int) -> None:
    outcomes = [try_seed(seed) for seed in range(first, first + BLOCK)]
    wrong = [outcome for outcome in outcomes if outcome.verdict == "wrong"]
    assert not wrong, "\n".join(map(str, wrong))
    assert _share(outcomes, "same", "random") >= 0.6
    assert _share(outcomes, "unstable", "no network") <= 0.3
    # Of those compared, enough must have had something to be wrong about.
    assert sum(outcome.sparse > 0 for outcome in outcomes) >= 0.3 * BLOCK


def _share(outcomes: list[Outcome], *verdicts: str) -> float:
    return sum(outcome.verdict in verdicts for outcome in outcomes) / len(outcomes)
