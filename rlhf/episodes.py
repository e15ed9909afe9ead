"""The episodes of an update: which prompts, who draws them, in what order they are learned from.

The decision to know: all of it is a function of (seed, update, epoch, minibatch), so that neither
where a run was cut nor over how many processes it runs leaves a trace.

Shapes: B episodes of an update, P prompt, R response, S = P + R, L MoE layers, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from moe.counters import permutation
from moe.generation import Rollout, sample
from moe.record import has_router
from rlhf.ppo_settings import PPOSettings
from rlhf.rollout_numerics import sampling_numerics
from rlhf.routing_watch import rollout_choices


@dataclass(frozen=True, kw_only=True)
class RolloutBuffer:
    """The episodes of one update, the same on every process.

    prompt_BP left-padded with prompt_mask_BP; response_BR right-padded with mask_BR; the per-token
    fields (B, R) are zero where masked: old_logp, ref_logp, value, advantage (whitened if asked,
    unless that is done by the minibatch), returns; without a critic value and returns are zero
    everywhere. The answers to one prompt are `group_size` rows that follow one another. score_B:
    what the reward source gave, before penalties. value_mask_BR: where value and returns count, if
    not where mask_BR is true.
    expert_BSLK: int16, the experts of the old-policy pass, sorted along K; None without routers.
    correction_BR: what the policy's loss is weighed by (`rlhf.mismatch`); None for 1.
    """

    prompt_BP: Tensor
    prompt_mask_BP: Tensor
    response_BR: Tensor
    mask_BR: Tensor
    old_logp_BR: Tensor
    ref_logp_BR: Tensor
    value_BR: Tensor
    advantage_BR: Tensor
    return_BR: Tensor
    score_B: Tensor
    value_mask_BR: Tensor | None = None
    expert_BSLK: Tensor | None = None
    correction_BR: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; those that are None are left out."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in held.items() if tensor is not None}

    @property
    def attention_mask_BS(self) -> Tensor:
        return torch.cat([self.prompt_mask_BP, self.mask_BR], dim=1)

    def columns(self, rows: Sequence[int]) -> slice:
        """The columns of S that `rows` keeps of these episodes."""
        kept_BR = self.mask_BR if self.value_mask_BR is None else self.value_mask_BR
        width = self.prompt_BP.shape[1]
        num_prompt = max(int(self.prompt_mask_BP[list(rows)].sum(dim=1).max()), 1)
        num_response = max(int(kept_BR[list(rows)].sum(dim=1).max()), 1)
        return slice(width - num_prompt, width + num_response)

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Some episodes as a batch, cut to their own longest prompt and response.

        Adds `input_ids` and `attention_mask` (B, S), and `value_mask_BR` where the field is None.
        """
        taken = {name: tensor[list(rows)] for name, tensor in self.tensors().items()}
        taken.setdefault("value_mask_BR", taken["mask_BR"])
        kept, width = self.columns(rows), self.prompt_BP.shape[1]
        for name in taken:
            if name.endswith("_BP"):
                taken[name] = taken[name][:, kept.start :]
            elif name.endswith("_BR"):
                taken[name] = taken[name][:, : kept.stop - width]
            elif name.endswith("_BSLK"):
                taken[name] = taken[name][:, kept]
        taken["input_ids"] = torch.cat([taken["prompt_BP"], taken["response_BR"]], dim=1)
        taken["attention_mask"] = torch.cat([taken["prompt_mask_BP"], taken["mask_BR"]], dim=1)
        return taken


def rows_in_order(seed: int, purpose: str, *, first: int, count: int, num_rows: int) -> list[int]:
    """Places first .. first + count - 1 of an endless order: permutation after permutation."""
    epochs = range(first // num_rows, (first + count - 1) // num_rows + 1)
    order = [row for epoch in epochs for row in permutation(seed, purpose, epoch, length=num_rows)]
    start = first - epochs.start * num_rows
    return order[start : start + count]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does what: process `process` of `num_processes`, in micro-batches of `micro` rows.

    chunk: rows that are drawn together.
    """

    ppo: PPOSettings
    seed: int
    process: int
    num_processes: int
    micro: int
    chunk: int

    def place(self, step: int) -> tuple[int, int, int]:
        """(update, epoch, minibatch) of an optimizer step."""
        update, within = divmod(step, self.ppo.epochs * self.ppo.minibatches)
        return (update, *divmod(within, self.ppo.minibatches))

    @property
    def own_episodes(self) -> list[int]:
        """The episodes of an update that this process draws; it may share a group with others."""
        return list(range(self.process, self.ppo.episodes, self.num_processes))

    @property
    def own_share(self) -> range:
        """The places within a minibatch that this process learns from."""
        share = self.ppo.minibatch_size // self.num_processes
        return range(self.process * share, (self.process + 1) * share)

    def minibatch(self, update: int, epoch: int, minibatch: int) -> list[int]:
        """Its episodes, over all processes. 26: a fresh permutation for every epoch."""
        order = permutation(self.seed, "ppo-minibatch", update, epoch, length=self.ppo.episodes)
        size = self.ppo.minibatch_size
        return order[minibatch * size : (minibatch + 1) * size]

    def micro_batches(self, update: int, epoch: int, minibatch: int) -> list[list[int]]:
        """The episodes of each micro-batch of this process."""
        rows = self.minibatch(update, epoch, minibatch)
        mine = [rows[i] for i in self.own_share]
        return [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What one process drew: (rows, R) each but ended_B; choice_BSLK as `rollout_choices` gives."""

    response_BR: Tensor
    mask_BR: Tensor
    logp_BR: Tensor
    ended_B: Tensor
    choice_BSLK: Tensor | None


def draw(
    policy: nn.Module,
    prompt_BP: Tensor,
    *,
    prompt_mask_BP: Tensor,
    sample_ids: Sequence[int],
    update: int,
    plan: Plan,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Drawn:
    """One completion a prompt, `plan.chunk` prompts at a time, in the sampler's numerics.

    A completion's random numbers are its own, so that the chunks change nothing but rounding.
    """
    routed = has_router(policy)
    parts: list[Rollout] = []
    choices: list[Tensor] = []
    for start in range(0, len(sample_ids), plan.chunk):
        rows = slice(start, start + plan.chunk)
        with sampling_numerics(policy, plan.ppo, seed=plan.seed, update=update):
            rollout = sample(
                policy,
                prompt_BP[rows],
                prompt_mask_BP=prompt_mask_BP[rows],
                max_new_tokens=plan.ppo.max_new_tokens,
                temperature=plan.ppo.temperature,
                stop_ids=stop_ids,
                seed=plan.seed,
                purpose="ppo-rollout",
                sample_ids=sample_ids[rows],
                pad_id=pad_id,
                record_routing=routed,
            )
        if routed:
            choices.append(rollout_choices(rollout, sample_ids[rows]))
        parts.append(replace(rollout, routing=None))  # its logits are large
    return Drawn(
        response_BR=torch.cat([part.response_BR for part in parts]),
        mask_BR=torch.cat([part.mask_BR for part in parts]),
        logp_BR=torch.cat([part.logp_BR for part in parts]),
        ended_B=torch.cat([part.ended_B for part in parts]),
        choice_BSLK=torch.cat(choices) if routed else None,
    )
