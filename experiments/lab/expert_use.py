"""How a model's experts are used on texts: passes, and what they say by domain and by token.

The decision to know: a pass is reduced at once to counts, so that what is kept grows with texts and
tokens and never with logits; and chance levels are shufflings of whole texts, because tokens of one
text resemble each other.

Shapes: B batch, S sequence, T tokens, E experts, K experts per token, L MoE layers, N texts,
G domains, P shufflings, U distinct tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe.counters import permutation
from moe.errors import UserError
from moe.record import RecordedForward, RoutingTrace, record_routing
from moe.stats import RouterStats, drift, jensen_shannon_bits
from sft.text import pad_batch

PURPOSE = "expert_use"


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
    jaccard_L: mean over tokens of the shared part of the chosen sets (None without).
    text_count_NLE: float32, assignments per text (None unless asked for).
    token_T: int64, and expert_LTK: int16, every real token and its choice (None unless asked for).
    """

    stats: RouterStats
    other_stats: RouterStats | None
    jaccard_L: Tensor | None
    text_count_NLE: Tensor | None
    token_T: Tensor | None
    expert_LTK: Tensor | None


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
    per_token: bool = False,
) -> Observed:
    """One pass over the texts; what is kept grows with texts and tokens, not with the logits.

    Raises UserError if the two models have different numbers of layers or experts.
    """
    stats: RouterStats | None = None
    other_stats: RouterStats | None = None
    shared_L: Tensor | None = None
    text_counts: dict[int, Tensor] = {}
    tokens: list[Tensor] = []
    experts: list[Tensor] = []
    for rows, ids_BS, mask_BS in _batches(texts, pad_id=pad_id, batch_size=batch_size):
        trace = _record(decoder, ids_BS, mask_BS)
        forward = trace.forwards[0]
        part = RouterStats.from_trace(trace)
        stats = part if stats is None else stats.merge(part)
        if against is not None:
            other = _record(against, ids_BS, mask_BS)
            part = RouterStats.from_trace(other)
            other_stats = part if other_stats is None else other_stats.merge(part)
            try:
                jaccard_L = drift(trace, other).jaccard_L
            except ValueError as error:
                raise UserError(f"--against: {error}.") from error
            sums = jaccard_L.cpu() * int(mask_BS.sum())
            shared_L = sums if shared_L is None else shared_L + sums
        if per_text:
            for row, count_LE in zip(rows, row_counts(forward), strict=True):
                text_counts[row] = text_counts[row] + count_LE if row in text_counts else count_LE
        if per_token:
            tokens.append(ids_BS[mask_BS])
            experts.append(
                torch.stack([r.expert_TK[r.mask_T].short().cpu() for r in forward.routings])
            )
    assert stats is not None
    counts = [text_counts[number] for number in sorted(text_counts)]
    return Observed(
        stats=stats,
        other_stats=other_stats,
        jaccard_L=None if shared_L is None else shared_L / stats.tokens_L.cpu(),
        text_count_NLE=torch.stack(counts) if per_text else None,
        token_T=torch.cat(tokens) if per_token else None,
        expert_LTK=torch.cat(experts, dim=1) if per_token else None,
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


def row_counts(forward: RecordedForward) -> Tensor:
    """Assignments of each row of a pass, (B, L, E) float32, padding left out."""
    batch = forward.mask_BS.shape[0]
    layers = []
    for r in forward.routings:
        chosen_TE = torch.nn.functional.one_hot(r.expert_TK, r.num_experts).sum(dim=1).float()
        count_BE = chosen_TE.new_zeros(batch, r.num_experts)
        layers.append(count_BE.index_add(0, r.sequence_T, chosen_TE * r.mask_T[:, None]))
    return torch.stack(layers, dim=1).cpu()


def measures(stats: RouterStats) -> dict[str, list[Any]]:
    """Every measure per layer, and `load_share` (load / fair share) per layer and expert."""
    relative_LE = stats.relative_load_LE
    return {
        "max_load": relative_LE.amax(dim=-1).tolist(),
        "min_load": relative_LE.amin(dim=-1).tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dropped_share": stats.dropped_share_L.tolist(),
        "load_share": relative_LE.tolist(),
    }


# --- by domain -----------------------------------------------------------------------------------


def domain_divergence(text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int) -> Tensor:
    """Mean over pairs of domains of the Jensen-Shannon divergence of their loads, bits, (L,)."""
    load_GLE = domain_loads(text_count_NLE, labels_N, num_domains=num_domains)
    first, second = torch.triu_indices(num_domains, num_domains, offset=1)
    return jensen_shannon_bits(load_GLE[first], load_GLE[second]).mean(dim=0)


def domain_loads(text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int) -> Tensor:
    """Share of assignments per domain, layer and expert, (G, L, E) float64."""
    _, layers, experts = text_count_NLE.shape
    count_GLE = text_count_NLE.new_zeros(num_domains, layers, experts).double()
    count_GLE = count_GLE.index_add(0, labels_N, text_count_NLE.double())
    return count_GLE / count_GLE.sum(dim=-1, keepdim=True).clamp(min=1)


def shuffled_divergence(
    text_count_NLE: Tensor, labels_N: Tensor, *, num_domains: int, permutations: int, seed: int
) -> Tensor:
    """The same under shufflings of the labels over whole texts, (permutations, L).

    Whole texts, because tokens of one text resemble each other: shuffling tokens would call any
    two texts different.
    """
    shuffled = []
    for number in range(permutations):
        order = permutation(seed, PURPOSE, number, length=len(labels_N))
        labels = labels_N[torch.tensor(order)]
        shuffled.append(domain_divergence(text_count_NLE, labels, num_domains=num_domains))
    return torch.stack(shuffled)


def p_value(observed: float, shuffled: Sequence[float]) -> float:
    """Share of the shufflings, the observed one among them, that reach the observed value."""
    # Rounding of sums must not decide between equal divergences.
    reached = sum(value >= observed * (1 - 1e-9) for value in shuffled)
    return (1 + reached) / (1 + len(shuffled))


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
