"""How far raters agree who judged the same things: raw share, Cohen's kappa, Krippendorff's alpha.

The decision to know: a coefficient that chance leaves undefined (every rating is the same word, so
agreement could not have been otherwise) is None, never 1: such ratings say nothing about raters.
Ratings are words without an order (nominal).
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two raters on the items that both rated.

    share: of equal ratings; kappa: None where chance alone would give agreement 1.
    """

    share: float
    kappa: float | None
    num_items: int


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> Agreement:
    """(p_o - p_e) / (1 - p_e), with p_e from each rater's own frequencies (Cohen 1960).

    first[i] and second[i] are of one item. Raises ValueError without items or for unequal lengths.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} ratings: need as many, and at least one")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    ours, theirs = Counter(first), Counter(second)
    # Counts, so that "expected is 1" is a comparison of integers.
    chance = sum(ours[word] * theirs[word] for word in ours)
    kappa = None if chance == n * n else (observed - chance / n**2) / (1 - chance / n**2)
    return Agreement(share=observed, kappa=kappa, num_items=n)


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Any number of raters. alpha: None where all ratings that count are the same word.

    num_items: those with two ratings or more, which alone count; num_ratings: theirs.
    """

    alpha: float | None
    num_items: int
    num_ratings: int


def krippendorffs_alpha(items: Sequence[Sequence[Hashable]]) -> Reliability:
    """1 - D_o / D_e for nominal ratings (Krippendorff 2011, "Computing Krippendorff's alpha").

    items[i]: the ratings that item i got, by however many raters and in any order. Of an item with
    m ratings each ordered pair of them weighs 1 / (m - 1), so that each rating weighs 1.
    """
    rated = [Counter(ratings) for ratings in items if len(ratings) >= 2]
    totals: Counter[Hashable] = Counter()
    for counts in rated:
        totals.update(counts)
    n = totals.total()
    unlike = n * n - sum(count * count for count in totals.values())
    if unlike == 0:
        return Reliability(alpha=None, num_items=len(rated), num_ratings=n)
    disagreement = 0.0
    for counts in rated:
        m = counts.total()
        disagreement += (m * m - sum(count * count for count in counts.values())) / (m - 1)
    observed, expected = disagreement / n, unlike / (n * (n - 1))
    return Reliability(alpha=1 - observed / expected, num_items=len(rated), num_ratings=n)
