"""Which experts a token is sent to, before places are counted: one entry a kind of router.

Nothing here carries a gradient. Ties go to the lowest index, so that the choice does not depend on
a sort's implementation.

Shapes: T tokens, E experts, K experts per token, G groups of experts.
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor

from moe.errors import UserError
from moe.router_spec import RouterSpec

# The finaliser of splitmix64 (Steele, Lea and Flood 2014), its constants as signed 64-bit numbers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))


def top_k_lowest_index(score_TE: Tensor, k: int) -> Tensor:
    """Indices (T, k) of the k largest scores per row, best first; ties go to the lowest index."""
    # topk breaks ties as it likes, but rows whose k + 1 largest all differ leave it no choice; the
    # others are few and sorted. At E = 64 that takes a third of the time of sorting every row.
    value_TK, index_TK = torch.topk(score_TE, min(k + 1, score_TE.shape[-1]), dim=-1)
    tied_N = (~(value_TK[:, :-1] > value_TK[:, 1:]).all(dim=-1)).nonzero().squeeze(-1)
    sorted_NE = torch.sort(score_TE[tied_N], dim=-1, descending=True, stable=True).indices
    return index_TK[:, :k].index_copy(0, tied_N, sorted_NE[:, :k])


def best_scores(
    score_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None, token_T: Tensor | None
) -> Tensor:
    """The K best experts of each token, by score and bias, within its best groups."""
    if spec.selection_bias:
        if bias_E is None:
            raise ValueError("the spec has selection_bias True: give bias_E")
        score_TE = score_TE + bias_E.float()
    if spec.n_group is not None:
        score_TE = within_best_groups(score_TE, spec)
    return top_k_lowest_index(score_TE, spec.top_k)


def within_best_groups(score_TE: Tensor, spec: RouterSpec) -> Tensor:
    """The scores, -inf outside each token's `topk_group` best groups (DeepSeek-V3, 2.1.2)."""
    assert spec.n_group is not None and spec.topk_group is not None
    score_TGN = rearrange(score_TE, "t (g n) -> t g n", g=spec.n_group)
    best = 2 if spec.group_score == "top2_sum" else 1
    value_TG = score_TGN.topk(best, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(value_TG, dtype=torch.bool)
    kept_TG.scatter_(-1, top_k_lowest_index(value_TG, spec.topk_group), True)
    masked_TGN = score_TGN.masked_fill(~kept_TG[..., None], -torch.inf)
    return rearrange(masked_TGN, "t g n -> t (g n)")


def every_expert(
    score_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None, token_T: Tensor | None
) -> Tensor:
    """Every token applies to every expert; the experts' places decide by score who is taken."""
    everyone_E = torch.arange(spec.num_experts, device=score_TE.device)
    return repeat(everyone_E, "e -> t e", t=score_TE.shape[0])


def hashed_token(
    score_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None, token_T: Tensor | None
) -> Tensor:
    """The K experts whose hash with the token's id is largest, as signed 64-bit numbers.

    The hash of (id, expert) is mix(mix(id + seed * g) + (expert + 1) * g), g and mix of splitmix64.
    Ranking the experts by it gives K different ones (Thaler and Ravishankar 1998).
    """
    if token_T is None:
        raise UserError(
            "router kind 'hash' routes by token id and got none: give input_ids (inputs_embeds "
            "alone do not say which tokens they are)."
        )
    start = (spec.hash_seed * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)
    number_E = torch.arange(1, spec.num_experts + 1, device=token_T.device) * _GOLDEN
    return top_k_lowest_index(_mix(_mix(token_T.long() + start)[:, None] + number_E), spec.top_k)


def _mix(x: Tensor) -> Tensor:
    """64-bit numbers scattered over all of them, one to one; products wrap around."""
    for shift, factor in _MIX:
        logical = (x >> shift) & ((1 << (64 - shift)) - 1)  # >> drags the sign along
        x = (x ^ logical) * factor
    return x


Selection = Callable[[Tensor, RouterSpec, Tensor | None, Tensor | None], Tensor]
SELECTIONS: dict[str, Selection] = {
    "top_k": best_scores,
    "expert_choice": every_expert,
    "hash": hashed_token,
}
