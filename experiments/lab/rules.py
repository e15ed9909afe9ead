"""A published claim as conditions on differences per seed, and conditions as one word.

The decision to know: a condition is one list of paired gaps with a sign and a threshold that were
fixed beforehand, so that the word follows from numbers that stand beside it in the summary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

from experiments.lab.verdict import MIN_PAIRS, PublishedWord, difference, published_verdict

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
    def word(self) -> PublishedWord: ...


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A claim, where it comes from, and our gaps per seed that decide it.

    gaps: ours, of which the published sign is `sign` (+1 or -1) and whose mean is to reach
    `threshold`, 0 for the sign alone.
    """

    claim: str
    published: str
    gaps: tuple[float | None, ...]
    sign: int
    threshold: float = 0.0

    @property
    def word(self) -> PublishedWord:
        return published_verdict(self.gaps, published_sign=self.sign, threshold=self.threshold)


def gaps(values: Values, others: Values, *, times: float = 1.0) -> tuple[float | None, ...]:
    """values - times * others, seed by seed; None where either is missing."""
    scaled = [None if other is None else times * other for other in others]
    return tuple(difference(a, b) for a, b in zip(values, scaled, strict=True))


def less(values: Values, number: float) -> tuple[float | None, ...]:
    """values - number, seed by seed; None where missing."""
    return gaps(values, [number] * len(values))


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

    @property
    def word(self) -> PublishedWord:
        known = [gap for gap in self.gaps if gap is not None]
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
            "ours": list(condition.gaps),
            "verdict": condition.word,
        }
        for condition in conditions
    ]


def verdict_of(conditions: Sequence[Judged], *, rule: str, metric: str) -> dict[str, Any]:
    """The summary's verdict from the conditions that decide it."""
    return {
        "word": combined([condition.word for condition in conditions]),
        "rule": rule,
        "threshold": max(condition.threshold for condition in conditions),
        "metric": metric,
    }


def comparisons(
    arms: Mapping[str, Mapping[str, Values]],
    pairs: Sequence[tuple[str, str]],
    *,
    metric: str,
    margin: float,
) -> list[dict[str, Any]]:
    """Every (arm, against) in a metric of which less is better, in words."""
    from dataclasses import asdict

    from experiments.lab.verdict import compare

    return [
        {
            "arm": arm,
            "against": against,
            "metric": metric,
            **asdict(
                compare(
                    arms[arm][metric], arms[against][metric], margin=margin, higher_is_better=False
                )
            ),
        }
        for arm, against in pairs
    ]
