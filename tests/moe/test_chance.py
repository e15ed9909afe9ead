"""Chance levels: p-values by hand, shufflings that keep texts whole."""

import pytest
import torch

from moe.chance import order_within, p_value, p_values


def test_the_p_value_counts_the_observation_itself() -> None:
    assert p_value(5.0, [1.0] * 99) == 0.01
    assert p_value(5.0, [5.0, 9.0, 1.0]) == 0.75
    assert p_value(0.0, [0.0] * 9) == 1.0


def test_every_column_has_its_own_p_value() -> None:
    shuffled_PL = torch.tensor([[0.0, 9.0], [2.0, 9.0], [0.0, 0.0]])
    assert p_values(torch.tensor([1.0, 1.0]), shuffled_PL) == [0.5, 0.75]


def test_equal_sums_in_another_order_reach_the_observation() -> None:
    assert p_value(0.1 + 0.2 + 0.3, [0.3 + 0.2 + 0.1] * 9) == 1.0


def test_tokens_are_shuffled_within_their_sequences_and_come_back_with_their_seed() -> None:
    sequence_T = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 2, 5])
    options = {"purpose": "test", "seed": 3}
    order = order_within(sequence_T, **options, number=0)  # type: ignore[arg-type]
    assert sorted(order.tolist()) == list(range(10))
    assert torch.equal(sequence_T[order], sequence_T)
    assert torch.equal(order, order_within(sequence_T, **options, number=0))  # type: ignore[arg-type]
    others = [order_within(sequence_T, **options, number=n) for n in range(1, 9)]  # type: ignore[arg-type]
    assert any(not torch.equal(order, other) for other in others)


def test_every_order_of_a_sequence_is_equally_likely() -> None:
    seen = [
        tuple(order_within(torch.zeros(3).long(), purpose="test", seed=0, number=n).tolist())
        for n in range(600)
    ]
    # 600 draws over 6 orders: 100 each, a standard deviation of 9.
    assert len(set(seen)) == 6
    assert all(seen.count(order) == pytest.approx(100, abs=45) for order in set(seen))
