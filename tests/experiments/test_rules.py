"""Conditions on differences per seed, and the word they make together."""

import pytest

from experiments.lab.rules import (
    AtMost,
    Condition,
    answers_of,
    claims_of,
    combined,
    comparisons,
    falls_in_the_mean,
    gaps,
    relative,
    verdict_of,
)


def condition(*values: float | None, sign: int = -1, threshold: float = 0.0) -> Condition:
    return Condition(claim="c", published="p", gaps=values, sign=sign, threshold=threshold)


def test_gaps_are_taken_seed_by_seed_and_leave_missing_ones_out() -> None:
    assert gaps([1.0, 2.0, None], [0.5, None, 1.0]) == (0.5, None, None)
    assert relative([1.0, 3.0, None, 1.0], [4.0, 2.0, 1.0, 0.0]) == (-0.75, 0.5, None, None)


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
    further = condition(-1, -1, -1, threshold=0.2)
    verdict = verdict_of([yes, further], rule="r", metric="m")
    assert verdict == {"word": "REPRODUCED", "rule": "r", "metric": "m"}
    assert [claim["threshold"] for claim in claims_of([yes, further])] == [0.0, 0.2]
    assert [claim["verdict"] for claim in claims_of([yes, no])] == ["REPRODUCED", "NOT REPRODUCED"]


@pytest.mark.parametrize(
    ("costs", "word"),
    [
        ([0.01, -0.3, 0.02], "REPRODUCED"),
        ([0.01, 0.01, 0.03], "INCONCLUSIVE"),
        ([0.021, 0.022, 0.023], "NOT REPRODUCED"),
        ([0.01, 0.01, 0.2], "NOT REPRODUCED"),  # 0.073 in the mean
        ([0.01, None, 0.01], "INCONCLUSIVE"),
    ],
)
def test_a_cost_is_within_its_bound_in_every_seed_or_not(
    costs: list[float | None], word: str
) -> None:
    assert AtMost(claim="c", published="p", gaps=tuple(costs), threshold=0.02).word == word


def test_an_answer_says_the_claim_its_word_and_what_it_rests_on() -> None:
    falls = falls_in_the_mean([[2.0] * 3, [1.5] * 3], claim="It falls", published="p", margin=0.1)
    found = answers_of([condition(-0.2, -0.2, None, -0.2), condition(-1, None), falls])
    assert found == [
        "c: REPRODUCED, -0.200 [-0.200, -0.200], seeds 3.",
        "c: INCONCLUSIVE, -1.000, no interval, seeds 1.",
        "It falls: REPRODUCED, -0.500 (steps of the mean over seeds).",
    ]


def test_less_of_a_loss_is_better_and_what_only_describes_is_higher_or_lower() -> None:
    arms = {"a": {"loss": [1.0, 1.1, 1.2]}, "b": {"loss": [2.0, 2.1, 2.2]}}
    (row,) = comparisons(arms, [("a", "b")], metric="loss", margin=0.1)
    assert (row["arm"], row["against"], row["word"]) == ("a", "b", "BETTER")
    (row,) = comparisons(arms, [("a", "b")], metric="loss", margin=0.1, higher_is_better=None)
    assert row["word"] == "LOWER"
