"""Replay recorded choices: `with replay_routing(model, trace): model(...)`.

Only the discrete choice is replayed; scores and weights are those of the live logits, so that the
routers get gradients (rollout routing replay: Ma et al. 2025, arXiv 2510.11370). The decision to
know: a pass looks its choice up once, as it begins, by (sample id, token), and binds it to every
layer. What activation checkpointing runs again in backward, also outside the `with`, takes the same
choice.

Shapes: B batch, S sequence, T = B*S tokens, L MoE layers, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moe.choice_table import ChoiceTable
from moe.errors import UserError
from moe.model import MoEModel
from moe.pass_keys import PassKeys, pass_keys
from moe.router_modules import (
    checkpointed_layer,
    foreign_decoder,
    foreign_routers,
    no_router,
    own_backbones,
)
from moe.scoring import TINY
from moe.trace import RoutingTrace

FREE = -1  # an expert id that leaves the choice to the router
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def replay_routing(
    model: nn.Module, trace: RoutingTrace | ChoiceTable, *, free_tail: int = 0
) -> Iterator[None]:
    """Every pass inside the `with` takes the trace's experts, weighed by the live logits.

    Rows are found by the `sample_ids` given to forward, (B,), default the row number; tokens by
    their number among the row's real tokens. So padding, order and size of micro-batches are free,
    and a pass with a cache goes on where the cache ends. A packed row is one sample, whatever its
    position ids say, unless sample_ids is (B, S) and names the text of each token: then texts may
    be recorded alone and replayed packed, or the other way round. Padding and the selection bias
    have no say; capacity, where there is one, is counted anew over the batch at hand.

    free_tail: so many tokens at the end of a sample may have no record, and are routed freely. A
    rollout needs 1: the last token drawn was never passed through the model.

    Foreign families (`FOREIGN_ROUTERS`) weigh as they do, and keep the choice under Hugging Face's
    own activation checkpointing.

    Raises `UserError` as the `with` begins for a model without routers or with several, a nested
    replay, other numbers of layers, experts or experts per token, an expert-choice router, a trace
    that lacks a token or has it twice; and in a pass for a sample that was not recorded, or one
    with another number of tokens (with a cache: with more).
    """
    if free_tail < 0:
        raise UserError(f"free_tail {free_tail} must be at least 0.")
    decoder = _decoder(model)
    if is_replaying(decoder):
        raise UserError(
            f"{type(model).__name__} is replaying a trace already: end that replay_routing first."
        )
    table = trace.choices() if isinstance(trace, RoutingTrace) else trace
    _check_counts(decoder, table)
    table = table.to(next(decoder.parameters()).device)
    hook = _OwnPasses if isinstance(decoder, MoEModel) else _ForeignPasses
    passes = hook(decoder, partial(choices_of, table, free_tail=free_tail))
    try:
        yield
    finally:
        passes.remove()


def is_replaying(model: nn.Module) -> bool:
    """Whether a `replay_routing` holds for a decoder in the model."""
    return any(
        isinstance(hook, _Passes)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )


def choices_of(table: ChoiceTable, keys: PassKeys, *, free_tail: int = 0) -> Tensor:
    """The choice (L, T, K) int64 for each place of a pass, FREE on padding and the free tail.

    Raises `UserError` as `replay_routing` does in a pass.
    """
    sample_T = rearrange(keys.sample_BS, "b s -> (b s)").contiguous()
    token_T = rearrange(keys.token_BS, "b s -> (b s)")
    real_T = token_T >= 0
    row_T = torch.searchsorted(table.sample_N, sample_T).clamp(max=len(table.sample_N) - 1)
    length_T = table.length_N[row_T]
    _refuse(
        real_T & (table.sample_N[row_T] != sample_T),
        lambda at: (
            f"sample {int(sample_T[at])} is not in the trace: give forward the sample_ids that "
            "were recorded."
        ),
    )
    _refuse(
        real_T & (token_T >= length_T + free_tail),
        lambda at: (
            f"sample {int(sample_T[at])} has {int(length_T[at])} recorded tokens, this pass has "
            f"more{f' than {free_tail} beside them' if free_tail else ''}: replay the text that "
            "was recorded."
        ),
    )
    if keys.is_whole:
        # Each text that begins here must also end here; an end is where the record ends.
        begun_N = torch.bincount(row_T[real_T & (token_T == 0)], minlength=len(table.sample_N))
        ended_N = torch.bincount(
            row_T[real_T & (token_T == length_T - 1)], minlength=len(table.sample_N)
        )
        _refuse(
            begun_N != ended_N,
            lambda at: (
                f"sample {int(table.sample_N[at])} has {int(table.length_N[at])} recorded tokens, "
                "this pass has fewer: replay the text that was recorded (or part by part, with a "
                "cache)."
            ),
        )
    found_T = real_T & (token_T < length_T)
    place_T = torch.where(found_T, table.start_N[row_T] + token_T, 0)
    choice_TLK = torch.where(found_T[:, None, None], table.expert_TLK[place_T].long(), FREE)
    return rearrange(choice_TLK, "t l k -> l t k")


def _refuse(wrong: Tensor, sentence: Callable[[int], str]) -> None:
    if bool(wrong.any()):
        raise UserError(sentence(int(wrong.nonzero()[0])))


def _decoder(model: nn.Module) -> nn.Module:
    own = own_backbones(model)
    if len(own) > 1:
        raise UserError(
            f"{type(model).__name__} holds {len(own)} backbones with routers: replay on one of "
            "them, a trace is of one model."
        )
    if own:
        return own[0]
    if not foreign_routers(model):
        raise no_router(model, "to replay on")
    wrapped = [m for m in model.modules() if type(m).__name__ == "CheckpointWrapper"]
    if wrapped:
        raise UserError(
            f"{type(model).__name__} is checkpointed by torch's CheckpointWrapper, which would "
            "choose freely in backward: use gradient_checkpointing_enable()."
        )
    return foreign_decoder(model)


def _check_counts(decoder: nn.Module, table: ChoiceTable) -> None:
    if isinstance(decoder, MoEModel):
        spec = decoder.config.router_spec
        if spec.kind == "expert_choice":
            raise UserError(
                "kind 'expert_choice' cannot be replayed: which tokens an expert takes is no list "
                "of experts per token."
            )
        model = (len(decoder.config.sparse_layers), spec.num_experts, spec.top_k)
    else:
        routers: list[Any] = foreign_routers(decoder)
        model = (len(routers), routers[0].num_experts, routers[0].top_k)
    recorded = (table.num_layers, table.num_experts, table.top_k)
    if recorded != model:
        raise UserError(
            "the trace has {} MoE layers, {} experts and top_k {}, the model {}, {} and {}: replay "
            "on the model that was recorded.".format(*recorded, *model)
        )


class _Passes:
    """A hook on a decoder that gives each of its passes the recorded choice, until `remove`."""

    def __init__(self, decoder: nn.Module, find: Callable[[PassKeys], Tensor]) -> None:
        self.find = find
        self.handles = [decoder.register_forward_pre_hook(self, with_kwargs=True)]

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments | None:
        raise NotImplementedError

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _OwnPasses(_Passes):
    """Our backbone takes the choice as an argument and hands each layer its own."""

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments | None:
        keys = pass_keys(args, kwargs)
        if keys is None:
            return None
        if kwargs.get("forced_experts") is not None:
            raise UserError("forced_experts was given inside replay_routing: leave one of them.")
        return args, kwargs | {"forced_experts": self.find(keys).unbind(0)}


class _ForeignPasses(_Passes):
    """A foreign decoder's routers are hooked for the length of each pass.

    A layer that will be run again in backward gets the hook bound to what is run, since by then
    the pass, and perhaps the `with`, is over.
    """

    def __init__(self, decoder: nn.Module, find: Callable[[PassKeys], Tensor]) -> None:
        super().__init__(decoder, find)
        routers = foreign_routers(decoder)
        self.routers = [(router, checkpointed_layer(decoder, router)) for router in routers]
        self.during = ExitStack()
        # always_call is not called at an interrupt: the next pass or `remove` clears up then.
        end = decoder.register_forward_hook(lambda *_: self.during.close(), always_call=True)
        self.handles.append(end)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Arguments | None:
        self.during.close()
        keys = pass_keys(args, kwargs)
        if keys is None:
            return None
        for (router, layer), forced_TK in zip(self.routers, self.find(keys), strict=True):
            if layer is not None and layer.training and layer.gradient_checkpointing:
                run = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = partial(_checkpointed, run, router, forced_TK)
                self.during.callback(setattr, layer, "_gradient_checkpointing_func", run)
            else:
                self.during.enter_context(_forced(router, forced_TK))
        return None

    def remove(self) -> None:
        self.during.close()
        super().remove()


def _checkpointed(
    run: Callable[..., Any],
    router: nn.Module,
    forced_TK: Tensor,
    layer: Callable[..., Any],
    *args: Any,
) -> Any:
    """`run` is torch's checkpoint: it calls what it is given now, and again in backward."""

    def layer_with_choice(*inputs: Any) -> Any:
        with _forced(router, forced_TK):
            return layer(*inputs)

    return run(layer_with_choice, *args)


@contextmanager
def _forced(router: nn.Module, forced_TK: Tensor) -> Iterator[None]:
    """First among the router's hooks, so that whoever records sees the forced choice."""
    handle = router.register_forward_hook(partial(_force, forced_TK), prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _force(
    forced_TK: Tensor, router: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The router's output with the choice replaced, weighed as the family's router weighs."""
    logits_TE, weight_TK, expert_TK = output
    expert_TK = torch.where(forced_TK == FREE, expert_TK, forced_TK)
    forced_weight_TK = torch.softmax(logits_TE.float(), dim=-1).gather(-1, expert_TK)
    if getattr(router, "norm_topk_prob", True):  # Mixtral has no such option, and always does
        total_T1 = forced_weight_TK.sum(dim=-1, keepdim=True).clamp(min=TINY)
        forced_weight_TK = forced_weight_TK / total_T1
    return logits_TE, forced_weight_TK.to(weight_TK.dtype), expert_TK
