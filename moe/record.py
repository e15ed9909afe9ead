"""Record which experts each token went to: `with record_routing(model) as trace: model(...)`.

Works for our model and, through their router modules, for the Hugging Face families named in
`FOREIGN_ROUTERS`; a test holds each of them against the family's own indices. Whoever trains a
balance loss records with `keep_graph=True`, so that one mechanism serves telemetry and loss.

Shapes: B batch, S sequence, T = B*S tokens, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from moe.errors import UserError
from moe.model import MoEModel
from moe.routing import Routing

# model_type -> the router class whose forward returns (logits, weights, indices), softmax scored.
FOREIGN_ROUTERS = {
    "mixtral": "MixtralTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
}


@dataclass(frozen=True, kw_only=True)
class RecordedForward:
    """One pass: sample_ids (B,), mask_BS (True on real tokens), a Routing per MoE layer."""

    sample_ids: Tensor
    mask_BS: Tensor
    routings: tuple[Routing, ...]


@dataclass
class RoutingTrace:
    """What was recorded, pass by pass; rows are keyed (sample id, token, layer)."""

    forwards: list[RecordedForward] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return len(self.forwards[0].routings) if self.forwards else 0

    @property
    def num_experts(self) -> int:
        return self.forwards[0].routings[0].num_experts if self.num_layers else 0

    def clear(self) -> None:
        self.forwards.clear()


def has_router(model: nn.Module) -> bool:
    """Whether the model has mixture-of-experts layers that can be recorded."""
    return bool(_own(model)) and bool(_own(model)[0].config.sparse_layers) or bool(_foreign(model))


def _own(model: nn.Module) -> list[MoEModel]:
    return [module for module in model.modules() if isinstance(module, MoEModel)]


def _foreign(model: nn.Module) -> list[nn.Module]:
    names = set(FOREIGN_ROUTERS.values())
    return [module for module in model.modules() if type(module).__name__ in names]


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

    keep_graph: keep scores and logits attached, for a balance loss; else they are detached.
    Raises `UserError` if the model has no router that can be recorded.
    """
    trace = RoutingTrace()

    def sink(sample_ids: Tensor, mask_BS: Tensor, routings: tuple[Routing, ...]) -> None:
        kept = routings if keep_graph else tuple(detached(r) for r in routings)
        trace.forwards.append(
            RecordedForward(sample_ids=sample_ids, mask_BS=mask_BS, routings=kept)
        )

    own = _own(model)
    if own and own[0].config.sparse_layers:
        for backbone in own:
            backbone.routing_sinks.append(sink)
        try:
            yield trace
        finally:
            for backbone in own:
                backbone.routing_sinks.remove(sink)
        return
    if not _foreign(model):
        raise UserError(
            f"{type(model).__name__} has no router to record: it takes a Switchyard model with "
            f"sparse layers or one of {', '.join(FOREIGN_ROUTERS)}."
        )
    with _foreign_hooks(model, sink):
        yield trace


@contextmanager
def _foreign_hooks(model: nn.Module, sink: Any) -> Iterator[None]:
    """Hooks on a foreign model's routers; its decoder's own call marks where a pass ends."""
    decoder = _foreign_decoder(model)
    current: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_start(module: nn.Module, args: Any) -> None:
        # A pass that broke off, or a checkpointed layer's second run in backward, leaves rows.
        current.clear()

    def on_router(module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        current.append((output[0], output[1], output[2]))

    def on_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        hidden_BSD = output.last_hidden_state
        batch, length = hidden_BSD.shape[:2]
        mask_BS = torch.ones(batch, length, dtype=torch.bool, device=hidden_BSD.device)
        attention_mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        if attention_mask is not None and attention_mask.dim() == 2:
            mask_BS = attention_mask[:, -length:].bool()
        mask_T = rearrange(mask_BS, "b s -> (b s)")
        ids = torch.arange(batch, device=hidden_BSD.device)
        sequence_T = repeat(ids, "b -> (b s)", s=length)
        routings = tuple(_foreign_routing(*rows, mask_T, sequence_T) for rows in current)
        current.clear()
        sink(ids, mask_BS, routings)

    handles = [router.register_forward_hook(on_router) for router in _foreign(model)]
    handles.append(decoder.register_forward_pre_hook(on_start))
    handles.append(decoder.register_forward_hook(on_decoder, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _foreign_decoder(model: nn.Module) -> nn.Module:
    """The innermost module that holds both the embedding and every router: the bare decoder."""
    routers = set(_foreign(model))
    holders = [
        module
        for module in model.modules()
        if routers <= set(module.modules())
        and any(isinstance(child, nn.Embedding) for child in module.children())
    ]
    return holders[-1]


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
