"""Balancing routers while a stage trains: what a micro-batch is charged, what a step leaves behind.

The decision to know: counts of a step are taken in the forward passes that are recorded, never in
a recompute, and take effect only once the optimizer has made its step; a step that is left out
moves neither the running average nor the selection bias.

Shapes: E experts, L mixture-of-experts layers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.balance import (
    BalanceSums,
    balance_sums,
    balance_values,
    expert_counts,
    has_selection_bias,
    load_fractions,
    mean_over_layers,
    sequence_sum,
    update_selection_bias,
)
from moe.errors import UserError
from moe.generation import router_specs
from moe.routing import Routing
from sft.adapt import is_adapted
from sft.settings import BalancePolicy

Passes = Sequence[Sequence[Routing]]  # the passes of one micro-batch, a Routing per layer of each


@dataclass(frozen=True, kw_only=True)
class Charge:
    """Balance terms of one micro-batch, 0-dim float32 each.

    penalty: with coefficients, weighted by the micro-batch's share of the step's tokens, so that
    the penalties of a step add up. balance, z: the bare values, without gradient.
    """

    penalty: Tensor
    balance: Tensor
    z: Tensor
    num_tokens: Tensor


class StepBalance:
    """Balances the routers of one model, one optimizer step after another.

    all_sum adds a tensor up over all processes. Raises UserError for a `bias_update_rate` where
    there is no selection bias, or where adapters are trained, whose files do not hold it, and for
    losses where tokens do not choose by score.
    """

    def __init__(
        self, policy: BalancePolicy, model: nn.Module, *, all_sum: Callable[[Tensor], Tensor]
    ) -> None:
        if policy.bias_update_rate:
            _check_selection_bias(policy, model)
        if policy.on:
            _check_losses(policy, model)
        self.policy = policy
        self.model = model
        self._all_sum = all_sum
        self._fraction_LE: Tensor | None = None  # f, where it is of more than the micro-batch
        self._count_LE: Tensor | None = None  # of the step at hand, on this process
        self._past_LE: Tensor | None = None  # decayed counts of the steps before, all processes

    @property
    def _keeps_counts(self) -> bool:
        runs = self.policy.on and self.policy.scope == "running"
        return runs or self.policy.bias_update_rate > 0

    def needs_first_pass(self, num_micro_batches: int) -> bool:
        """Whether f must be known before the first of the step's micro-batches is charged."""
        wide = self.policy.load_balancing_coef > 0 and self.policy.scope == "optimizer_step"
        return wide and num_micro_batches > 1

    def begin_step(self, count_LE: Tensor | None = None) -> None:
        """count_LE: this process's counts from a first pass over the step, if one was made."""
        self.forget_step()
        self._fraction_LE = None
        if count_LE is not None:
            self._fraction_LE = load_fractions(self._all_sum(count_LE))
        elif self.policy.scope == "running" and self._past_LE is not None:
            self._fraction_LE = load_fractions(self._past_LE)

    def charge(self, passes: Passes, *, step_tokens: float) -> Charge:
        """What this micro-batch pays; step_tokens: real tokens of the step, all processes."""
        sums_L = _layer_sums(passes)
        num_tokens = sums_L[0].num_tokens
        balance, z = balance_values(sums_L, fraction_LE=self._fractions(sums_L))
        if self.policy.scope == "sequence":
            balance = mean_over_layers(_sequence_sums(passes)) / num_tokens.clamp(min=1.0)
        share = num_tokens / step_tokens
        policy = self.policy
        penalty = share * (policy.load_balancing_coef * balance + policy.z_loss_coef * z)
        if torch.is_grad_enabled():
            self._check_graph(sums_L)
        return Charge(
            penalty=penalty, balance=balance.detach(), z=z.detach(), num_tokens=num_tokens.detach()
        )

    def _fractions(self, sums_L: Sequence[BalanceSums]) -> Tensor | None:
        """f of each layer over the policy's scope; None for that of the sums themselves."""
        if self._fraction_LE is not None or self.policy.scope in ("micro_batch", "sequence"):
            return self._fraction_LE
        count_LE = torch.stack([sums.count_E for sums in sums_L]).detach()
        if self.policy.scope == "running":
            count_LE = torch.zeros_like(count_LE)  # no step before this one
        return load_fractions(self._all_sum(count_LE))

    def _check_graph(self, sums_L: Sequence[BalanceSums]) -> None:
        """Raises UserError where checkpointing has cut the routers off from the loss."""
        cut = any(not sums.score_sum_E.requires_grad for sums in sums_L)
        if cut and _checkpoints_reentrantly(self.model):
            raise UserError(
                f"{type(self.model).__name__} checkpoints with use_reentrant=True, which cuts the "
                "balance loss off from the routers: use use_reentrant=False, or turn balance off."
            )

    @torch.no_grad()
    def count(self, passes: Passes) -> None:
        """Take note of what a micro-batch's tokens chose."""
        if not self._keeps_counts:
            return
        for routings in passes:
            count_LE = torch.stack([expert_counts(routing) for routing in routings])
            self._count_LE = count_LE if self._count_LE is None else self._count_LE + count_LE

    def forget_step(self) -> None:
        """The step at hand is not made, or not for these routers: its counts are dropped."""
        self._count_LE = None

    def end_step(self) -> None:
        """The optimizer has made the step: what it leaves to the next ones."""
        if self._count_LE is None:
            return
        count_LE = self._all_sum(self._count_LE)
        self.forget_step()
        if self.policy.bias_update_rate:
            update_selection_bias(self.model, count_LE, gamma=self.policy.bias_update_rate)
        if self.policy.on and self.policy.scope == "running":
            past_LE = torch.zeros_like(count_LE) if self._past_LE is None else self._past_LE
            self._past_LE = self.policy.running_decay * past_LE + count_LE

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the model (the selection bias is one of its buffers)."""
        return {} if self._past_LE is None else {"past_count": self._past_LE}

    def load_state(self, tensors: Mapping[str, Tensor], *, device: torch.device) -> None:
        held = tensors.get("past_count")
        self._past_LE = None if held is None else held.to(device)


def _layer_sums(passes: Passes) -> list[BalanceSums]:
    """Sums per layer over the passes of one micro-batch."""
    sums_L = [balance_sums(routing) for routing in passes[0]]
    for other in passes[1:]:
        sums_L = [a + balance_sums(b) for a, b in zip(sums_L, other, strict=True)]
    return sums_L


def _sequence_sums(passes: Passes) -> list[Tensor]:
    """`sequence_sum` per layer over the passes of one micro-batch."""
    sum_L = [sequence_sum(routing) for routing in passes[0]]
    for other in passes[1:]:
        sum_L = [a + sequence_sum(b) for a, b in zip(sum_L, other, strict=True)]
    return sum_L


def _check_selection_bias(policy: BalancePolicy, model: nn.Module) -> None:
    rate = f"bias_update_rate {policy.bias_update_rate:g}"
    if not has_selection_bias(model):
        raise UserError(
            f"{rate}: {type(model).__name__} has no selection bias to update; make a model with "
            "router_selection_bias, or set it to 0."
        )
    if is_adapted(model):
        raise UserError(
            f"{rate}: the selection bias belongs to the base model, and neither an adapter's file "
            "nor a reference under the same base would follow it; train all weights, or set it "
            "to 0."
        )


def _check_losses(policy: BalancePolicy, model: nn.Module) -> None:
    for spec in router_specs(model):
        if spec.kind == "expert_choice" or not (
            spec.chooses_by_score or policy.load_balancing_coef == 0
        ):
            raise UserError(
                f"a balance loss (load_balancing_coef {policy.load_balancing_coef:g}, z_loss_coef "
                f"{policy.z_loss_coef:g}) cannot change what a router of kind {spec.kind!r} "
                "chooses: set them to 0, or the scope to off."
            )


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            function = getattr(module, "_gradient_checkpointing_func", None)
            if getattr(function, "keywords", {}).get("use_reentrant"):
                return True
    return False
