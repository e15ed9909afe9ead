"""A published claim as conditions on differences per seed, and conditions as one word.

The decision to know: a condition is one list of paired gaps with a sign and a threshold that were
fixed beforehand, so that the word follows from numbers that stand beside it in the summary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from experiments.lab.verdict import (
    MIN_PAIRS,
    PublishedWord,
    difference,
    paired_interval,
    published_verdict,
)

Values = Sequence[float | None]


class Judged(Protocol):
    """What a claim has once it is judged."""

    @property
    def claim(self) -> str: ...
    @property
    def published(self) -> str: ...
    @property
    def gaps(self) -> tuple[float | None, ...]: ...
    @property
    def threshold(self) -> float: ...
    @property
    def of(self) -> str: ...
    @property
    def word(self) -> PublishedWord: ...


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A claim, where it comes from, and our gaps per seed that decide it.

    gaps: ours, of which the published sign is `sign` (+1 or -1) and whose mean is to reach
    `threshold`, 0 for the sign alone. A gap is never given less its threshold: one that is only too
    small would read as one the other way round. of: what stands beside each other in `gaps`.
    """

    claim: str
    published: str
    gaps: tuple[float | None, ...]
    sign: int
    threshold: float = 0.0
    of: str = "seeds"

    @property
    def word(self) -> PublishedWord:
        return published_verdict(self.gaps, published_sign=self.sign, threshold=self.threshold)


@dataclass(frozen=True, kw_only=True)
class AtMost:
    """A claim that something costs no more than `threshold`, from the costs per seed.

    REPRODUCED if no seed costs more, NOT REPRODUCED if every seed does or the mean costs twice as
    much; else, and below three seeds, INCONCLUSIVE.
    """

    claim: str
    published: str
    gaps: tuple[float | None, ...]
    threshold: float
    of: str = "seeds"

    @property
    def word(self) -> PublishedWord:
        known = _known(self.gaps)
        if len(known) < MIN_PAIRS:
            return "INCONCLUSIVE"
        if all(gap <= self.threshold for gap in known):
            return "REPRODUCED"
        dearer = all(gap > self.threshold for gap in known) or fmean(known) > 2 * self.threshold
        return "NOT REPRODUCED" if dearer else "INCONCLUSIVE"


def gaps(values: Values, others: Values) -> tuple[float | None, ...]:
    """values - others, seed by seed; None where either is missing."""
    return tuple(difference(a, b) for a, b in zip(values, others, strict=True))


def relative(values: Values, others: Values) -> tuple[float | None, ...]:
    """values / others - 1, seed by seed; None where either is missing or the other is 0."""
    pairs = zip(gaps(values, others), others, strict=True)
    return tuple(gap / other if gap is not None and other else None for gap, other in pairs)


@dataclass(frozen=True, kw_only=True)
class MeanFall:
    """A claim about a row of means: that each is below the one before it.

    gaps: the falls of the mean over seeds, one a step of the row; negative where it falls.
    margin: a rise of so much, anywhere, is the opposite of what was published.
    """

    claim: str
    published: str
    gaps: tuple[float | None, ...]
    num_seeds: int
    margin: float
    threshold: float = 0.0
    of: str = "steps of the mean over seeds"

    @property
    def word(self) -> PublishedWord:
        known = _known(self.gaps)
        if self.num_seeds < MIN_PAIRS or len(known) < len(self.gaps):
            return "INCONCLUSIVE"
        if all(gap < 0 for gap in known):
            return "REPRODUCED"
        return "NOT REPRODUCED" if max(known) >= self.margin else "INCONCLUSIVE"


def falls_in_the_mean(
    row: Sequence[Values], *, claim: str, published: str, margin: float
) -> MeanFall:
    """The claim that the means of these values, taken over seeds, fall from one to the next."""
    means = [fmean(known) if (known := _known(values)) else None for values in row]
    return MeanFall(
        claim=claim,
        published=published,
        gaps=tuple(difference(b, a) for a, b in zip(means, means[1:], strict=False)),
        num_seeds=min(len(_known(values)) for values in row),
        margin=margin,
    )


def _known(values: Values) -> list[float]:
    return [value for value in values if value is not None]


def combined(words: Sequence[PublishedWord]) -> PublishedWord:
    """REPRODUCED if all are, NOT REPRODUCED if one is not, else INCONCLUSIVE."""
    if words and all(word == "REPRODUCED" for word in words):
        return "REPRODUCED"
    return "NOT REPRODUCED" if "NOT REPRODUCED" in words else "INCONCLUSIVE"


def claims_of(conditions: Sequence[Judged]) -> list[dict[str, Any]]:
    """The conditions as the summary's claims: ours beside the published, judged."""
    return [
        {
            "claim": condition.claim,
            "published": condition.published,
            "threshold": condition.threshold,
            "ours": {f"per {condition.of}": list(condition.gaps)},
            "verdict": condition.word,
        }
        for condition in conditions
    ]


def answers_of(conditions: Sequence[Judged]) -> list[str]:
    """A sentence for each condition: the claim, the word, and the numbers that it rests on."""
    return [
        f"{condition.claim}: {condition.word}, {_numbers(condition)}." for condition in conditions
    ]


def _numbers(condition: Judged) -> str:
    known = _known(condition.gaps)
    if condition.of != "seeds":
        return f"{' '.join(f'{gap:+.3f}' for gap in known)} ({condition.of})"
    interval = paired_interval(known)
    ends = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ", no interval"
    return f"{fmean(known):+.3f}{ends}, seeds {len(known)}" if known else "no seed has a value"


def verdict_of(conditions: Sequence[Judged], *, rule: str, metric: str) -> dict[str, Any]:
    """The summary's verdict from the conditions that decide it; each claim has its threshold."""
    return {
        "word": combined([condition.word for condition in conditions]),
        "rule": rule,
        "metric": metric,
    }


def comparisons(
    arms: Mapping[str, Mapping[str, Values]],
    pairs: Sequence[tuple[str, str]],
    *,
    metric: str,
    margin: float,
    higher_is_better: bool | None = False,
) -> list[dict[str, Any]]:
    """Every (arm, against) in a metric of which less is better, or None: neither, in words."""
    from dataclasses import asdict

    from experiments.lab.verdict import compare

    return [
        {
            "arm": arm,
            "against": against,
            "metric": metric,
            **asdict(
                compare(
                    arms[arm][metric],
                    arms[against][metric],
                    margin=margin,
                    higher_is_better=higher_is_better,
                )
            ),
        }
        for arm, against in pairs
    ]
