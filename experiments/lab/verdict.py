"""From values per seed to one word, by rules that are fixed before the run.

Seeds are paired: two arms share a seed's data order and initial weights, so the spread that
counts is that of the differences, not that of the arms. Words and intervals are computed here and
nowhere else. Fewer than three pairs give no interval, and then the word is UNRESOLVED: a spread
estimated from two numbers would be 12.7 standard errors wide and still look like evidence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from moe.errors import UserError

Word = Literal["BETTER", "WORSE", "HIGHER", "LOWER", "EQUIVALENT", "UNRESOLVED"]
PublishedWord = Literal["REPRODUCED", "NOT REPRODUCED", "INCONCLUSIVE"]

MIN_PAIRS = 3
INTERVAL_METHOD = "student-t over paired seed differences"
NO_INTERVAL = f"no interval: fewer than {MIN_PAIRS} paired seeds"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against another in one metric, seed by seed.

    `per_seed` is arm minus against in the metric's own units, None where either side has no
    finite value; `mean_difference` is None when no pair is left. `margin` is the half-width,
    fixed beforehand, inside which a difference does not matter.
    """

    per_seed: tuple[float | None, ...]
    mean_difference: float | None
    interval95: tuple[float, float] | None
    interval_method: str
    n: int
    word: Word
    margin: float


def central_share(angle: float, degrees: int) -> float:
    """P(|t| <= sqrt(degrees) * tan(angle)) for Student's t with an integer number of degrees.

    The finite sums of Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even), which are exact.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(degrees // 2):
        total += term
        factor = (2 * i + 2) / (2 * i + 3) if odd else (2 * i + 1) / (2 * i + 2)
        term *= factor * cosine * cosine
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def t_quantile(probability: float, degrees: int) -> float:
    """The value that Student's t with `degrees` >= 1 stays below with this probability.

    Bisection on the angle, where the whole line is the finite range (0, pi/2).
    """
    if not 0 < probability < 1:
        raise UserError(f"A quantile needs a probability between 0 and 1, not {probability}.")
    if degrees < 1:
        raise UserError(f"Student's t needs at least 1 degree of freedom, not {degrees}.")
    if probability == 0.5:
        return 0.0
    share = abs(2 * probability - 1)
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        if central_share(middle, degrees) < share:
            low = middle
        else:
            high = middle
    return math.copysign(math.sqrt(degrees) * math.tan((low + high) / 2), probability - 0.5)


def paired_interval(
    differences: Sequence[float], *, level: float = 0.95
) -> tuple[float, float] | None:
    """Interval of the mean: mean +- t * s / sqrt(n); None ("no interval") below three values.

    Values that are all equal give an interval of width zero.
    """
    if not 0 < level < 1:
        raise UserError(f"An interval's level lies between 0 and 1, not at {level}.")
    if not all(math.isfinite(value) for value in differences):
        raise UserError(f"An interval needs finite values, not {list(differences)}.")
    n = len(differences)
    if n < MIN_PAIRS:
        return None
    mean = fmean(differences)
    half = t_quantile(0.5 + level / 2, n - 1) * stdev(differences) / math.sqrt(n)
    return mean - half, mean + half


def compare(
    arm_values: Sequence[float | None],
    against_values: Sequence[float | None],
    *,
    margin: float,
    higher_is_better: bool | None,
) -> Comparison:
    """Compares two arms whose values stand in the same order of seeds.

    A seed where either value is None or not finite is left out on both sides, and shows as None
    in `per_seed` and in a smaller `n`. The word:

    - BETTER or WORSE when the 95 % interval of the mean difference excludes zero; HIGHER or LOWER
      where higher_is_better is None, because the metric describes and does not rate;
    - else EQUIVALENT when the 90 % interval lies within +-margin (two one-sided tests at 5 %);
    - else UNRESOLVED, as always below three pairs.

    A difference can be both sure and small. It is then called BETTER or WORSE, because the sign
    is what was found; whether its size matters is for the reader, who has it with its interval.
    """
    if len(arm_values) != len(against_values):
        raise UserError(
            f"Paired values need the same seeds on both sides, but there are {len(arm_values)} "
            f"and {len(against_values)}; write None for a seed that is missing."
        )
    if not (math.isfinite(margin) and margin >= 0):
        raise UserError(
            f"margin is {margin}; it is the largest difference that does not matter, 0 or more, "
            "in the metric's units."
        )
    per_seed = tuple(
        difference(ours, theirs) for ours, theirs in zip(arm_values, against_values, strict=True)
    )
    present = [value for value in per_seed if value is not None]
    interval95 = paired_interval(present, level=0.95)
    return Comparison(
        per_seed=per_seed,
        mean_difference=fmean(present) if present else None,
        interval95=interval95,
        interval_method=INTERVAL_METHOD if interval95 else NO_INTERVAL,
        n=len(present),
        word=_word(present, margin=margin, higher_is_better=higher_is_better),
        margin=margin,
    )


def difference(value: float | None, other: float | None) -> float | None:
    """value - other, or None where either is missing or not finite."""
    if value is None or other is None:
        return None
    gap = float(value) - float(other)
    return gap if math.isfinite(gap) else None


def _word(differences: Sequence[float], *, margin: float, higher_is_better: bool | None) -> Word:
    interval95 = paired_interval(differences, level=0.95)
    interval90 = paired_interval(differences, level=0.90)
    if interval95 is None or interval90 is None:
        return "UNRESOLVED"
    if interval95[0] > 0 or interval95[1] < 0:
        if higher_is_better is None:
            return "HIGHER" if interval95[0] > 0 else "LOWER"
        return "BETTER" if (interval95[0] > 0) == higher_is_better else "WORSE"
    if -margin <= interval90[0] and interval90[1] <= margin:
        return "EQUIVALENT"
    return "UNRESOLVED"


def published_verdict(
    differences: Sequence[float | None], *, published_sign: int, threshold: float
) -> PublishedWord:
    """Whether a published difference shows in our differences per seed (None: seed missing).

    REPRODUCED: every seed has the published sign and the mean gap reaches `threshold` (>= 0, in
    the metric's units). NOT REPRODUCED: every seed has the opposite sign, or the mean gap reaches
    the threshold in the opposite direction; a threshold of 0 has no such clause, since the mean of
    pure noise is on either side. INCONCLUSIVE: all else, and fewer than three seeds, whichever way
    they point. A difference of exactly zero has neither sign.
    """
    if published_sign not in (-1, 1):
        raise UserError(f"published_sign is {published_sign}; it is +1 or -1.")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise UserError(
            f"threshold is {threshold}; it is the smallest mean gap that counts, 0 or more."
        )
    gaps = [
        published_sign * value
        for value in differences
        if value is not None and math.isfinite(value)
    ]
    if len(gaps) < MIN_PAIRS:
        return "INCONCLUSIVE"
    mean = fmean(gaps)
    if all(gap > 0 for gap in gaps) and mean >= threshold:
        return "REPRODUCED"
    if all(gap < 0 for gap in gaps) or 0 < threshold <= -mean:
        return "NOT REPRODUCED"
    return "INCONCLUSIVE"
