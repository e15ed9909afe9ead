"""Random numbers depend on their names alone."""

import pytest
import torch

from moe.counters import permutation, stream, uniforms


def test_a_row_has_the_same_numbers_in_any_company() -> None:
    together = uniforms(1, "sample", [4, 7, 2], length=6)
    assert torch.equal(together[1:2], uniforms(1, "sample", [7], length=6))


def test_a_longer_draw_begins_like_a_shorter_one() -> None:
    assert torch.equal(
        uniforms(1, "sample", [3], length=9)[:, :4], uniforms(1, "sample", [3], length=4)
    )


def test_seed_purpose_and_row_each_change_the_numbers() -> None:
    draws = [
        uniforms(1, "sample", [0], length=4),
        uniforms(2, "sample", [0], length=4),
        uniforms(1, "other", [0], length=4),
        uniforms(1, "sample", [1], length=4),
    ]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) == 4


def test_numbers_lie_in_the_unit_interval_and_look_even() -> None:
    drawn = uniforms(0, "sample", range(100), length=100)
    assert drawn.dtype == torch.float64 and 0 <= drawn.min() and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01


def test_no_rows_give_an_empty_draw() -> None:
    assert uniforms(0, "sample", [], length=5).shape == (0, 5)


def test_a_permutation_holds_every_index_and_depends_on_the_counter() -> None:
    first, second = (permutation(0, "epoch", epoch, length=50) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second and first == permutation(0, "epoch", 0, length=50)


def test_a_fourth_counter_is_refused_and_not_dropped() -> None:
    with pytest.raises(ValueError, match="4 counters for 'epoch': there is room for 3"):
        stream(0, "epoch", 1, 2, 3, 4)
