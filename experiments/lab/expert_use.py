"""How a model's experts are used on texts: the passes over them, and what they leave.

The decision to know: a pass is reduced at once to counts and choices, so that what is kept grows
with texts and tokens and never with logits. The measures themselves are in `moe`.

Shapes: B batch, S sequence, T tokens, E experts, K experts per token, L MoE layers, N texts,
U distinct tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.choices import token_choices
from moe.coactivation import CoActivation
from moe.errors import UserError
from moe.record import RoutingTrace, record_routing
from moe.saturation import Saturation, saturation
from moe.specialisation import row_counts
from moe.stats import RouterStats, drift
from sft.text import pad_batch


@dataclass(frozen=True, kw_only=True)
class Text:
    """One text of the file: its place, its domain if it has one, its ids in pieces."""

    place: str
    domain: str | None
    pieces: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What the passes over all texts left.

    stats, other_stats: expert use of the model and of the one it is held against (None without).
    jaccard_L: mean over tokens of the shared part of the chosen sets, and `saturation`: the shared
    choices (None without). pairs: experts chosen together (None of a top-1 router).
    text_count_NLE: float32, assignments per text (None unless asked for).
    token_T: int64, expert_LTK: int16, sequence_T: int64: every real token, its choice, its piece.
    """

    stats: RouterStats
    other_stats: RouterStats | None
    jaccard_L: Tensor | None
    saturation: Saturation | None
    pairs: CoActivation | None
    text_count_NLE: Tensor | None
    token_T: Tensor
    expert_LTK: Tensor
    sequence_T: Tensor


@dataclass(frozen=True, kw_only=True)
class Specialised:
    """A token that one expert gets often.

    share: P(expert is among the chosen | token); load: the expert's share of all assignments.
    """

    layer: int
    expert: int
    token: int
    text: str
    count: int
    share: float
    load: float


# --- passes --------------------------------------------------------------------------------------


def observe(
    decoder: nn.Module,
    texts: Sequence[Text],
    *,
    pad_id: int,
    batch_size: int,
    against: nn.Module | None = None,
    per_text: bool = False,
) -> Observed:
    """One pass over the texts; what is kept grows with texts and tokens, not with the logits.

    Raises UserError if the two models have different numbers of layers, experts or choices.
    """
    seen = _Seen()
    text_counts: dict[int, Tensor] = {}
    for rows, ids_BS, mask_BS in _batches(texts, pad_id=pad_id, batch_size=batch_size):
        trace = _record(decoder, ids_BS, mask_BS)
        seen.add(trace, ids_BS[mask_BS])
        if against is not None:
            seen.compare(trace, _record(against, ids_BS, mask_BS))
        if per_text:
            for row, count_LE in zip(rows, row_counts(trace.forwards[0]), strict=True):
                text_counts[row] = text_counts[row] + count_LE if row in text_counts else count_LE
    counts = [text_counts[number] for number in sorted(text_counts)]
    return seen.observed(torch.stack(counts) if per_text else None)


class _Seen:
    """The sums and choices of the passes so far."""

    def __init__(self) -> None:
        self.stats: RouterStats | None = None
        self.pairs: CoActivation | None = None
        self.other_stats: RouterStats | None = None
        self.saturation: Saturation | None = None
        self.jaccard_sum_L: Tensor | None = None
        self.tokens: list[Tensor] = []
        self.experts: list[Tensor] = []
        self.sequences: list[Tensor] = []
        self.num_rows = 0

    def add(self, trace: RoutingTrace, token_T: Tensor) -> None:
        stats = RouterStats.from_trace(trace)
        self.stats = stats if self.stats is None else self.stats.merge(stats)
        if stats.top_k > 1:
            pairs = CoActivation.from_trace(trace)
            self.pairs = pairs if self.pairs is None else self.pairs.merge(pairs)
        choices = token_choices(trace)
        self.tokens.append(token_T)
        self.experts.append(choices.expert_LTK)
        self.sequences.append(choices.sequence_T + self.num_rows)
        self.num_rows += sum(len(forward.sample_ids) for forward in trace.forwards)

    def compare(self, trace: RoutingTrace, other: RoutingTrace) -> None:
        try:
            jaccard_L = drift(trace, other).jaccard_L
            shared = saturation(trace, other)
        except ValueError as error:
            raise UserError(f"--against: {error}.") from error
        stats = RouterStats.from_trace(other)
        self.other_stats = stats if self.other_stats is None else self.other_stats.merge(stats)
        self.saturation = shared if self.saturation is None else self.saturation.merge(shared)
        sums_L = jaccard_L.cpu() * shared.num_tokens
        self.jaccard_sum_L = sums_L if self.jaccard_sum_L is None else self.jaccard_sum_L + sums_L

    def observed(self, text_count_NLE: Tensor | None) -> Observed:
        assert self.stats is not None
        jaccard_L = None
        if self.jaccard_sum_L is not None:
            jaccard_L = self.jaccard_sum_L / self.stats.tokens_L.cpu()
        return Observed(
            stats=self.stats,
            other_stats=self.other_stats,
            jaccard_L=jaccard_L,
            saturation=self.saturation,
            pairs=self.pairs,
            text_count_NLE=text_count_NLE,
            token_T=torch.cat(self.tokens),
            expert_LTK=torch.cat(self.experts, dim=1),
            sequence_T=torch.cat(self.sequences),
        )


def _batches(
    texts: Sequence[Text], *, pad_id: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(number of the text of each row, ids (B, S), mask (B, S)), in the file's order."""
    pieces = [(number, piece) for number, text in enumerate(texts) for piece in text.pieces]
    with _progress(len(pieces)) as advance:
        for start in range(0, len(pieces), batch_size):
            here = pieces[start : start + batch_size]
            ids_BS, mask_BS = pad_batch([ids for _, ids in here], pad_id=pad_id, side="right")
            yield [number for number, _ in here], ids_BS, mask_BS
            advance(len(here))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; gives the function that moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("texts", total=total)
        yield lambda count: bar.advance(task, count)


def _record(decoder: nn.Module, ids_BS: Tensor, mask_BS: Tensor) -> RoutingTrace:
    device = next(decoder.parameters()).device
    with torch.no_grad(), record_routing(decoder) as trace:
        decoder(
            input_ids=ids_BS.to(device),
            attention_mask=mask_BS.long().to(device),
            use_cache=False,
        )
    return trace


# --- by token ------------------------------------------------------------------------------------


def specialised_tokens(
    token_T: Tensor,
    expert_LTK: Tensor,
    *,
    load_LE: Tensor,
    min_count: int,
    top: int,
    decode: Callable[[int], str],
) -> list[Specialised]:
    """The `top` tokens of each expert by share, then count, among those seen `min_count` times."""
    ids_U, place_T, count_U = token_T.unique(return_inverse=True, return_counts=True)
    frequent_T = (count_U >= min_count)[place_T]
    ids_U, place_T, count_U = token_T[frequent_T].unique(return_inverse=True, return_counts=True)
    num_experts = load_LE.shape[1]
    found = []
    for layer, expert_TK in enumerate(expert_LTK[:, frequent_T].long()):
        cells_TK = place_T[:, None] * num_experts + expert_TK
        chosen_UE = torch.bincount(cells_TK.flatten(), minlength=len(ids_U) * num_experts)
        share_UE = chosen_UE.view(len(ids_U), num_experts) / count_U[:, None]
        # Two stable sorts: by share, then by count, then by id, which `unique` has put in order.
        by_count_U = count_U.argsort(descending=True, stable=True)
        for expert in range(num_experts):
            share_U = share_UE[by_count_U, expert]
            order = by_count_U[share_U.argsort(descending=True, stable=True)[:top]].tolist()
            found += [
                Specialised(
                    layer=layer,
                    expert=expert,
                    token=int(ids_U[u]),
                    text=decode(int(ids_U[u])),
                    count=int(count_U[u]),
                    share=float(share_UE[u, expert]),
                    load=float(load_LE[layer, expert]),
                )
                for u in order
                if share_UE[u, expert] > 0
            ]
    return found
