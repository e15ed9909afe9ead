"""Routers as data: scores in, assignments out, nothing else.

`route` is pure: it decides who goes where and with which weight, and knows no parameters and no
expert. The pieces are tables from names to small functions (`moe.selection`, `moe.scoring`,
`moe.capacity`), so that a new router is an entry and its test. Everything is float32, and ties go
to the lowest index, so that the choice does not depend on a sort's implementation.

Shapes: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.capacity import capacity_limit as capacity_limit
from moe.capacity import within_capacity
from moe.errors import UserError
from moe.router_noise import noisy_logits
from moe.router_spec import RouterSpec as RouterSpec
from moe.scoring import SCORINGS, weigh
from moe.selection import SELECTIONS
from moe.selection import top_k_lowest_index as top_k_lowest_index


@dataclass(frozen=True, kw_only=True)
class Routing:
    """One layer's decision for T tokens. Of expert choice K is E: every expert is a column.

    logits_TE: float32 router logits, noise included where there is any.
    score_TE: float32 probabilities, they sum to 1 over E (sigmoid scores over their sum); no bias.
    expert_TK: int64, the choice before dropping, best first unless it was forced; arange(E) in
        every row of expert choice.
    kept_TK: bool, False where the assignment was dropped or the token is padding; of expert choice
        it marks the choices.
    weight_TK: float32 combine weights, 0 where not kept; survivors are not renormalised.
    mask_T: bool, True for real tokens.
    sequence_T: int64, the row of the batch that a token belongs to.
    balanced_by_construction: True of expert choice, where a balance loss has no meaning.
    """

    logits_TE: Tensor
    score_TE: Tensor
    expert_TK: Tensor
    kept_TK: Tensor
    weight_TK: Tensor
    mask_T: Tensor
    sequence_T: Tensor
    num_experts: int
    balanced_by_construction: bool = False

    @property
    def top_k(self) -> int:
        return self.expert_TK.shape[-1]


def chosen_table(routing: Routing) -> Tensor:
    """Who chose whom before dropping, bool (T, E), all False on padding; waits for no device.

    Of expert choice, which drops nothing, the tokens that the experts took.
    """
    if routing.balanced_by_construction:
        return routing.kept_TK & routing.mask_T[:, None]
    real_TK = routing.mask_T[:, None].expand_as(routing.expert_TK)
    expert_TK = torch.where(real_TK, routing.expert_TK, 0)  # padding may hold any number
    return torch.zeros_like(routing.score_TE, dtype=torch.bool).scatter(1, expert_TK, real_TK)


def route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    mask_T: Tensor | None = None,
    sequence_T: Tensor | None = None,
    bias_E: Tensor | None = None,
    token_T: Tensor | None = None,
    forced_TK: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Routing:
    """Choose experts for each token and weigh them, as the spec says.

    mask_T: bool (T,), False for padding, which is never kept and takes no capacity; default all
    True.
    sequence_T: int64 (T,), the sequence of each token; default all 0.
    bias_E: float32 (E,), added to the scores for the choice alone; for specs with selection_bias.
    token_T: int64 (T,), token ids; read by specs of kind `hash` only.
    forced_TK: int64 (T, K), a choice made elsewhere: bias, groups and token ids have no say, the
    weights are recomputed from these logits, and mask and capacity apply to it as to a free choice,
    in the same order. A row of -1 is left to the router; rows of padding may hold any experts.
    generator: draws the spec's logit noise; None draws none, as in eval.
    Raises ValueError if a shape does not fit the spec or selection_bias and bias_E do not go
    together, UserError for a hash without token ids and for a forced expert choice.
    """
    _check(logits_TE, spec, bias_E=bias_E, forced_TK=forced_TK)
    num_tokens, device = logits_TE.shape[0], logits_TE.device
    if mask_T is None:
        mask_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
    if sequence_T is None:
        sequence_T = torch.zeros(num_tokens, dtype=torch.long, device=device)
    logits_TE = logits_TE.float()  # bf16 ties would decide the choice
    if spec.logit_noise and generator is not None:
        logits_TE = noisy_logits(logits_TE, spec.logit_noise, generator=generator)
    scoring = SCORINGS[spec.scoring]
    score_TE = scoring.score(logits_TE)
    if forced_TK is None:
        expert_TK = SELECTIONS[spec.kind](score_TE.detach(), spec, bias_E, token_T)
    elif bool((forced_TK < 0).any()):
        free_TK = SELECTIONS[spec.kind](score_TE.detach(), spec, bias_E, token_T)
        expert_TK = torch.where(forced_TK < 0, free_TK, forced_TK)
    else:
        expert_TK = forced_TK
    weight_TK = weigh(score_TE, expert_TK, spec)
    kept_TK = mask_T[:, None].expand_as(expert_TK)
    if spec.has_capacity:
        kept_TK = kept_TK & within_capacity(
            expert_TK, weight_TK, spec, mask_T=mask_T, sequence_T=sequence_T
        )
    return Routing(
        logits_TE=logits_TE,
        score_TE=scoring.probability(logits_TE, score_TE),
        expert_TK=expert_TK,
        kept_TK=kept_TK,
        weight_TK=torch.where(kept_TK, weight_TK, 0.0),
        mask_T=mask_T,
        sequence_T=sequence_T,
        num_experts=spec.num_experts,
        balanced_by_construction=spec.kind == "expert_choice",
    )


def _check(
    logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None, forced_TK: Tensor | None
) -> None:
    num_tokens, columns = logits_TE.shape
    if columns != spec.num_experts:
        raise ValueError(f"logits have {columns} columns, num_experts {spec.num_experts}")
    if (bias_E is not None) != spec.selection_bias:
        raise ValueError(
            f"bias_E is {'given' if bias_E is not None else 'None'} and the spec's selection_bias "
            f"{spec.selection_bias}: they go together"
        )
    if forced_TK is None:
        return
    if spec.kind == "expert_choice":
        raise UserError(
            "kind 'expert_choice' cannot be forced: which tokens an expert takes is no list of K "
            "experts per token; replay a router of kind top_k or hash."
        )
    if tuple(forced_TK.shape) != (num_tokens, spec.top_k):
        raise ValueError(
            f"forced_TK has shape {tuple(forced_TK.shape)}, not {(num_tokens, spec.top_k)}"
        )
