"""How experts are used: sums that merge, metrics finalised once.

Every measure counts choices before dropping over real tokens; how a measure is reduced is fixed by
keeping its sum and its count.

Shapes: L MoE layers, E experts, K experts per token, T tokens.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from moe.balance import expert_counts
from moe.record import RoutingTrace
from moe.routing import Routing

DEAD_SHARE = 0.1  # an expert with less than a tenth of its fair share counts as dead


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Sums per layer; two of the same model add up with `merge`.

    count_LE: float64, assignments; importance_LE: summed probabilities; entropy_L: summed entropy
    of each token's probabilities in nats; dropped_L: assignments beyond capacity; tokens_L: real
    tokens;
    top_k: K.
    """

    count_LE: Tensor
    importance_LE: Tensor
    entropy_L: Tensor
    dropped_L: Tensor
    tokens_L: Tensor
    top_k: int

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> "RouterStats":
        """Raises ValueError for an empty trace."""
        if not trace.forwards:
            raise ValueError("the trace is empty: run the model inside record_routing")
        parts = [cls.from_routings(forward.routings) for forward in trace.forwards]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        return total

    @classmethod
    def from_routings(cls, routings: tuple[Routing, ...]) -> "RouterStats":
        """The sums of one forward pass, one Routing per layer."""
        with torch.no_grad():
            return cls(
                count_LE=torch.stack([expert_counts(r).double() for r in routings]),
                importance_LE=torch.stack([_importance(r) for r in routings]),
                entropy_L=torch.stack([_entropy(r) for r in routings]),
                dropped_L=torch.stack([_dropped(r) for r in routings]),
                tokens_L=torch.stack([r.mask_T.sum().double() for r in routings]),
                top_k=routings[0].top_k,
            )

    def merge(self, other: "RouterStats") -> "RouterStats":
        """Raises ValueError if K differs."""
        if self.top_k != other.top_k:
            raise ValueError(f"cannot merge statistics of top_k {self.top_k} and {other.top_k}")
        sums = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "top_k"
        }
        return RouterStats(**sums, top_k=self.top_k)

    @property
    def load_LE(self) -> Tensor:
        """Share of assignments per expert, rows sum to 1 (0 where a layer saw no token)."""
        return self.count_LE / self.count_LE.sum(dim=-1, keepdim=True).clamp(min=1)

    @property
    def relative_load_LE(self) -> Tensor:
        """Load over fair share: 1 is fair, 0 is dead."""
        return self.load_LE * self.count_LE.shape[-1]

    @property
    def max_vio_L(self) -> Tensor:
        """Max load / mean load - 1 (Wang et al. 2024, eq. 4): 0 when even, E/K - 1 at collapse."""
        return self.relative_load_LE.amax(dim=-1) - 1

    @property
    def max_vio_floor_L(self) -> Tensor:
        """What MaxVio comes to by chance alone with this many tokens."""
        experts = self.count_LE.shape[-1]
        return torch.tensor(
            [max_vio_floor(experts, self.top_k, float(tokens)) for tokens in self.tokens_L]
        )

    @property
    def load_entropy_L(self) -> Tensor:
        """Entropy of the load over ln E: 1 when even, ln K / ln E at collapse onto K experts."""
        experts = self.count_LE.shape[-1]
        if experts == 1:
            return torch.ones_like(self.tokens_L)
        return torch.special.entr(self.load_LE).sum(dim=-1) / math.log(experts)

    @property
    def token_entropy_L(self) -> Tensor:
        """Mean entropy of a token's probabilities, in nats."""
        return self.entropy_L / self.tokens_L.clamp(min=1)

    @property
    def dead_experts_L(self) -> Tensor:
        """Experts with less than a tenth of their fair share."""
        return (self.relative_load_LE < DEAD_SHARE).sum(dim=-1)

    @property
    def dropped_share_L(self) -> Tensor:
        """Share of assignments beyond capacity; 0 when dropless."""
        return self.dropped_L / (self.tokens_L * self.top_k).clamp(min=1)

    def to_metrics(self) -> dict[str, float]:
        """`router/<measure>/layer_NN` per layer and `router/<measure>`, their mean."""
        measures = {
            "load_entropy": self.load_entropy_L,
            "token_entropy": self.token_entropy_L,
            "max_vio": self.max_vio_L,
            "max_vio_floor": self.max_vio_floor_L,
            "dead_experts": self.dead_experts_L.double(),
            "dropped_share": self.dropped_share_L,
        }
        metrics = {f"router/{name}": float(value.mean()) for name, value in measures.items()}
        for name, value in measures.items():
            for layer, number in enumerate(value.tolist()):
                metrics[f"router/{name}/layer_{layer:02d}"] = number
        return metrics


def max_vio_floor(num_experts: int, top_k: int, num_tokens: float) -> float:
    """About how far the busiest of E fair experts lies above the mean after T tokens.

    The maximum of E Gaussians of the multinomial's spread: sqrt(2 ln E (1 - K/E) E / (T K)).
    """
    if num_tokens <= 0 or num_experts == 1:
        return 0.0
    spread = (1 - top_k / num_experts) * num_experts / (num_tokens * top_k)
    return math.sqrt(2 * math.log(num_experts) * spread)


def _importance(routing: Routing) -> Tensor:
    return torch.where(routing.mask_T[:, None], routing.score_TE.double(), 0.0).sum(dim=0)


def _entropy(routing: Routing) -> Tensor:
    entropy_T = torch.special.entr(routing.score_TE.double()).sum(dim=-1)
    return torch.where(routing.mask_T, entropy_T, 0.0).sum()


def _dropped(routing: Routing) -> Tensor:
    return (routing.mask_T[:, None] & ~routing.kept_TK).sum().double()


@dataclass(frozen=True, kw_only=True)
class RoutingDrift:
    """How far two recordings of the same texts lie apart, per layer.

    jaccard_L: mean over tokens of |A & B| / |A | B| of the two top-k sets; 1 is no change.
    jsd_bits_L: Jensen-Shannon divergence of the two loads in bits, between 0 and 1.
    """

    jaccard_L: Tensor
    jsd_bits_L: Tensor


def drift(before: RoutingTrace, after: RoutingTrace) -> RoutingDrift:
    """Compare two recordings token by token.

    Raises ValueError unless both hold the same samples, tokens and number of layers and experts.
    """
    if (before.num_layers, before.num_experts) != (after.num_layers, after.num_experts):
        raise ValueError(
            f"the recordings have {before.num_layers} and {after.num_layers} layers, "
            f"{before.num_experts} and {after.num_experts} experts: only like models compare"
        )
    first, second = _choices(before), _choices(after)
    if first.keys() != second.keys() or any(
        first[k].shape[:2] != second[k].shape[:2] for k in first
    ):
        raise ValueError("the recordings hold different samples or tokens: record the same texts")
    shared = torch.zeros(before.num_layers, dtype=torch.float64)
    tokens = 0
    for key, chosen_LTE in first.items():
        other_LTE = second[key]
        both = (chosen_LTE & other_LTE).sum(dim=-1).double()
        either = (chosen_LTE | other_LTE).sum(dim=-1).double()
        shared += (both / either).sum(dim=-1)
        tokens += chosen_LTE.shape[1]
    stats = RouterStats.from_trace(before), RouterStats.from_trace(after)
    return RoutingDrift(
        jaccard_L=shared / max(tokens, 1),
        jsd_bits_L=jensen_shannon_bits(stats[0].load_LE, stats[1].load_LE),
    )


def jensen_shannon_bits(p_LE: Tensor, q_LE: Tensor) -> Tensor:
    """Entropy of the mixture minus the mean entropy (Lin 1991), in bits, one value per row."""
    mixture = (p_LE + q_LE) / 2
    entropies = [torch.special.entr(x).sum(dim=-1) for x in (mixture, p_LE, q_LE)]
    return ((entropies[0] - (entropies[1] + entropies[2]) / 2) / math.log(2)).clamp(min=0)


def _choices(trace: RoutingTrace) -> dict[tuple[int, int], Tensor]:
    """(sample id, occurrence) -> chosen experts, bool (L, real tokens, E)."""
    rows: dict[tuple[int, int], Tensor] = {}
    seen: dict[int, int] = {}
    for forward in trace.forwards:
        chosen_LTE = torch.stack(
            [
                torch.nn.functional.one_hot(r.expert_TK, r.num_experts).sum(dim=1).bool()
                for r in forward.routings
            ]
        )
        batch, length = forward.mask_BS.shape
        by_row = chosen_LTE.unflatten(1, (batch, length))
        for row, sample in enumerate(forward.sample_ids.tolist()):
            rows[sample, seen.get(sample, 0)] = by_row[:, row, forward.mask_BS[row]]
            seen[sample] = seen.get(sample, 0) + 1
    return rows
