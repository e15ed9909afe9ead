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
from moe.routing import chosen_table


@dataclass(frozen=True, kw_only=True)
class TokenChoices:
    """The choices of the real tokens of a trace, pass by pass, row by row, first token first.

    expert_LTK: int16, best first. sequence_T: int64, the text a token stands in: its row, of packed
    rows its sample's part of the row. Texts are numbered through all passes, so that two tokens are
    neighbours where they follow each other and share it.
    """

    expert_LTK: Tensor
    sequence_T: Tensor
    num_experts: int


def token_choices(trace: RoutingTrace) -> TokenChoices:
    """Every real token's choice, in main memory.

    Raises ValueError for an empty trace, for expert choice, where a token has no K choices, and for
    passes that go on from a cache, which hold no whole text.
    """
    if not trace.forwards:
        raise ValueError("the trace is empty: run the model inside record_routing")
    experts, sequences, texts = [], [], 0
    for forward in trace.forwards:
        _refuse_continued(forward)
        experts.append(chosen_experts(forward))
        text_T, sample_N = _texts(forward)
        sequences.append(texts + text_T.cpu())
        texts += len(sample_N)
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
    """Per text of both recordings, the two tables of chosen experts, bool (L, T, E).

    A text is a row, of packed rows a sample's part of one. Texts are matched by sample id and
    occurrence, so batches may be cut, padded and packed differently.
    Raises ValueError unless both hold the same samples, tokens and number of layers and experts.
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
    texts: dict[tuple[int, int], Tensor] = {}
    seen: dict[int, int] = {}
    for forward in trace.forwards:
        chosen_LTE = torch.stack([chosen_table(r) for r in forward.routings])
        real_LTE = chosen_LTE[:, rearrange(forward.mask_BS, "b s -> (b s)")]
        text_T, sample_N = _texts(forward)
        length_N = text_T.bincount(minlength=len(sample_N))
        parts = real_LTE.split(length_N.tolist(), dim=1)
        for sample, part_LTE in zip(sample_N.tolist(), parts, strict=True):
            texts[sample, seen.get(sample, 0)] = part_LTE
            seen[sample] = seen.get(sample, 0) + 1
    return texts


def _texts(forward: RecordedForward) -> tuple[Tensor, Tensor]:
    """The text (T,) of each real token, numbered within the pass, and each text's sample id (N,).

    A row is a text, even one of padding alone; of packed rows each run of one id is, as it is where
    tokens are numbered (`moe.pass_keys.token_numbers`).
    """
    mask_BS = forward.mask_BS
    if forward.sample_ids.dim() == 1:
        batch, length = mask_BS.shape
        row_BS = repeat(torch.arange(batch, device=mask_BS.device), "b -> b s", s=length)
        return row_BS[mask_BS], forward.sample_ids
    starts_T = forward.keys().token_BS[mask_BS] == 0
    return starts_T.cumsum(dim=0) - 1, forward.sample_ids[mask_BS][starts_T]


def _refuse_continued(forward: RecordedForward) -> None:
    if forward.token_BS is None:
        return
    begun_BS = ((forward.token_BS == 0) & forward.mask_BS).cumsum(dim=1) > 0
    if bool((forward.mask_BS & ~begun_BS).any()):
        raise ValueError(
            "the recording has passes that go on from a cache, where neighbours lie in two passes: "
            "record whole texts in one pass"
        )
