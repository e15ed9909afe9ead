"""What was recorded of a model's routers: passes, whose rows are keyed (sample id, token, layer).

The decision to know: a trace of choices alone (`from_choices`, `load`) is a trace like any other,
with scores that are not a number, so that loads can be counted and nothing unknown is made up.

Shapes: B batch, S sequence, T = B*S tokens, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from moe.choice_table import ChoiceTable
from moe.errors import UserError
from moe.pass_keys import PassKeys, token_numbers
from moe.routing import Routing


@dataclass(frozen=True, kw_only=True)
class RecordedForward:
    """One pass: mask_BS (True on real tokens), a Routing per MoE layer.

    sample_ids: int64 (B,), or (B, S) for packed rows. token_BS: int64, the number of each token in
    its sample, -1 on padding (`moe.pass_keys`); None: counted over the mask, nothing cached.
    """

    sample_ids: Tensor
    mask_BS: Tensor
    routings: tuple[Routing, ...]
    token_BS: Tensor | None = None

    def keys(self) -> PassKeys:
        token_BS = self.token_BS
        if token_BS is None:
            token_BS = token_numbers(self.mask_BS, self.sample_ids)
        return PassKeys(sample_ids=self.sample_ids, token_BS=token_BS, is_whole=True)


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

    @property
    def top_k(self) -> int:
        return self.forwards[0].routings[0].top_k if self.num_layers else 0

    def clear(self) -> None:
        self.forwards.clear()

    def choices(self) -> ChoiceTable:
        """Every real token's experts and nothing else: 2 bytes a choice instead of all scores.

        Raises `UserError` for an empty trace, passes of different models, expert choice, and as
        `ChoiceTable.from_tokens`: a token recorded twice or not at all.
        """
        if not self.forwards:
            raise UserError("the trace is empty: run the model inside record_routing.")
        _refuse_other_models(self)
        samples, tokens, experts = [], [], []
        for forward in self.forwards:
            keys = forward.keys()
            real_BS = forward.mask_BS
            samples.append(keys.sample_BS[real_BS])
            tokens.append(keys.token_BS[real_BS])
            expert_TLK = torch.stack([r.expert_TK for r in forward.routings], dim=1)
            experts.append(expert_TLK[rearrange(real_BS, "b s -> (b s)")])
        return ChoiceTable.from_tokens(
            torch.cat(samples),
            torch.cat(tokens),
            expert_TLK=torch.cat(experts),
            num_experts=self.num_experts,
        )

    @classmethod
    def from_choices(cls, choices: Mapping[int, Tensor], *, num_experts: int) -> "RoutingTrace":
        """A trace of ids alone, as an inference engine returns them: one pass per sample.

        choices: sample id -> integers (L, tokens, K), the first token first. Logits, scores and
        weights are not a number. Raises `UserError` as `ChoiceTable.from_samples`.
        """
        return _trace_of(ChoiceTable.from_samples(choices, num_experts=num_experts))

    def save(self, path: str | Path) -> None:
        """The choices, as one safetensors file; scores and logits are not kept."""
        self.choices().save(path)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingTrace":
        """Raises `UserError` for a file that `save` did not write, or whose parts disagree."""
        return _trace_of(ChoiceTable.load(path))


def _refuse_other_models(trace: RoutingTrace) -> None:
    for forward in trace.forwards:
        kinds = {(r.num_experts, r.top_k) for r in forward.routings}
        if len(forward.routings) != trace.num_layers or kinds != {(trace.num_experts, trace.top_k)}:
            raise UserError(
                "the trace holds passes with other numbers of layers, experts or experts per "
                "token: record one model at a time."
            )
        if any(r.balanced_by_construction for r in forward.routings):
            raise UserError(
                "kind 'expert_choice' cannot be replayed: which tokens an expert takes is no list "
                "of experts per token."
            )


def _trace_of(table: ChoiceTable) -> RoutingTrace:
    forwards = []
    for name, choice_LTK in table.samples():
        length = choice_LTK.shape[1]
        mask_BS = torch.ones(1, length, dtype=torch.bool, device=choice_LTK.device)
        routings = tuple(_choice_alone(c_TK, table.num_experts) for c_TK in choice_LTK)
        ids = torch.tensor([name], device=choice_LTK.device)
        forwards.append(RecordedForward(sample_ids=ids, mask_BS=mask_BS, routings=routings))
    return RoutingTrace(forwards=forwards)


def _choice_alone(expert_TK: Tensor, num_experts: int) -> Routing:
    num_tokens, top_k = expert_TK.shape
    unknown = torch.full((1, 1), torch.nan, device=expert_TK.device)  # expanded: takes no memory
    mask_T = torch.ones(num_tokens, dtype=torch.bool, device=expert_TK.device)
    return Routing(
        logits_TE=unknown.expand(num_tokens, num_experts),
        score_TE=unknown.expand(num_tokens, num_experts),
        expert_TK=expert_TK,
        kept_TK=mask_T[:, None].expand(num_tokens, top_k),
        weight_TK=unknown.expand(num_tokens, top_k),
        mask_T=mask_T,
        sequence_T=torch.zeros(num_tokens, dtype=torch.long, device=expert_TK.device),
        num_experts=num_experts,
    )
