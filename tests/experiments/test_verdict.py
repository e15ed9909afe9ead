"""Words and intervals: by hand on a few numbers, against scipy, and at the limits."""

import json
import math
from dataclasses import asdict

import pytest

from experiments.lab.verdict import (
    INTERVAL_METHOD,
    compare,
    paired_interval,
    published_verdict,
    t_quantile,
)
from moe.errors import UserError


def test_t_quantile_agrees_with_scipy_for_small_and_large_degrees() -> None:
    stats = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 5, 7, 10, 29, 30, 200):
        for probability in (0.01, 0.4, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9999):
            expected = stats.t.ppf(probability, degrees)
            # Bisection ends at the spacing of floats; tan near pi/2 loses a few digits of it.
            assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9)


def test_t_quantile_has_the_closed_forms_of_one_and_two_degrees() -> None:
    assert t_quantile(0.75, 1) == pytest.approx(1.0)  # Cauchy: tan(pi (p - 1/2))
    assert t_quantile(0.5, 4) == 0.0
    p = 0.975  # two degrees: (2p - 1) / sqrt(2 p (1 - p))
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)))


@pytest.mark.parametrize(("probability", "degrees"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_t_quantile_refuses_what_has_no_quantile(probability: float, degrees: int) -> None:
    with pytest.raises(UserError):
        t_quantile(probability, degrees)


def test_interval_of_one_two_three_is_the_one_computed_by_hand() -> None:
    # mean 2, s 1, n 3, t(0.975, 2) = 4.302653: 2 +- 4.302653 / sqrt(3)
    low, high = paired_interval([1.0, 2.0, 3.0])  # type: ignore[misc]
    assert low == pytest.approx(2 - 4.3026527 / math.sqrt(3), abs=1e-6)
    assert high == pytest.approx(2 + 4.3026527 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize("values", [[], [0.4], [0.4, 0.5]])
def test_fewer_than_three_values_have_no_interval(values: list[float]) -> None:
    assert paired_interval(values) is None


def test_equal_values_have_an_interval_of_width_zero() -> None:
    assert paired_interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_interval_refuses_values_that_are_not_finite_and_levels_outside_0_1() -> None:
    with pytest.raises(UserError, match="finite"):
        paired_interval([1.0, math.nan, 2.0])
    with pytest.raises(UserError, match="level"):
        paired_interval([1.0, 2.0, 3.0], level=95)


def test_difference_is_arm_minus_against_whichever_way_is_better() -> None:
    arm, against = [2.0, 3.0, 4.0], [1.0, 1.9, 3.1]
    up = compare(arm, against, margin=0.0, higher_is_better=True)
    down = compare(arm, against, margin=0.0, higher_is_better=False)
    assert up.per_seed == pytest.approx((1.0, 1.1, 0.9))
    assert up.mean_difference == pytest.approx(1.0)
    assert up.interval95 == down.interval95
    assert (up.word, down.word) == ("BETTER", "WORSE")
    assert (up.n, up.interval_method) == (3, INTERVAL_METHOD)


def test_negative_differences_are_worse_when_more_is_better() -> None:
    arm, against = [1.0, 1.9, 3.1], [2.0, 3.0, 4.0]
    assert compare(arm, against, margin=9.0, higher_is_better=True).word == "WORSE"
    assert compare(arm, against, margin=9.0, higher_is_better=False).word == "BETTER"


def test_equivalent_uses_the_90_percent_interval_against_the_margin() -> None:
    # Differences -1, 0, 1: the half-width is t / sqrt(3), 1.686 at 90 % and 2.484 at 95 %.
    values, zeros = [-1.0, 0.0, 1.0], [0.0, 0.0, 0.0]
    assert compare(values, zeros, margin=1.69, higher_is_better=True).word == "EQUIVALENT"
    assert compare(values, zeros, margin=1.68, higher_is_better=True).word == "UNRESOLVED"


def test_a_sure_difference_inside_the_margin_keeps_its_sign_as_the_word() -> None:
    result = compare([0.011, 0.010, 0.009], [0.0, 0.0, 0.0], margin=0.5, higher_is_better=True)
    assert result.word == "BETTER"


def test_identical_arms_are_equivalent_even_at_margin_zero() -> None:
    result = compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], margin=0.0, higher_is_better=True)
    assert (result.mean_difference, result.interval95, result.word) == (0, (0, 0), "EQUIVALENT")


def test_the_same_gap_in_every_seed_is_better_with_a_zero_width_interval() -> None:
    result = compare([1.5, 2.5, 3.5], [1.0, 2.0, 3.0], margin=0.1, higher_is_better=True)
    assert (result.interval95, result.word) == ((0.5, 0.5), "BETTER")


def test_two_seeds_are_unresolved_however_far_apart() -> None:
    result = compare([9.0, 9.0], [1.0, 1.0], margin=0.1, higher_is_better=True)
    assert (result.n, result.mean_difference, result.interval95) == (2, 8.0, None)
    assert result.word == "UNRESOLVED"
    assert "no interval" in result.interval_method


def test_missing_and_diverged_seeds_are_left_out_on_both_sides() -> None:
    result = compare(
        [1.0, None, 3.0, 4.0, math.nan, 6.0],
        [0.0, 1.0, None, 3.0, 1.0, 5.0],
        margin=0.0,
        higher_is_better=True,
    )
    assert result.per_seed == (1.0, None, None, 1.0, None, 1.0)
    assert (result.n, result.mean_difference, result.word) == (3, 1.0, "BETTER")


def test_no_pair_at_all_gives_no_mean() -> None:
    result = compare([None], [1.0], margin=0.0, higher_is_better=True)
    assert (result.n, result.mean_difference, result.word) == (0, None, "UNRESOLVED")


def test_comparison_becomes_plain_json() -> None:
    result = compare([1.0, None], [0.0, 1.0], margin=0.5, higher_is_better=True)
    row = json.loads(json.dumps(asdict(result), allow_nan=False))
    assert row["per_seed"] == [1.0, None]
    assert row["interval95"] is None


def test_unpaired_lengths_and_bad_margins_are_named() -> None:
    with pytest.raises(UserError, match="there are 3 and 2"):
        compare([1.0, 2.0, 3.0], [1.0, 2.0], margin=0.0, higher_is_better=True)
    with pytest.raises(UserError, match=r"margin is -0\.1"):
        compare([1.0], [1.0], margin=-0.1, higher_is_better=True)


@pytest.mark.parametrize(
    ("differences", "sign", "threshold", "word"),
    [
        ([0.2, 0.3, 0.4], +1, 0.3, "REPRODUCED"),  # all positive, mean 0.3 reaches 0.3
        ([-0.2, -0.3, -0.4], -1, 0.29, "REPRODUCED"),
        ([0.2, 0.3, 0.4], +1, 0.31, "INCONCLUSIVE"),  # the sign, not the size
        ([0.9, 0.9, -0.1], +1, 0.3, "INCONCLUSIVE"),  # the size, not every sign
        ([0.9, 0.9, 0.0], +1, 0.3, "INCONCLUSIVE"),  # zero has no sign
        ([-0.1, -0.1, -0.1], +1, 0.3, "NOT REPRODUCED"),  # all opposite, however small
        ([0.1, -0.9, -0.9], +1, 0.3, "NOT REPRODUCED"),  # mean -0.567 the other way
        ([0.1, -0.3, -0.3], +1, 0.3, "INCONCLUSIVE"),
        ([0.5, 0.5], +1, 0.1, "INCONCLUSIVE"),  # two seeds, either way
        ([-0.5, -0.5], +1, 0.1, "INCONCLUSIVE"),
        ([0.5, None, 0.5], +1, 0.1, "INCONCLUSIVE"),
        ([0.5, None, 0.5, 0.5], +1, 0.1, "REPRODUCED"),
        ([0.0, 0.0, 0.0], +1, 0.0, "INCONCLUSIVE"),
        ([0.1, -0.9, -0.9], +1, 0.0, "INCONCLUSIVE"),  # the sign alone asks every seed
        ([-0.1, -0.9, -0.9], +1, 0.0, "NOT REPRODUCED"),
    ],
)
def test_published_verdict_follows_its_rule(
    differences: list[float | None], sign: int, threshold: float, word: str
) -> None:
    assert published_verdict(differences, published_sign=sign, threshold=threshold) == word


def test_published_verdict_refuses_a_sign_that_is_none() -> None:
    with pytest.raises(UserError, match=r"\+1 or -1"):
        published_verdict([1.0, 1.0, 1.0], published_sign=0, threshold=0.1)
    with pytest.raises(UserError, match="threshold"):
        published_verdict([1.0, 1.0, 1.0], published_sign=1, threshold=-0.1)
