"""Interleaved timing, with a clock that only moves when a function says so."""

import pytest
import torch

from lhc_triton.runtime.choosing.timing import time_paired


class Clock:
    """Seconds that pass while a function "works"."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float):
        durations = list(seconds)

        def function() -> None:
            self.calls.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]

        return function


def test_medians_and_spread_come_from_the_rounds():
    clock = Clock()
    warm_then = [0.9, 0.001, 0.002, 0.005, 0.003, 0.004]  # one warm-up, too long for more, then five rounds
    found = time_paired({"a": clock.work("a", *warm_then)}, rounds=5, warmup=1, clock=clock)["a"]
    assert found.samples_us == pytest.approx((1000, 2000, 5000, 3000, 4000))
    assert found.median_us == pytest.approx(3000)
    assert found.p20_us == pytest.approx(1800)
    assert found.p80_us == pytest.approx(4200)


def test_every_round_calls_each_function_in_an_order_of_its_own():
    def calls_of(rounds):
        clock = Clock()
        functions = {name: clock.work(name, 0.01) for name in "abcd"}
        found = time_paired(functions, rounds=rounds, warmup=2, clock=clock)
        assert list(found) == ["a", "b", "c", "d"]
        return "".join(clock.calls)

    calls = calls_of(20)
    assert calls.startswith("aabbccdd")
    rounds = [calls[start : start + 4] for start in range(8, 8 + 4 * 20, 4)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in rounds)
    before_a = [order[order.index("a") - 1] for order in rounds if order[0] != "a"]
    assert set(before_a) == {"b", "c", "d"}
    assert calls_of(20) == calls


def test_short_functions_are_repeated_within_a_sample():
    clock = Clock()
    found = time_paired({"a": clock.work("a", 0.00001)}, rounds=2, warmup=1, clock=clock)["a"]
    assert found.repeats == 20
    assert found.samples_us == pytest.approx((10, 10))
    assert len(clock.calls) == 1 + 2 * (1 + 20)


def test_a_brief_function_runs_once_untimed_before_each_sample():
    clock = Clock()
    # Warm-up; then each round a call after something else, which is slow, and the one that counts.
    times = [0.001, 0.005, 0.001, 0.006, 0.0012]
    found = time_paired({"a": clock.work("a", *times)}, rounds=2, warmup=1, clock=clock)["a"]
    assert found.samples_us == pytest.approx((1000, 1200))


def test_a_budget_ends_the_rounds_early_but_leaves_three():
    clock = Clock()
    found = time_paired({"a": clock.work("a", 0.1)}, rounds=20, warmup=1, clock=clock, budget_s=0.75)
    assert len(found["a"].samples_us) == 7
    found = time_paired({"a": clock.work("a", 10.0)}, rounds=20, warmup=1, clock=clock, budget_s=0.1)
    assert len(found["a"].samples_us) == 3
    found = time_paired({"a": clock.work("a", 10.0)}, rounds=2, warmup=1, clock=clock, budget_s=0.1)
    assert len(found["a"].samples_us) == 2


def test_functions_run_in_inference_mode():
    seen = []
    time_paired({"a": lambda: seen.append(torch.is_inference_mode_enabled())}, rounds=1, warmup=1)
    assert all(seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"functions": {}}, "no function"), ({"rounds": 0}, "rounds is 0"), ({"warmup": 0}, "warmup is 0")],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        time_paired(**{"functions": {"a": lambda: None}, **options})


def test_an_error_in_a_function_is_not_hidden():
    def broken() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        time_paired({"a": broken}, rounds=1)
