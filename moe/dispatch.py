"""Where the assignments of a Routing lie once they are sorted by expert, and back.

Decision to know: a row that several assignments share is always summed by token, never scattered.
One bag per token adds its assignments in the order of their experts, so the sum has one order on
every device; a scatter (`index_add`) has one only on the CPU, since CUDA adds by atomics.

Shapes: T tokens, K experts per token, E experts, D width, A kept assignments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moe.routing import Routing


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """The kept assignments, sorted by expert; within an expert the tokens keep their order.

    slot_A: int64, the place t * K + k of each assignment in the routing.
    token_A: int64, its token.
    size_E: int64, how many assignments each expert got.
    """

    slot_A: Tensor
    token_A: Tensor
    size_E: Tensor


@dataclass(frozen=True, kw_only=True)
class Bags:
    """The way back: for each token, where its assignments lie in the sorted order.

    place_A: int64, the places in the sorted order, token after token, by expert within a token.
    start_T: int64, where a token's places begin; it has none if the next one begins there too.
    """

    place_A: Tensor
    start_T: Tensor


def dispatch(routing: Routing) -> Dispatch:
    """Only what is kept is listed, so that dropped assignments and padding cost nothing."""
    kept_A = rearrange(routing.kept_TK, "t k -> (t k)").nonzero().squeeze(-1)
    expert_A = rearrange(routing.expert_TK, "t k -> (t k)")[kept_A]
    # Stable, so that within an expert the tokens keep their order and sums are reproducible.
    expert_A, order_A = torch.sort(expert_A, stable=True)
    slot_A = kept_A[order_A]
    return Dispatch(
        slot_A=slot_A,
        token_A=torch.div(slot_A, routing.top_k, rounding_mode="floor"),
        size_E=torch.bincount(expert_A, minlength=routing.num_experts),
    )


def expert_rows(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows in the sorted order) for each expert that got any."""
    end = 0
    for e, size in enumerate(sizes):
        start, end = end, end + size
        if size:
            yield e, slice(start, end)


def gradient_buffer(weight_EXY: Tensor, sizes: Sequence[int]) -> Tensor:
    """Room for the gradient of stacked weights: zero for experts without rows, the rest unset."""
    gradient_EXY = torch.empty_like(weight_EXY)
    for e, size in enumerate(sizes):
        if not size:
            gradient_EXY[e].zero_()
    return gradient_EXY


def bags(token_A: Tensor, *, num_tokens: int) -> Bags:
    """The places of each token's assignments, given the token of each place."""
    place_A = torch.sort(token_A, stable=True).indices
    count_T = torch.bincount(token_A, minlength=num_tokens)
    return Bags(place_A=place_A, start_T=count_T.cumsum(0) - count_T)


def sum_by_token(row_AD: Tensor, places: Bags, *, weight_A: Tensor | None = None) -> Tensor:
    """(T, D): the sum of each token's rows, weighed if weights are given; 0 without any row.

    weight_A: in the sorted order, of any float type. Not differentiable.
    """
    if row_AD.shape[0] == 0:
        return row_AD.new_zeros(places.start_T.shape[0], row_AD.shape[1])
    weight = None if weight_A is None else weight_A[places.place_A].to(row_AD.dtype)
    with torch.no_grad():
        return functional.embedding_bag(
            places.place_A, row_AD, places.start_T, mode="sum", per_sample_weights=weight
        )


class Gather(torch.autograd.Function):
    """x_TD -> its row for each assignment; the gradient is summed by token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_A: Tensor, places: Bags) -> Tensor:
        ctx.places = places
        return x_TD.index_select(0, token_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_AD: Tensor) -> tuple[Tensor, None, None]:
        return sum_by_token(gradient_AD.contiguous(), ctx.places), None, None


class Combine(torch.autograd.Function):
    """The sum of each token's rows (T, D); the gradient is the token's row for each of them."""

    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, token_A: Tensor, places: Bags) -> Tensor:
        ctx.save_for_backward(token_A)
        return sum_by_token(y_AD, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_A,) = ctx.saved_tensors
        return gradient_TD.index_select(0, token_A), None, None
