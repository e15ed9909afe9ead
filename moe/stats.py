"""How experts are used: sums that merge, metrics finalised once.

Every measure counts choices before dropping over real tokens; how a measure is reduced is fixed by
keeping its sum and its count. The sums stay where the routing was computed: adding a pass waits for
nothing, and reading the metrics moves one vector.

Shapes: L MoE layers, E experts, K experts per token, T tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from moe.choices import paired_sets
from moe.record import RoutingTrace
from moe.routing import Routing, chosen_table

DEAD_SHARE = 0.1  # an expert with less than a tenth of its fair share counts as dead


@dataclass(frozen=True, kw_only=True)
class RouterStats:
    """Sums per layer; two of the same model add up with `merge`.

    All are float64 on one device. count_LE: assignments; importance_LE: summed probabilities;
    entropy_L: summed entropy of each token's probabilities in nats; dropped_L: assignments beyond
    capacity; tokens_L: real tokens; top_k: K.
    margin_L: summed distance of the lowest chosen score from the highest that was not chosen;
    tied_L: tokens where both are the same float32 number; compared_L: tokens with a score that was
    not chosen, none where K = E. They default to nothing compared.
    """

    count_LE: Tensor
    importance_LE: Tensor
    entropy_L: Tensor
    dropped_L: Tensor
    tokens_L: Tensor
    top_k: int
    margin_L: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    tied_L: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    compared_L: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def __post_init__(self) -> None:
        for name in ("margin_L", "tied_L", "compared_L"):
            if getattr(self, name).dim() == 0:
                object.__setattr__(self, name, torch.zeros_like(self.tokens_L))

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
        """The sums of one forward pass, one Routing per layer; nothing is read from the device."""
        with torch.no_grad():
            tables = [chosen_table(r) for r in routings]
            pairs = zip(routings, tables, strict=True)
            margin_L, tied_L, compared_L = torch.stack([_margin(*pair) for pair in pairs]).unbind(
                -1
            )
            return cls(
                count_LE=torch.stack([table.double().sum(dim=0) for table in tables]),
                importance_LE=torch.stack([_importance(r) for r in routings]),
                entropy_L=torch.stack([_entropy(r) for r in routings]),
                dropped_L=torch.stack([_dropped(r) for r in routings]),
                tokens_L=torch.stack([r.mask_T.sum().double() for r in routings]),
                margin_L=margin_L,
                tied_L=tied_L,
                compared_L=compared_L,
                top_k=routings[0].top_k,
            )

    def merge(self, other: "RouterStats") -> "RouterStats":
        """Raises ValueError if K differs."""
        if self.top_k != other.top_k:
            raise ValueError(f"cannot merge statistics of top_k {self.top_k} and {other.top_k}")
        sums = {name: getattr(self, name) + getattr(other, name) for name in self._names}
        return RouterStats(**sums, top_k=self.top_k)

    def cpu(self) -> "RouterStats":
        """The same sums in main memory: one transfer, the only moment that waits for a device."""
        return self._unpacked(self._packed().cpu())

    def summed(self, all_sum: Callable[[Tensor], Tensor]) -> "RouterStats":
        """The sums over all processes; `all_sum` is called once, with one float64 vector."""
        return self._unpacked(all_sum(self._packed()))

    @property
    def _names(self) -> list[str]:
        return [f.name for f in fields(self) if f.name != "top_k"]

    def _packed(self) -> Tensor:
        return torch.cat([getattr(self, name).flatten() for name in self._names])

    def _unpacked(self, packed: Tensor) -> "RouterStats":
        held = [getattr(self, name) for name in self._names]
        parts = packed.split([each.numel() for each in held])
        sums = {
            name: part.view(each.shape)
            for name, part, each in zip(self._names, parts, held, strict=True)
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
            [max_vio_floor(experts, self.top_k, tokens) for tokens in self.tokens_L.tolist()]
        )

    @property
    def load_cv_L(self) -> Tensor:
        """Standard deviation of the load over its mean (Shazeer et al. 2017, section 4).

        0 when even, sqrt(E/K - 1) at collapse onto K experts.
        """
        return self.relative_load_LE.std(dim=-1, correction=0)

    @property
    def load_cv_floor_L(self) -> Tensor:
        """What the load's CV comes to by chance alone: sqrt((1 - K/E) E / (T K)), multinomial."""
        experts = self.count_LE.shape[-1]
        spread = (1 - self.top_k / experts) * experts / (self.tokens_L * self.top_k)
        return torch.where(self.tokens_L > 0, spread, 0.0).sqrt()

    @property
    def mean_margin_L(self) -> Tensor:
        """Mean of the lowest chosen score minus the highest not chosen; NaN where K = E.

        The K-th against the K+1-th score: how far the choice is from another. Below 0 where
        something beside the score decided: a selection bias, groups, a replayed choice.
        """
        return self.margin_L / self.compared_L

    @property
    def tie_rate_L(self) -> Tensor:
        """Share of tokens whose K-th and K+1-th score are one float32 number; NaN where K = E."""
        return self.tied_L / self.compared_L

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
        """`router/<measure>/layer_NN` per layer and `router/<measure>`, their mean.

        Without margin and tie rate where no token has a score that was not chosen.
        """
        held = self.cpu()
        measures = {
            "load_entropy": held.load_entropy_L,
            "token_entropy": held.token_entropy_L,
            "max_vio": held.max_vio_L,
            "max_vio_floor": held.max_vio_floor_L,
            "dead_experts": held.dead_experts_L.double(),
            "dropped_share": held.dropped_share_L,
            "load_cv": held.load_cv_L,
            "margin": held.mean_margin_L,
            "tie_rate": held.tie_rate_L,
        }
        if not bool((held.compared_L > 0).all()):
            del measures["margin"], measures["tie_rate"]
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


def _margin(routing: Routing, chosen_TE: Tensor) -> Tensor:
    """(summed margin, ties, tokens compared), float64."""
    if routing.top_k == routing.num_experts:
        return torch.zeros(3, dtype=torch.float64, device=routing.mask_T.device)
    lowest_T = routing.score_TE.masked_fill(~chosen_TE, math.inf).amin(dim=-1)
    highest_T = routing.score_TE.masked_fill(chosen_TE, -math.inf).amax(dim=-1)
    margin_T = (lowest_T - highest_T).double()
    known_T = routing.mask_T & ~margin_T.isnan()  # a trace of choices alone has no scores
    margin_T = torch.where(known_T, margin_T, 0.0)
    tied_T = known_T & (margin_T == 0)
    return torch.stack([margin_T.sum(), tied_T.sum().double(), known_T.sum().double()])


def _importance(routing: Routing) -> Tensor:
    return torch.where(routing.mask_T[:, None], routing.score_TE.double(), 0.0).sum(dim=0)


def _entropy(routing: Routing) -> Tensor:
    entropy_T = torch.special.entr(routing.score_TE.double()).sum(dim=-1)
    return torch.where(routing.mask_T, entropy_T, 0.0).sum()


def _dropped(routing: Routing) -> Tensor:
    if routing.balanced_by_construction:
        return torch.zeros((), dtype=torch.float64, device=routing.mask_T.device)
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
    shared = torch.zeros(before.num_layers, dtype=torch.float64)
    tokens = 0
    for chosen_LTE, other_LTE in paired_sets(before, after):
        both = (chosen_LTE & other_LTE).sum(dim=-1).double()
        either = (chosen_LTE | other_LTE).sum(dim=-1).double()
        # Of expert choice a token may have no expert; two empty sets are alike.
        same_LT = torch.where(either > 0, both / either.clamp(min=1), 1.0)
        shared += same_LT.sum(dim=-1).cpu()
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
