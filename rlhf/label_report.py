"""What the votes say: win rate, position bias, agreement; as numbers and as lines.

The decision to know: the win rate counts prompts, not votes. A prompt that three raters judged is
one draw with a value between 0 and 1, so that more raters do not make the interval of the win rate
narrower than its prompts allow. Identical answers are ties of the win rate (the models are equal
there) and no part of agreement (nobody looked).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from rlhf.agreement import Agreement, Reliability, cohens_kappa, krippendorffs_alpha
from rlhf.intervals import wilson_interval
from rlhf.label_files import JUDGED, Outcome, Pair, Vote, is_usable

INTERVAL = "Wilson, 95 %"
WORTH: Mapping[Outcome, float] = {"A": 1.0, "B": 0.0, "tie": 0.5, "identical": 0.5}


@dataclass(frozen=True, kw_only=True)
class Share:
    """A proportion of n with its Wilson interval; n is 1 or more."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share(successes: float, n: int) -> Share | None:
    """None of nothing."""
    if n == 0:
        return None
    low, high = wilson_interval(successes, n)
    return Share(value=successes / n, low=low, high=high, n=n)


@dataclass(frozen=True, kw_only=True)
class RaterReport:
    """One rater. wins: of A, ties half; first: chosen answers that stood first, of those decided.

    consistent: of a judge, pairs where both orders gave the same winner.
    """

    rater: str
    counts: dict[str, int]
    wins: Share | None
    first: Share | None
    consistent: Share | None


@dataclass(frozen=True, kw_only=True)
class PairOfRaters:
    """Two raters on the prompts that both judged: A, B or tie."""

    raters: tuple[str, str]
    agreement: Agreement


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """All raters. wins: of A over the prompts, each the mean of its votes, ties half."""

    a: str
    b: str
    num_prompts: int
    interval: str
    wins: Share | None
    raters: tuple[RaterReport, ...]
    pairs_of_raters: tuple[PairOfRaters, ...]
    reliability: Reliability | None
    num_preferences: int
    num_unusable: int

    def lines(self) -> list[str]:
        """The report for a reader; the first place where A and B have names."""
        lines = [f"A is {self.a}", f"B is {self.b}"]
        for one in self.raters:
            lines += _told_rater(one)
        if self.wins is None:
            lines.append("No vote yet: there is no win rate.")
        else:
            lines.append(
                f"A over B: {self.wins} on {self.wins.n} of {self.num_prompts} prompts "
                f"(ties half; {self.interval})"
            )
        for pair in self.pairs_of_raters:
            found = pair.agreement
            lines.append(
                f"{pair.raters[0]} and {pair.raters[1]} on {found.num_items} shared prompts: "
                f"equal {found.share:.3f}, Cohen's kappa {_coefficient(found.kappa)}"
            )
        if self.reliability is not None:
            lines.append(
                f"Krippendorff's alpha (nominal) {_coefficient(self.reliability.alpha)} over "
                f"{self.reliability.num_items} prompts with two votes or more"
            )
        if self.num_unusable:
            lines.append(
                f"{self.num_unusable} preferences over an empty answer: in the votes, not in the "
                "file for training"
            )
        return lines


def _told_rater(one: RaterReport) -> list[str]:
    counts = one.counts
    told = ", ".join(
        f"{word} {counts.get(name, 0)}"
        for name, word in (
            *(("A", "A"), ("B", "B"), ("tie", "tie")),
            *(("identical", "identical (not asked, ties)"), ("skip", "skipped")),
        )
        if counts.get(name) or name in ("A", "B", "tie")
    )
    lines = [f"{one.rater}: {told}"]
    if one.wins is not None:
        lines[0] += f"; A over B {one.wins}"
    if one.first is not None:
        lines.append(f"  the answer shown first was chosen {one.first} of {one.first.n} decided")
    if one.consistent is not None:
        lines.append(
            f"  the same winner in both orders {one.consistent} of {one.consistent.n} pairs; the "
            "others are ties"
        )
    return lines


def _coefficient(value: float | None) -> str:
    return "undefined (all ratings are the same)" if value is None else f"{value:.3f}"


def label_report(votes: Sequence[Vote], pairs: Sequence[Pair], *, a: str, b: str) -> LabelReport:
    """votes: those that hold, at most one a rater and prompt."""
    known = {pair.key: pair for pair in pairs}
    votes = [vote for vote in votes if vote.key in known]
    raters = list(dict.fromkeys(vote.rater for vote in votes))
    decided = [vote for vote in votes if vote.outcome in ("A", "B")]
    return LabelReport(
        a=a,
        b=b,
        num_prompts=len(pairs),
        interval=INTERVAL,
        wins=_wins(votes),
        raters=tuple(_of_rater([v for v in votes if v.rater == name]) for name in raters),
        pairs_of_raters=_pairs_of_raters(votes, raters),
        reliability=_reliability(votes),
        num_preferences=sum(is_usable(known[vote.key]) for vote in decided),
        num_unusable=sum(not is_usable(known[vote.key]) for vote in decided),
    )


def _wins(votes: Iterable[Vote]) -> Share | None:
    worth: dict[str, list[float]] = {}
    for vote in votes:
        if vote.outcome in WORTH:
            worth.setdefault(vote.key, []).append(WORTH[vote.outcome])
    return share(sum(map(fmean, worth.values())), len(worth))


def _of_rater(votes: Sequence[Vote]) -> RaterReport:
    placed = [vote for vote in votes if vote.first and vote.outcome in ("A", "B")]
    swapped = [vote for vote in votes if vote.first_probability]
    return RaterReport(
        rater=votes[0].rater,
        counts=dict(Counter(vote.outcome for vote in votes)),
        wins=_wins(votes),
        first=share(sum(vote.outcome == vote.first for vote in placed), len(placed)),
        consistent=share(sum(vote.outcome in ("A", "B") for vote in swapped), len(swapped)),
    )


def _judged_by(votes: Iterable[Vote], rater: str) -> dict[str, Outcome]:
    return {v.key: v.outcome for v in votes if v.rater == rater and v.outcome in JUDGED}


def _pairs_of_raters(votes: Sequence[Vote], raters: Sequence[str]) -> tuple[PairOfRaters, ...]:
    found = []
    for one, two in combinations(raters, 2):
        ours, theirs = _judged_by(votes, one), _judged_by(votes, two)
        shared = [key for key in ours if key in theirs]
        if shared:
            agreement = cohens_kappa([ours[k] for k in shared], [theirs[k] for k in shared])
            found.append(PairOfRaters(raters=(one, two), agreement=agreement))
    return tuple(found)


def _reliability(votes: Iterable[Vote]) -> Reliability | None:
    """None where no prompt has two votes."""
    items: dict[str, list[Outcome]] = {}
    for vote in votes:
        if vote.outcome in JUDGED:
            items.setdefault(vote.key, []).append(vote.outcome)
    found = krippendorffs_alpha(list(items.values()))
    return found if found.num_items else None
