"""Which experts real tokens chose, out of a trace: as sets to compare, as rows to count.

The decision to know: padding ends here. Whoever reads choices from this file sees real tokens only,
in the order of their texts, whatever the batching was.

Shapes: B batch, S sequence, T real tokens, L MoE layers, E experts, K experts per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from moe.record import RecordedForward, RoutingTrace
from moe.routing import Routing


def chosen_table(routing: Routing) -> Tensor:
    """Who chose whom before dropping, bool (T, E), all False on padding; waits for no device.

    Of expert choice, which drops nothing, the tokens that the experts took.
    """
    if routing.balanced_by_construction:
        return routing.kept_TK & routing.mask_T[:, None]
    real_TK = routing.mask_T[:, None].expand_as(routing.expert_TK)
    expert_TK = torch.where(real_TK, routing.expert_TK, 0)  # padding may hold any number
    return torch.zeros_like(routing.score_TE, dtype=torch.bool).scatter(1, expert_TK, real_TK)


@dataclass(frozen=True, kw_only=True)
class TokenChoices:
    """The choices of the real tokens of a trace, pass by pass, row by row, first token first.

    expert_LTK: int16, best first. sequence_T: int64, the row a token stands in; rows are numbered
    through all passes, so that two tokens are neighbours where they follow each other and share it.
    """

    expert_LTK: Tensor
    sequence_T: Tensor
    num_experts: int


def token_choices(trace: RoutingTrace) -> TokenChoices:
    """Every real token's choice, in main memory.

    Raises ValueError for an empty trace, for expert choice, where a token has no K choices, and for
    packed rows or passes that go on from a cache, whose rows are not texts.
    """
    if not trace.forwards:
        raise ValueError("the trace is empty: run the model inside record_routing")
    experts, sequences, rows = [], [], 0
    for forward in trace.forwards:
        _refuse_packed(forward)
        _refuse_continued(forward)
        experts.append(chosen_experts(forward))
        batch, length = forward.mask_BS.shape
        row_BS = repeat(torch.arange(rows, rows + batch), "b -> b s", s=length)
        sequences.append(row_BS[forward.mask_BS.cpu()])
        rows += batch
    return TokenChoices(
        expert_LTK=torch.cat(experts, dim=1),
        sequence_T=torch.cat(sequences),
        num_experts=trace.num_experts,
    )


def chosen_experts(forward: RecordedForward) -> Tensor:
    """Expert ids (L, T, K) of one pass's real tokens, int16, in main memory.

    Raises ValueError for expert choice.
    """
    if any(r.balanced_by_construction for r in forward.routings):
        raise ValueError("with expert choice a token has no list of its experts: count sets")
    mask_T = rearrange(forward.mask_BS, "b s -> (b s)")
    return torch.stack([r.expert_TK[mask_T].short() for r in forward.routings]).cpu()


def paired_sets(before: RoutingTrace, after: RoutingTrace) -> Iterator[tuple[Tensor, Tensor]]:
    """Per row of both recordings, the two tables of chosen experts, bool (L, T, E).

    Rows are matched by sample id and occurrence, so batches may be cut and padded differently.
    Raises ValueError unless both hold the same samples, tokens and number of layers and experts,
    and for packed rows.
    """
    if (before.num_layers, before.num_experts) != (after.num_layers, after.num_experts):
        raise ValueError(
            f"the recordings have {before.num_layers} and {after.num_layers} layers, "
            f"{before.num_experts} and {after.num_experts} experts: only like models compare"
        )
    first, second = _sets(before), _sets(after)
    if first.keys() != second.keys() or any(
        first[k].shape[:2] != second[k].shape[:2] for k in first
    ):
        raise ValueError("the recordings hold different samples or tokens: record the same texts")
    for key, chosen_LTE in first.items():
        yield chosen_LTE, second[key]


def _sets(trace: RoutingTrace) -> dict[tuple[int, int], Tensor]:
    """(sample id, occurrence) -> chosen experts, bool (L, T, E)."""
    rows: dict[tuple[int, int], Tensor] = {}
    seen: dict[int, int] = {}
    for forward in trace.forwards:
        _refuse_packed(forward)
        chosen_LTE = torch.stack([chosen_table(r) for r in forward.routings])
        batch, length = forward.mask_BS.shape
        by_row = chosen_LTE.unflatten(1, (batch, length))
        for row, sample in enumerate(forward.sample_ids.tolist()):
            rows[sample, seen.get(sample, 0)] = by_row[:, row, forward.mask_BS[row]]
            seen[sample] = seen.get(sample, 0) + 1
    return rows


def _refuse_packed(forward: RecordedForward) -> None:
    if forward.sample_ids.dim() > 1:
        raise ValueError(
            "the recording has packed rows (sample_ids of each token): record each text in a row"
        )


def _refuse_continued(forward: RecordedForward) -> None:
    if forward.token_BS is None:
        return
    begun_B = ((forward.token_BS == 0) & forward.mask_BS).any(dim=1)
    if bool((forward.mask_BS.any(dim=1) & ~begun_B).any()):
        raise ValueError(
            "the recording has passes that go on from a cache, where neighbours lie in two passes: "
            "record whole texts in one pass"
        )
