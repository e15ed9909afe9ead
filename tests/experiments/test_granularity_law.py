"""The law L(G) = g / G^y + h: what is put in is found again, and what cannot be told is said."""

import pytest

from experiments.lab.granularity_law import BOOTSTRAPS, bootstrap, fit_law

POINTS = (1, 2, 4, 8)


@pytest.mark.parametrize(("g", "y", "h"), [(0.5, 0.6, 1.2), (0.2, 2.0, 1.5), (-0.3, 1.0, 2.0)])
def test_a_curve_of_the_law_gives_its_numbers_back(g: float, y: float, h: float) -> None:
    found = fit_law(POINTS, [g / point**y + h for point in POINTS])
    assert (found.g, found.y, found.h) == pytest.approx((g, y, h))
    assert found.residual == pytest.approx(0.0, abs=1e-9)
    assert found.levels_off(margin=0.02) == (g > 0)


def test_a_gain_that_grows_with_every_split_does_not_level_off() -> None:
    found = fit_law(POINTS, [2.0, 1.9, 1.7, 1.3])  # y -1: each split gains twice the last
    assert (found.y, found.g, found.h) == pytest.approx((-1.0, -0.1, 2.1))
    assert not found.levels_off(margin=0.02)


def test_a_loss_that_is_flat_after_one_split_says_that_no_finite_exponent_is_best() -> None:
    found = fit_law(POINTS, [2.0, 1.8, 1.8, 1.8])
    assert found.at_end and not found.levels_off(margin=0.02)
    assert not fit_law(POINTS, [2.0, 1.8, 1.7, 1.65]).at_end


def test_a_loss_that_rises_again_does_not_level_off() -> None:
    found = fit_law(POINTS, [2.0, 1.7, 1.65, 1.68])
    assert found.g > 0 and found.y > 0 and not found.at_end
    assert found.largest_rise == pytest.approx(0.03) and not found.levels_off(margin=0.02)
    assert fit_law(POINTS, [2.0, 1.7, 1.65, 1.66]).levels_off(margin=0.02)


def test_two_points_are_refused() -> None:
    with pytest.raises(ValueError, match="2 points"):
        fit_law([1, 2], [2.0, 1.8])


def test_resamplings_of_equal_seeds_are_the_fit_itself_and_come_out_the_same_twice() -> None:
    curve = [2.0, 1.8, 1.7, 1.65]
    laws = bootstrap(POINTS, [curve, curve, curve])
    assert len(laws) == BOOTSTRAPS
    assert {law.y for law in laws} == {fit_law(POINTS, curve).y}
    mixed = [curve, [2.1, 1.8, 1.75, 1.6], [1.9, 1.85, 1.7, 1.7]]
    assert bootstrap(POINTS, mixed) == bootstrap(POINTS, mixed)
