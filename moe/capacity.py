"""Limited places: which assignments an expert takes, and in which order they arrive.

Expert choice is a case of it: every token applies to every expert, and the best scores are served.

Shapes: T tokens, K experts per token, A = T*K assignments, E experts, B scopes (the batch, or its
sequences).
"""

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from einops import rearrange, repeat
from torch import Tensor

from moe.router_spec import RouterSpec


def capacity_limit(spec: RouterSpec, num_tokens: int) -> int:
    """Assignments that one expert takes from `num_tokens` real tokens."""
    factor = spec.capacity_factor
    assert factor is not None or spec.kind == "expert_choice"
    # The factor as the decimal it was written as: in floats 1.1 * 80 / 8 is above 11.
    exact = Fraction(1 if factor is None else str(factor))
    places = exact * spec.top_k * num_tokens / spec.num_experts
    return math.ceil(places) if spec.capacity_rounding == "ceil" else math.floor(places)


def _gshard(weight_TK: Tensor) -> Tensor:
    return rearrange(_numbers(weight_TK), "t k -> (k t)")


def _position(weight_TK: Tensor) -> Tensor:
    return rearrange(_numbers(weight_TK), "t k -> (t k)")


def _score(weight_TK: Tensor) -> Tensor:
    arrival_A = _gshard(weight_TK)
    weight_A = rearrange(weight_TK, "t k -> (t k)")[arrival_A]
    return arrival_A[torch.sort(weight_A, descending=True, stable=True).indices]


def _numbers(weight_TK: Tensor) -> Tensor:
    return torch.arange(weight_TK.numel(), device=weight_TK.device).view(weight_TK.shape)


# Weights (T, K) to the assignments, numbered row by row, in the order in which they are served.
ARRIVALS: dict[str, Callable[[Tensor], Tensor]] = {
    "gshard": _gshard,
    "position": _position,
    "score": _score,
}


def within_capacity(
    expert_TK: Tensor,
    weight_TK: Tensor,
    spec: RouterSpec,
    *,
    mask_T: Tensor,
    sequence_T: Tensor,
) -> Tensor:
    """True (T, K) where a real token's assignment finds a place; padding takes none."""
    order = "score" if spec.kind == "expert_choice" else spec.drop_order
    arrival_A = ARRIVALS[order](weight_TK.detach())
    scope_T = sequence_T if spec.capacity_scope == "sequence" else torch.zeros_like(sequence_T)
    size_B = torch.bincount(scope_T[mask_T]).tolist()
    limit_B = torch.tensor(
        [capacity_limit(spec, n) for n in size_B], dtype=torch.long, device=mask_T.device
    )
    nobody = len(size_B) * spec.num_experts  # the queue that padding waits in
    queue_TK = torch.where(mask_T[:, None], scope_T[:, None] * spec.num_experts + expert_TK, nobody)
    queue_A = rearrange(queue_TK, "t k -> (t k)")[arrival_A]
    limit_Q = repeat(limit_B, "b -> (b e)", e=spec.num_experts)
    limit_Q = torch.cat([limit_Q, limit_Q.new_zeros(1)])
    fits_A = torch.empty_like(queue_A, dtype=torch.bool)
    fits_A[arrival_A] = _place(queue_A, nobody + 1) < limit_Q[queue_A]
    return rearrange(fits_A, "(t k) -> t k", k=expert_TK.shape[1])


def _place(queue_A: Tensor, num_queues: int) -> Tensor:
    """How many stand before each in its own queue."""
    sorted_A, order_A = torch.sort(queue_A, stable=True)
    length_Q = torch.bincount(queue_A, minlength=num_queues)
    start_Q = length_Q.cumsum(dim=0) - length_Q
    place_A = torch.empty_like(queue_A)
    place_A[order_A] = torch.arange(len(queue_A), device=queue_A.device) - start_Q[sorted_A]
    return place_A
