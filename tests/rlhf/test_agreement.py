"""Intervals of shares and agreement of raters, by hand and against their definitions."""

import itertools
import random

import pytest

from rlhf.agreement import cohens_kappa, krippendorffs_alpha
from rlhf.intervals import wilson_interval


def test_wilson_by_hand_with_z_2() -> None:
    # 8 of 10: middle 0.8 + 4/20 = 1; spread 2 * sqrt(0.16/10 + 4/400); both over 1 + 4/10.
    low, high = wilson_interval(8, 10, z=2.0)
    spread = 2 * 0.026**0.5
    assert (low, high) == pytest.approx(((1 - spread) / 1.4, (1 + spread) / 1.4), abs=1e-12)
    # 0 of 4: middle 0.5, spread 2 * sqrt(4/64) = 0.5, scale 2.
    assert wilson_interval(0, 4, z=2.0) == pytest.approx((0.0, 0.5), abs=1e-12)


def test_wilson_is_the_set_of_shares_that_a_score_test_keeps() -> None:
    for successes, n in ((1, 7), (3, 9), (5.5, 12), (11, 12)):
        for bound in wilson_interval(successes, n):
            z = (successes / n - bound) / (bound * (1 - bound) / n) ** 0.5
            assert abs(z) == pytest.approx(1.959964, rel=1e-9)


def test_kappa_of_a_two_by_two_table_by_hand() -> None:
    # 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed 0.7, by chance (25*30 + 25*20)/50^2 = 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = cohens_kappa(first, second)
    assert (found.share, found.num_items) == (0.7, 50)
    assert found.kappa == pytest.approx(0.4, abs=1e-12)


def test_kappa_is_one_for_equal_raters_minus_one_for_opposite_ones_and_symmetric() -> None:
    words = ["a", "b", "a", "b"]
    opposite = ["b", "a", "b", "a"]
    assert cohens_kappa(words, words).kappa == pytest.approx(1.0)
    assert cohens_kappa(words, opposite).kappa == pytest.approx(-1.0)
    one, two = ["a", "b", "c", "a", "b"], ["a", "c", "c", "b", "b"]
    assert cohens_kappa(one, two).kappa == pytest.approx(cohens_kappa(two, one).kappa)


def test_kappa_is_undefined_where_everybody_always_says_the_same_word() -> None:
    found = cohens_kappa(["a", "a"], ["a", "a"])
    assert found.share == 1.0 and found.kappa is None


@pytest.mark.parametrize(("first", "second"), [([], []), (["a"], ["a", "b"])])
def test_kappa_refuses_nothing_and_unequal_lengths(first: list[str], second: list[str]) -> None:
    with pytest.raises(ValueError, match="ratings"):
        cohens_kappa(first, second)


# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: nominal alpha 0.743.
PUBLISHED = (
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
)


def columns(raters: tuple[str, ...]) -> list[list[str]]:
    rows = [row.split() for row in raters]
    return [[word for word in item if word != "."] for item in zip(*rows, strict=True)]


def test_alpha_of_the_published_example() -> None:
    found = krippendorffs_alpha(columns(PUBLISHED))
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    # The last unit has one rating, which counts for nothing.
    assert (found.num_items, found.num_ratings) == (11, 40)


def alpha_by_pairs(items: list[list[str]]) -> float:
    """The definition: each ordered pair of an item's ratings against each pair of all ratings."""
    items = [item for item in items if len(item) > 1]
    every = [word for item in items for word in item]
    observed = sum(
        (a != b) / (len(item) - 1) for item in items for a, b in itertools.permutations(item, 2)
    ) / len(every)
    chance = [a != b for a, b in itertools.permutations(every, 2)]
    return 1 - observed / (sum(chance) / len(chance))


def test_alpha_is_its_definition_with_ratings_missing() -> None:
    rng = random.Random(0)
    for _ in range(20):
        items = [rng.choices("AB=", k=rng.randint(0, 4)) for _ in range(12)] + [["A", "B"]]
        assert krippendorffs_alpha(items).alpha == pytest.approx(alpha_by_pairs(items), abs=1e-12)


def test_alpha_of_two_raters_by_hand() -> None:
    # No disagreement: D_o = 0.
    assert krippendorffs_alpha([["A", "A"], ["B", "B"]]).alpha == pytest.approx(1.0)
    # AA, AB: D_o = 2/4, D_e = (3*1 + 1*3)/(4*3) = 1/2, so alpha 0.
    assert krippendorffs_alpha([["A", "A"], ["A", "B"]]).alpha == pytest.approx(0.0)


@pytest.mark.parametrize("items", [[], [["A"]], [["A", "A"], ["A", "A", "A"]]])
def test_alpha_is_undefined_where_nothing_could_have_differed(items: list[list[str]]) -> None:
    assert krippendorffs_alpha(items).alpha is None
