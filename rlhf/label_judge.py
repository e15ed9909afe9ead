"""A model in the rater's chair: each pair in both orders, votes in the same files.

The decision to know: a pair counts for a side only when both orders say so. What changes with the
order is a tie, and how often that happened is part of the report. The judge is one rater more in
the votes file, so its agreement with people is measured where they judged the same pairs.
"""

from collections.abc import Sequence

from rlhf.judge import Referee
from rlhf.label_files import LabelFiles, Outcome, Pair, Vote
from sft.text import conversation_text

PREFIX = "judge:"  # of a rater's name
CHUNK = 16  # pairs between two writes


def judge_pairs(
    pairs: Sequence[Pair], referee: Referee, *, rater: str, files: LabelFiles
) -> tuple[int, int]:
    """Vote on the pairs that this judge has not seen; (newly judged, of them unreadable).

    An unreadable reply in either order makes the pair a skip.
    """
    done = {vote.key for vote in files.read_votes() if vote.rater == rater}
    left = [pair for pair in pairs if pair.key not in done]
    unreadable = 0
    for start in range(0, len(left), CHUNK):
        some = left[start : start + CHUNK]
        prompts = [conversation_text(pair.prompt) for pair in some]
        ours, theirs = [pair.a.text for pair in some], [pair.b.text for pair in some]
        a_first = referee.prefer(prompts, ours, theirs)
        b_first = referee.prefer(prompts, theirs, ours)
        for pair, one, two in zip(some, a_first, b_first, strict=True):
            both = None if one is None or two is None else (one, two)
            unreadable += both is None
            files.append(
                Vote(key=pair.key, rater=rater, outcome=outcome(both), first_probability=both)
            )
        files.rebuild(pairs)
    return len(left), unreadable


def outcome(first_probability: tuple[float, float] | None) -> Outcome:
    """The winner where both orders name the same one; skip without a reply."""
    if first_probability is None:
        return "skip"
    with_a_first, with_b_first = first_probability
    if with_a_first > 0.5 > with_b_first:
        return "A"
    if with_a_first < 0.5 < with_b_first:
        return "B"
    return "tie"
