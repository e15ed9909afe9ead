"""Distinct-2 of a set of answers, against counting."""

import random

import pytest
import torch
from torch import Tensor

from rlhf.repetition import distinct_share


def counted(response_BR: Tensor, mask_BR: Tensor) -> float:
    bigrams = []
    for ids, mask in zip(response_BR.tolist(), mask_BR.tolist(), strict=True):
        for i in range(len(ids) - 1):
            if mask[i] and mask[i + 1]:
                bigrams.append((ids[i], ids[i + 1]))
    return len(set(bigrams)) / len(bigrams) if bigrams else 1.0


def test_by_hand() -> None:
    response = torch.tensor([[1, 2, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    # 12 21 12 and 12: two of four.
    assert float(distinct_share(response, mask)) == 0.5


def test_it_counts_as_a_loop_does() -> None:
    rng = random.Random(0)
    for _ in range(50):
        rows, columns, vocabulary = rng.randrange(1, 6), rng.randrange(1, 9), rng.randrange(1, 6)
        response = torch.tensor(
            [[rng.randrange(vocabulary) for _ in range(columns)] for _ in range(rows)]
        )
        lengths = torch.tensor([rng.randrange(0, columns + 1) for _ in range(rows)])
        mask = torch.arange(columns) < lengths[:, None]
        assert float(distinct_share(response, mask)) == pytest.approx(counted(response, mask))


def test_answers_without_two_tokens_repeat_nothing() -> None:
    assert float(distinct_share(torch.tensor([[3], [4]]), torch.ones(2, 1))) == 1.0
    assert float(distinct_share(torch.tensor([[3, 0]]), torch.tensor([[1, 0]]))) == 1.0
