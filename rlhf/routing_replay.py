"""Router replay in PPO and its kin: passes of the update take the experts of an earlier pass.

The decision to know: what is replayed is `expert_BSLK` of the buffer, the experts of the pass that
gave the old log-probabilities. With `old_policy` (R2) that pass chose freely; with `rollout` (R3)
it replayed the sampler's choices itself, so that one tensor, sliced like every other, serves both.

Shapes: B batch, S sequence, T = B*S tokens, L MoE layers, E experts, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moe.choice_table import ChoiceTable
from moe.errors import UserError
from moe.generation import router_specs
from moe.record import RecordedForward, has_router, replay_routing
from moe.router_modules import foreign_routers, own_backbones
from moe.routing import Routing, route
from moe.selection import top_k_lowest_index
from moe.switch_ffn import SwitchFFN

NO_PASS = -1  # where no expert was chosen: the last token drawn, padding after it


@contextmanager
def replayed(
    model: nn.Module, expert_BSLK: Tensor | None, mask_BS: Tensor, *, free_tail: int = 0
) -> Iterator[None]:
    """Passes over these B rows take these experts, weighed by the live logits; None: freely.

    The choice is discrete, so that the routers keep their gradients through the weights. free_tail:
    so many tokens at the end of a row may be NO_PASS and are routed freely; padding always is.
    Raises `UserError` as `replay_routing`.
    """
    if expert_BSLK is None:
        yield
        return
    table = choice_table(expert_BSLK, mask_BS, num_experts=_num_experts(model))
    with replay_routing(model, table, free_tail=free_tail):
        yield


def choice_table(expert_BSLK: Tensor, mask_BS: Tensor, *, num_experts: int) -> ChoiceTable:
    """The choices of a batch whose samples are its row numbers, as `replay_routing` looks them up.

    A packed or cached pass has no such rows; none is made here.
    """
    mask_BS = mask_BS.bool()
    seen_BS = mask_BS & (expert_BSLK != NO_PASS).flatten(2).all(dim=-1)
    row_BS = torch.arange(len(mask_BS), device=mask_BS.device)[:, None].expand(mask_BS.shape)
    token_BS = mask_BS.long().cumsum(dim=1) - 1
    return ChoiceTable.from_tokens(
        row_BS[seen_BS],
        token_BS[seen_BS],
        expert_TLK=expert_BSLK[seen_BS],
        num_experts=num_experts,
    )


@torch.no_grad()
def free_choices(model: nn.Module, forward: RecordedForward) -> Tensor:
    """Expert ids (B, S, L, K), int16, sorted along K, that the routers would have chosen.

    Of a replayed pass: each layer's live logits, the layers before it having replayed. Costs one
    top-k a layer. Padding's are of no meaning.
    """
    own = own_backbones(model)
    if own:
        ffns = [m for m in own[0].modules() if isinstance(m, SwitchFFN)]
        pairs = zip(ffns, forward.routings, strict=True)
        ids = [_free_of(ffn, routing) for ffn, routing in pairs]
    else:
        ids = [top_k_lowest_index(r.score_TE, r.top_k) for r in forward.routings]
    ids_TLK = torch.stack([x_TK.sort(dim=-1).values for x_TK in ids], dim=1)
    length = forward.mask_BS.shape[1]
    return rearrange(ids_TLK.to(torch.int16), "(b s) l k -> b s l k", s=length)


def _free_of(ffn: SwitchFFN, routing: Routing) -> Tensor:
    return route(routing.logits_TE, ffn.spec, bias_E=ffn.selection_bias_E).expert_TK


def _num_experts(model: nn.Module) -> int:
    specs = router_specs(model)
    if specs:
        return specs[0].num_experts
    router: Any = foreign_routers(model)[0]
    return int(router.num_experts)


def refuse_without_choice(model: nn.Module, option: str) -> None:
    """Raises `UserError` where no router of the model chooses by what it computes.

    option: the option and its value, which has no effect there.
    """
    if not has_router(model):
        raise UserError(
            f"{option} has no effect: {type(model).__name__} has no router that can be observed; "
            "leave it out."
        )
    specs = router_specs(model)
    if specs and not any(spec.chooses_by_score for spec in specs):
        raise UserError(
            f"{option} has no effect: a router of kind {specs[0].kind!r} chooses by the token's "
            "id alone; leave it out."
        )
