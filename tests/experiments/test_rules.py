"""Conditions on differences per seed, and the word they make together."""

import pytest

from experiments.lab.rules import (
    Condition,
    claims_of,
    combined,
    comparisons,
    falls_in_the_mean,
    gaps,
    less,
    verdict_of,
)


def condition(*values: float | None, sign: int = -1, threshold: float = 0.0) -> Condition:
    return Condition(claim="c", published="p", gaps=values, sign=sign, threshold=threshold)


def test_gaps_are_taken_seed_by_seed_and_leave_missing_ones_out() -> None:
    assert gaps([1.0, 2.0, None], [0.5, None, 1.0]) == (0.5, None, None)
    assert gaps([1.0], [4.0], times=0.5) == (-1.0,)
    assert less([0.25, None], 0.5) == (-0.25, None)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (condition(-0.3, -0.2, -0.25, threshold=0.2), "REPRODUCED"),
        (condition(-0.1, -0.1, -0.1, threshold=0.2), "INCONCLUSIVE"),
        (condition(-0.3, 0.1, -0.4), "INCONCLUSIVE"),
        (condition(0.1, 0.2, 0.3), "NOT REPRODUCED"),
        (condition(-0.3, -0.3), "INCONCLUSIVE"),
        (condition(0.2, 0.3, 0.1, sign=1, threshold=0.1), "REPRODUCED"),
    ],
)
def test_a_condition_needs_every_seed_and_its_threshold(found: Condition, word: str) -> None:
    assert found.word == word


@pytest.mark.parametrize(
    ("means", "word"),
    [
        ([3.0, 2.0, 1.0], "REPRODUCED"),
        ([3.0, 2.0, 2.01], "INCONCLUSIVE"),
        ([3.0, 2.0, 2.02], "NOT REPRODUCED"),
    ],
)
def test_a_row_of_means_falls_at_every_step_or_not(means: list[float], word: str) -> None:
    row = [[mean - 0.5, mean, mean + 0.5] for mean in means]
    found = falls_in_the_mean(row, claim="c", published="p", margin=0.02)
    # A difference of floats may be a rounding below the margin, which is not what is tested here.
    assert found.gaps == pytest.approx([b - a for a, b in zip(means, means[1:], strict=False)])
    assert found.word == word or found.gaps[-1] == pytest.approx(0.02)


def test_a_fall_of_two_seeds_or_of_a_missing_one_is_open() -> None:
    two = falls_in_the_mean([[2.0, 2.0], [1.0, 1.0]], claim="c", published="p", margin=0.0)
    gone = falls_in_the_mean([[None] * 3, [1.0] * 3], claim="c", published="p", margin=0.0)
    assert two.word == gone.word == "INCONCLUSIVE"


def test_one_contradicted_condition_decides_and_one_open_one_leaves_it_open() -> None:
    yes, no, unsure = condition(-1, -1, -1), condition(1, 1, 1), condition(-1, 1, -1)
    assert combined([yes.word, yes.word]) == "REPRODUCED"
    assert combined([yes.word, unsure.word]) == "INCONCLUSIVE"
    assert combined([yes.word, unsure.word, no.word]) == "NOT REPRODUCED"
    assert combined([]) == "INCONCLUSIVE"
    verdict = verdict_of([yes, condition(-1, -1, -1, threshold=0.2)], rule="r", metric="m")
    assert verdict == {"word": "REPRODUCED", "rule": "r", "threshold": 0.2, "metric": "m"}
    assert [claim["verdict"] for claim in claims_of([yes, no])] == ["REPRODUCED", "NOT REPRODUCED"]


def test_less_of_a_loss_is_better() -> None:
    arms = {"a": {"loss": [1.0, 1.1, 1.2]}, "b": {"loss": [2.0, 2.1, 2.2]}}
    (row,) = comparisons(arms, [("a", "b")], metric="loss", margin=0.1)
    assert (row["arm"], row["against"], row["word"]) == ("a", "b", "BETTER")
