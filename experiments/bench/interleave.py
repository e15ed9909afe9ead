"""Ratios of running times that a busy machine does not spoil.

Decision to know: nothing is timed alone. In each round every candidate runs once, in an order that
rotates, and the round gives one ratio against the named candidate. A neighbour that slows the
machine for a while slows both sides of a ratio; what is reported is the median over the rounds,
with an interval that assumes no distribution.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

from moe.errors import UserError

# The widest interval of order statistics covers 1 - 2 * 2**-n: below six rounds that is under 95 %.
MIN_ROUNDS = 6
INTERVAL_METHOD = "order statistics of the median, at least 95 %"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One candidate's time, and how it compares with the named one.

    name: the candidate.
    median_seconds: median over the rounds of the process CPU seconds of one call.
    ratio: median over the rounds of CPU seconds / CPU seconds of the named candidate in that round;
        1 for the named one itself.
    low, high: the 95 % interval of that median.
    wall_ratio: the same median by the wall clock, the one to read when the work is done outside the
        process (on an accelerator); it counts the neighbours' time too.
    cpu_seconds, wall_seconds: one call's time in each round, in the order of the rounds.
    """

    name: str
    median_seconds: float
    ratio: float
    low: float
    high: float
    wall_ratio: float
    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    *,
    against: str,
    rounds: int,
    min_seconds: float = 0.0,
) -> Mapping[str, Ratio]:
    """Run the candidates in turn, `rounds` times after a warm-up, and compare each with `against`.

    A candidate is called with nothing; what it returns is dropped after its time was taken. It runs
    on one torch thread, without garbage collection.
    min_seconds: a measurement of a short candidate repeats the call until about this long.
    Raises UserError if `against` is no candidate, or with too few rounds for a 95 % interval.
    """
    if against not in candidates:
        raise UserError(
            f"against {against!r} is not measured: it must be one of {', '.join(candidates)}."
        )
    check_rounds(rounds)
    names = list(candidates)
    cpu: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    with _one_quiet_thread():
        calls = {name: _calls(candidates[name], min_seconds) for name in names}
        for i in range(rounds):
            for name in rotated(names, i):
                seconds = _measure(candidates[name], calls[name])
                cpu[name].append(seconds[0])
                wall[name].append(seconds[1])
    return {name: _ratio(name, cpu=cpu, wall=wall, against=against) for name in names}


def check_rounds(rounds: int) -> None:
    """Raises UserError with fewer rounds than a 95 % interval of the median needs."""
    if rounds < MIN_ROUNDS:
        raise UserError(
            f"--rounds {rounds} is too few for a 95 % interval of the median: give {MIN_ROUNDS} or "
            "more."
        )


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The names in the order of one round: each is first once, and neighbours change direction.

    Every second turn around is backwards, or one candidate would always follow the same other and
    find the caches as that one leaves them.
    """
    turn, start = divmod(by, len(names))
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The narrowest symmetric pair of order statistics that covers the median with >= 95 %.

    The number of values below the true median is binomial(n, 1/2), whatever the distribution
    (David and Nagaraja 2003, Order Statistics, section 7.1). Needs n >= 6.
    """
    n = len(values)
    ordered = sorted(values)
    outside, j = 0.0, 0  # P(fewer than j values below the median) on one side
    while 2 * (outside + math.comb(n, j) / 2**n) <= 0.05:
        outside += math.comb(n, j) / 2**n
        j += 1
    assert j >= 1, "fewer than six values"
    return ordered[j - 1], ordered[n - j]


def ratio_between(
    measured: Mapping[str, Ratio], name: str, *, against: str
) -> tuple[float, float, float]:
    """(median, low, high) of one measured candidate's CPU time over another's, round by round."""
    pairs = zip(measured[name].cpu_seconds, measured[against].cpu_seconds, strict=True)
    ratios = [ours / theirs for ours, theirs in pairs]
    return (median(ratios), *median_interval(ratios))


def _ratio(
    name: str,
    *,
    cpu: Mapping[str, Sequence[float]],
    wall: Mapping[str, Sequence[float]],
    against: str,
) -> Ratio:
    ratios = [ours / theirs for ours, theirs in zip(cpu[name], cpu[against], strict=True)]
    low, high = median_interval(ratios)
    return Ratio(
        name=name,
        median_seconds=median(cpu[name]),
        ratio=median(ratios),
        low=low,
        high=high,
        wall_ratio=median(
            ours / theirs for ours, theirs in zip(wall[name], wall[against], strict=True)
        ),
        cpu_seconds=tuple(cpu[name]),
        wall_seconds=tuple(wall[name]),
    )


def _measure(candidate: Callable[[], object], calls: int) -> tuple[float, float]:
    """CPU and wall seconds of one call, over `calls` calls."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        candidate()
    return (time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls


def _calls(candidate: Callable[[], object], min_seconds: float) -> int:
    """How many calls last `min_seconds`; finding that out is the warm-up."""
    candidate()
    calls = 1
    while (seconds := _measure(candidate, calls)[0] * calls) < min_seconds:
        # At most tenfold at a time: the first calls of a short candidate are not typical.
        wanted = math.ceil(calls * min_seconds / max(seconds, 1e-9))
        calls = min(10 * calls, max(wanted, calls + 1))
    return calls


@contextmanager
def _one_quiet_thread() -> Iterator[None]:
    """One torch thread, and no garbage collection inside a measurement."""
    import torch

    threads, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if collecting:
            gc.enable()
