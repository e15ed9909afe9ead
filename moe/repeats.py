"""How often a token's expert is chosen again by the next token, beside two chance levels.

The decision to know: "more than 1 in E" is no finding where experts are unevenly used, and "more
than usage gives" is none where texts differ. So a rate stands beside the rate of independent tokens
with the same use (usage null), and beside that of the same tokens in another order within their
texts (shuffle null): only what exceeds the second is about neighbourhood.

Shapes: L MoE layers, T tokens, C choices that count (1 or 2), E experts, K experts per token,
P shufflings.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moe.chance import order_within, p_values

PURPOSE = "repeats"


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Share of neighbouring tokens that have an expert in common, per layer, float64.

    rate_L: the share found. usage_null_L: of independent tokens with the same use.
    shuffle_null_L: expected over all orders of each text's tokens, exact. shuffled_PL: in P of
    those orders; p_value: one-sided, of the rate among them.
    num_pairs: neighbours counted.
    """

    rate_L: Tensor
    usage_null_L: Tensor
    shuffle_null_L: Tensor
    shuffled_PL: Tensor
    p_value: tuple[float, ...]
    num_pairs: int


def repeats(
    expert_LTK: Tensor,
    sequence_T: Tensor,
    *,
    num_experts: int,
    choices: Literal[1, 2] = 1,
    permutations: int = 99,
    seed: int = 0,
) -> Repeats:
    """The repeats of the first choice, or of the first two (Jiang et al. 2024, Mixtral, table 5).

    expert_LTK: expert ids, best first, of real tokens in order. sequence_T: int64, not falling:
    the text of each token; the last token of one and the first of the next are no neighbours.
    choices: 1 asks whether the first choice is the same; 2 whether the two sets of first and
    second choice meet. Independent tokens with even use: 1/E, and 1 - (E-2)(E-3) / (E(E-1)).
    Raises ValueError for 2 choices of a top-1 router, and where no token has a neighbour.
    """
    if choices > expert_LTK.shape[-1]:
        raise ValueError(f"{choices} choices of a router with top_k {expert_LTK.shape[-1]}")
    follows_T = sequence_T[1:] == sequence_T[:-1]
    num_pairs = int(follows_T.sum())
    if not num_pairs:
        raise ValueError("no token follows another in its text: give longer texts")
    set_LTC = expert_LTK[..., :choices].sort(dim=-1).values
    columns = [column_LT.contiguous() for column_LT in set_LTC.unbind(dim=-1)]

    def rate_L(here: Sequence[Tensor]) -> Tensor:
        return (_meet(here) & follows_T).sum(dim=-1).double() / num_pairs

    found_L = rate_L(columns)
    orders = (
        order_within(sequence_T, seed=seed, purpose=PURPOSE, number=number)
        for number in range(permutations)
    )
    shuffled = [rate_L([column[:, order_T] for column in columns]) for order_T in orders]
    shuffled_PL = torch.stack(shuffled) if shuffled else found_L.new_zeros(0, len(found_L))
    nulls = [_nulls(set_TC, sequence_T, num_experts=num_experts) for set_TC in set_LTC.long()]
    return Repeats(
        rate_L=found_L,
        usage_null_L=torch.tensor([usage for usage, _ in nulls], dtype=torch.float64),
        shuffle_null_L=torch.tensor([met for _, met in nulls], dtype=torch.float64) / num_pairs,
        shuffled_PL=shuffled_PL,
        p_value=tuple(p_values(found_L, shuffled_PL)),
        num_pairs=num_pairs,
    )


def _meet(columns: Sequence[Tensor]) -> Tensor:
    """Whether each token's set shares an expert with the set before it, bool (L, T - 1)."""
    met_LT = columns[0][:, 1:] == columns[0][:, :-1]
    for i, now in enumerate(columns):
        for j, before in enumerate(columns):
            if (i, j) != (0, 0):
                met_LT |= now[:, 1:] == before[:, :-1]
    return met_LT


def _nulls(set_TC: Tensor, sequence_T: Tensor, *, num_experts: int) -> tuple[float, float]:
    """(usage null, expected meetings over all orders within the sequences) of one layer.

    Sets of up to two experts meet in as many as they share, less one where they are equal: so
    P(meet) = sum_i P(i)^2 - [C = 2] sum_A P(A)^2 over experts i and sets A.
    """
    num_tokens, num_choices = set_TC.shape
    whole_T = torch.zeros_like(sequence_T)
    usage = sum(
        sign * float((count / num_tokens).square().sum())
        for sign, count, _ in _counts(set_TC, whole_T, num_experts=num_experts)
    )
    _, row_T, length_S = sequence_T.unique(return_inverse=True, return_counts=True)
    met = 0.0
    for sign, count, row in _counts(set_TC, row_T, num_experts=num_experts):
        # Of n tokens, n - 1 pairs are neighbours out of n (n - 1) ordered ones.
        met += sign * float((count * (count - 1) / length_S[row]).sum())
    return usage, met


def _counts(
    set_TC: Tensor, row_T: Tensor, *, num_experts: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(sign, tokens, row) of every expert that occurs in a row, then of every pair of experts."""
    kinds_TC = row_T[:, None] * num_experts + set_TC
    kinds, count = kinds_TC.flatten().unique(return_counts=True)
    yield 1, count.double(), kinds // num_experts
    if set_TC.shape[-1] == 2:
        pairs = num_experts * num_experts
        kinds_T = row_T * pairs + set_TC[:, 0] * num_experts + set_TC[:, 1]
        kinds, count = kinds_T.unique(return_counts=True)
        yield -1, count.double(), kinds // pairs
