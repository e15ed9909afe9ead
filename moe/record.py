"""Record which experts each token went to: `with record_routing(model) as trace: model(...)`.

Works for our model and, through their router modules, for the Hugging Face families named in
`FOREIGN_ROUTERS`; a test holds each of them against the family's own indices. Whoever trains a
balance loss records with `keep_graph=True`, so that one mechanism serves telemetry and loss.
Inside `moe.replay.replay_routing` the forced choice is what is recorded.

Shapes: B batch, S sequence, T = B*S tokens, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from moe.freeze import freeze_router as freeze_router
from moe.model import MoEModel
from moe.pass_keys import PassKeys, pass_keys
from moe.replay import replay_routing as replay_routing
from moe.router_modules import FOREIGN_ROUTERS as FOREIGN_ROUTERS
from moe.router_modules import foreign_decoder, foreign_routers, no_router, own_backbones
from moe.router_modules import has_router as has_router
from moe.routing import Routing
from moe.trace import RecordedForward as RecordedForward
from moe.trace import RoutingTrace as RoutingTrace

Keep = Callable[[RecordedForward], None]


def detached(routing: Routing) -> Routing:
    return replace(
        routing,
        logits_TE=routing.logits_TE.detach(),
        score_TE=routing.score_TE.detach(),
        weight_TK=routing.weight_TK.detach(),
    )


@contextmanager
def record_routing(model: nn.Module, *, keep_graph: bool = False) -> Iterator[RoutingTrace]:
    """Record every forward pass inside the `with`.

    Rows are named by the `sample_ids` given to forward, (B,) or, for packed rows, (B, S); default
    the row number. A foreign family takes them too.
    keep_graph: keep scores and logits attached, for a balance loss; else they are detached.
    Raises `UserError` if the model has no router that can be recorded.
    """
    trace = RoutingTrace()

    def keep(forward: RecordedForward) -> None:
        if not keep_graph:
            forward = replace(forward, routings=tuple(detached(r) for r in forward.routings))
        trace.forwards.append(forward)

    own = own_backbones(model)
    if not own and not foreign_routers(model):
        raise no_router(model, "to record")
    with ExitStack() as hooks:
        for backbone in own:
            hooks.enter_context(_own_hooks(backbone, keep))
        if not own:
            hooks.enter_context(_foreign_hooks(model, keep))
        yield trace


@contextmanager
def _own_hooks(backbone: MoEModel, keep: Keep) -> Iterator[None]:
    """The backbone hands its decisions over; who its tokens are is read as the pass begins."""
    current: list[PassKeys | None] = [None]

    def on_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        current[0] = pass_keys(args, kwargs)

    def sink(sample_ids: Tensor, mask_BS: Tensor, routings: tuple[Routing, ...]) -> None:
        token_BS = None if current[0] is None else current[0].token_BS
        current[0] = None
        keep(
            RecordedForward(
                sample_ids=sample_ids, mask_BS=mask_BS, routings=routings, token_BS=token_BS
            )
        )

    handle = backbone.register_forward_pre_hook(on_start, with_kwargs=True)
    backbone.routing_sinks.append(sink)
    try:
        yield
    finally:
        backbone.routing_sinks.remove(sink)
        handle.remove()


@contextmanager
def _foreign_hooks(model: nn.Module, keep: Keep) -> Iterator[None]:
    """Hooks on a foreign model's routers; its decoder's own call marks where a pass ends."""
    decoder = foreign_decoder(model)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    current: list[PassKeys | None] = [None]

    def on_start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # A pass that broke off, or a checkpointed layer's second run in backward, leaves rows.
        rows.clear()
        current[0] = pass_keys(args, kwargs)

    def on_router(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        rows.append((output[0], output[1], output[2]))

    def on_decoder(module: nn.Module, inputs: Any, output: Any) -> None:
        keys = current[0]
        assert keys is not None, "the decoder has run, so it had tokens"
        mask_BS = keys.token_BS >= 0
        batch, length = mask_BS.shape
        mask_T = rearrange(mask_BS, "b s -> (b s)")
        sequence_T = repeat(torch.arange(batch, device=mask_T.device), "b -> (b s)", s=length)
        routings = tuple(_foreign_routing(*row, mask_T, sequence_T) for row in rows)
        rows.clear()
        keep(
            RecordedForward(
                sample_ids=keys.sample_ids,
                mask_BS=mask_BS,
                routings=routings,
                token_BS=keys.token_BS,
            )
        )

    handles = [router.register_forward_hook(on_router) for router in foreign_routers(model)]
    handles.append(decoder.register_forward_pre_hook(on_start, with_kwargs=True))
    handles.append(decoder.register_forward_hook(on_decoder))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_routing(
    logits_TE: Tensor, weight_TK: Tensor, expert_TK: Tensor, mask_T: Tensor, sequence_T: Tensor
) -> Routing:
    logits_TE = logits_TE.float()
    return Routing(
        logits_TE=logits_TE,
        score_TE=torch.softmax(logits_TE, dim=-1),
        expert_TK=expert_TK,
        kept_TK=mask_T[:, None].expand_as(expert_TK),
        weight_TK=torch.where(mask_T[:, None], weight_TK.float(), 0.0),
        mask_T=mask_T,
        sequence_T=sequence_T,
        num_experts=logits_TE.shape[-1],
    )
