"""The measuring itself: every candidate in every round, ratios per round, an honest interval."""

import itertools
import random
from collections.abc import Iterator
from statistics import median

import pytest
import torch

from experiments.bench import interleave
from experiments.bench.interleave import interleaved, median_interval, ratio_between, rotated
from moe.errors import UserError


class Clock:
    """Time that passes only when a candidate says so; CPU time runs at half the wall's speed."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(interleave, "time", clock)
    yield clock


def test_ratios_are_taken_round_by_round_so_a_slow_spell_cancels(clock: Clock) -> None:
    calls = itertools.count()

    def lasting(seconds: float) -> None:
        # The machine gets ten times slower every three rounds, for both candidates.
        clock.now += seconds * 10 ** (max(0, next(calls) - 4) // 6)

    found = interleaved(
        {"slow": lambda: lasting(3.0), "fast": lambda: lasting(2.0)}, against="fast", rounds=9
    )
    slow = found["slow"]
    assert slow.ratio == pytest.approx(1.5)
    assert slow.low == pytest.approx(1.5) and slow.high == pytest.approx(1.5)
    assert slow.wall_ratio == pytest.approx(1.5)
    assert ratio_between(found, "fast", against="slow") == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert len(slow.cpu_seconds) == len(slow.wall_seconds) == 9
    assert slow.median_seconds == median(slow.cpu_seconds) == pytest.approx(15.0)
    assert slow.wall_seconds == pytest.approx([2 * seconds for seconds in slow.cpu_seconds])


def test_the_candidate_compared_against_has_ratio_one(clock: Clock) -> None:
    def tick() -> None:
        clock.now += 1.0

    found = interleaved({"a": tick, "b": tick}, against="b", rounds=6)
    assert (found["b"].ratio, found["b"].low, found["b"].high) == (1.0, 1.0, 1.0)
    assert list(found) == ["a", "b"]


def test_a_short_candidate_is_repeated_to_the_asked_length(clock: Clock) -> None:
    calls = 0

    def short() -> None:
        nonlocal calls
        calls += 1
        clock.now += 0.02  # 0.01 s of CPU time

    found = interleaved({"short": short}, against="short", rounds=6, min_seconds=1.0)
    assert found["short"].median_seconds == pytest.approx(0.01)
    assert calls >= 6 * 100


def test_every_candidate_runs_once_a_round_in_a_rotating_order() -> None:
    rounds = [rotated(["a", "b", "c"], i) for i in range(6)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert [order[0] for order in rounds[:3]] == ["a", "b", "c"]
    pairs = {pair for order in rounds for pair in itertools.pairwise(order)}
    assert pairs == set(itertools.permutations("abc", 2))


def test_a_candidate_runs_on_one_thread_and_the_setting_comes_back() -> None:
    before = torch.get_num_threads()
    seen: set[int] = set()
    try:
        torch.set_num_threads(2)
        interleaved({"a": lambda: seen.add(torch.get_num_threads())}, against="a", rounds=6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


@pytest.mark.parametrize(
    # The ranks of tables of the sign test: n, then the lower and upper order statistic.
    ("n", "low", "high"),
    [(6, 1, 6), (8, 1, 8), (9, 2, 8), (12, 3, 10), (20, 6, 15), (25, 8, 18)],
)
def test_the_interval_takes_the_order_statistics_of_the_tables(n: int, low: int, high: int) -> None:
    values = [float(i + 1) for i in range(n)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == (low, high)


def test_unknown_names_and_too_few_rounds_are_refused() -> None:
    with pytest.raises(UserError, match="against 'c' is not measured: it must be one of a, b"):
        interleaved({"a": int, "b": int}, against="c", rounds=6)
    with pytest.raises(UserError, match="rounds 5 is too few .* give 6 or more"):
        interleaved({"a": int}, against="a", rounds=5)
