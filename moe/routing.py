"""Routers as data: scores in, assignments out, nothing else.

`route` is pure: it decides who goes where and with which weight, and knows no parameters and no
expert. Everything is float32, and ties go to the expert with the lowest index, so that the choice
does not depend on a sort's implementation.

Shapes: T tokens, E experts, K experts per token.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor

from moe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """What a router does, as data.

    num_experts, top_k: E and K, 1 <= K <= E.
    normalize_weights: divide the K chosen probabilities by their sum (Mixtral). Refused for K = 1:
        the weight would be the constant 1 and the router would get no gradient.
        False keeps the raw probability as the gate (Switch Transformer for K = 1, OLMoE).
    capacity_factor: None is dropless. Otherwise each expert takes at most
        ceil(capacity_factor * K * N / E) assignments of a batch with N real tokens, first choices
        before second choices, earlier tokens before later ones (GShard's order; for K = 1 Switch
        Transformer, Fedus et al. 2022, eq. 3). Dropped assignments contribute nothing: the token
        keeps its residual.
    """

    num_experts: int
    top_k: int
    normalize_weights: bool = True
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"top_k {self.top_k} must be between 1 and num_experts {self.num_experts}."
            )
        if self.top_k == 1 and self.normalize_weights:
            raise UserError(
                "top_k 1 with normalised weights gives every token the weight 1, so the router "
                "gets no gradient: set norm_topk_prob to False (Switch keeps the probability as "
                "the gate)."
            )
        if self.capacity_factor is not None and not (
            self.capacity_factor > 0 and math.isfinite(self.capacity_factor)
        ):
            raise UserError(
                f"capacity_factor {self.capacity_factor} must be above 0, or None for dropless."
            )

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's output is free of its batch neighbours; capacity couples them."""
        return self.capacity_factor is None


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer's decision for T tokens.

    logits_TE: float32 router logits.
    score_TE: float32 probabilities, they sum to 1 over E.
    expert_TK: int64, the choice before dropping, best first.
    kept_TK: bool, False where the assignment was dropped or the token is padding.
    weight_TK: float32 combine weights, 0 where not kept; survivors are not renormalised.
    mask_T: bool, True for real tokens.
    sequence_T: int64, the row of the batch that a token belongs to.
    """

    logits_TE: Tensor
    score_TE: Tensor
    expert_TK: Tensor
    kept_TK: Tensor
    weight_TK: Tensor
    mask_T: Tensor
    sequence_T: Tensor
    num_experts: int

    @property
    def top_k(self) -> int:
        return self.expert_TK.shape[-1]


def top_k_lowest_index(score_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k largest scores per row, best first; ties go to the lowest index."""
    return torch.sort(score_TE, dim=-1, descending=True, stable=True).indices[:, :k]


def capacity_limit(spec: RouterSpec, num_tokens: int) -> int:
    """Assignments that one expert takes from a batch of `num_tokens` real tokens."""
    assert spec.capacity_factor is not None
    # The factor as the decimal it was written as: in floats 1.1 * 80 / 8 is above 11.
    exact = Fraction(str(spec.capacity_factor)) * spec.top_k * num_tokens / spec.num_experts
    return math.ceil(exact)


def _within_capacity(expert_TK: Tensor, mask_T: Tensor, spec: RouterSpec) -> Tensor:
    """True (T, K) where the assignment fits: all first choices in token order, then the second."""
    expert_KT = rearrange(expert_TK, "t k -> (k t)")
    real_KT = mask_T.repeat(spec.top_k)
    taken_AE = torch.nn.functional.one_hot(expert_KT, spec.num_experts) * real_KT[:, None]
    place_A = (taken_AE.cumsum(dim=0) * taken_AE).sum(dim=-1)  # 1 for the first to arrive
    limit = capacity_limit(spec, int(mask_T.sum()))
    return rearrange(place_A <= limit, "(k t) -> t k", k=spec.top_k)


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    mask_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
) -> Routing:
    """Choose K experts per token and weigh them: softmax over all experts, then top-k.

    mask_T: bool (T,), False for padding, which is never kept and takes no capacity; default all
    True.
    sequence_T: int64 (T,), the sequence of each token; default all 0.
    Raises ValueError if the logits do not have `spec.num_experts` columns.
    """
    if logits_TE.shape[-1] != spec.num_experts:
        raise ValueError(
            f"logits have {logits_TE.shape[-1]} columns, num_experts {spec.num_experts}"
        )
    logits_TE = logits_TE.float()  # bf16 ties would decide the choice
    num_tokens = logits_TE.shape[0]
    if mask_T is None:
        mask_T = torch.ones(num_tokens, dtype=torch.bool, device=logits_TE.device)
    if sequence_T is None:
        sequence_T = torch.zeros(num_tokens, dtype=torch.long, device=logits_TE.device)
    score_TE = torch.softmax(logits_TE, dim=-1)
    expert_TK = top_k_lowest_index(score_TE.detach(), spec.top_k)
    weight_TK = score_TE.gather(-1, expert_TK)
    if spec.normalize_weights:
        weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
    kept_TK = mask_T[:, None].expand_as(expert_TK)
    if spec.capacity_factor is not None:
        kept_TK = kept_TK & _within_capacity(expert_TK, mask_T, spec)
    return Routing(
        logits_TE=logits_TE,
        score_TE=score_TE,
        expert_TK=expert_TK,
        kept_TK=kept_TK,
        weight_TK=torch.where(kept_TK, weight_TK, 0.0),
        mask_T=mask_T,
        sequence_T=sequence_T,
        num_experts=spec.num_experts,
    )
