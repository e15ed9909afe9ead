"""How much of its final routing a checkpoint already has: sums that merge, finalised once.

Shapes: L MoE layers, E experts, K experts per token, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.choices import paired_sets
from moe.errors import UserError
from moe.record import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Sums over the tokens of two recordings of the same texts, float64 in main memory.

    shared_L: experts that a token has in both, summed. count_LE, final_count_LE: assignments of the
    checkpoint and of the final model. num_tokens: tokens compared; top_k: K.
    """

    shared_L: Tensor
    count_LE: Tensor
    final_count_LE: Tensor
    num_tokens: int
    top_k: int

    def merge(self, other: "Saturation") -> "Saturation":
        """Raises ValueError if K differs."""
        if self.top_k != other.top_k:
            raise ValueError(f"cannot merge saturation of top_k {self.top_k} and {other.top_k}")
        return Saturation(
            shared_L=self.shared_L + other.shared_L,
            count_LE=self.count_LE + other.count_LE,
            final_count_LE=self.final_count_LE + other.final_count_LE,
            num_tokens=self.num_tokens + other.num_tokens,
            top_k=self.top_k,
        )

    @property
    def share_L(self) -> Tensor:
        """Mean over tokens of |A & B| / K of the two sets of K experts: 1 is settled.

        (Muennighoff et al. 2024, OLMoE, section 5.1.)
        """
        return self.shared_L / max(self.num_tokens * self.top_k, 1)

    @property
    def usage_null_L(self) -> Tensor:
        """What two routers of these loads share when they know nothing of each other.

        sum_i u_i v_i / K, with u and v the shares of tokens that have expert i among their K.
        """
        tokens = max(self.num_tokens, 1)
        both_L = (self.count_LE * self.final_count_LE).sum(dim=-1) / tokens**2
        return both_L / self.top_k

    @property
    def uniform_null(self) -> float:
        """The same with even loads: K / E."""
        return self.top_k / self.count_LE.shape[-1]


def saturation(checkpoint: RoutingTrace, final: RoutingTrace) -> Saturation:
    """Compare a checkpoint's recording with the final model's, token by token.

    Raises UserError for expert choice, ValueError unless both hold the same samples, tokens and
    number of layers and experts, with equally many experts per token.
    """
    for trace in (checkpoint, final):
        if any(r.balanced_by_construction for f in trace.forwards for r in f.routings):
            raise UserError(
                "saturation has no meaning for a router of kind 'expert_choice', whose tokens have "
                "no fixed number of experts: compare the recordings by moe.stats.drift."
            )
    top_k, final_top_k = _top_k(checkpoint), _top_k(final)
    if top_k != final_top_k:
        raise ValueError(
            f"the recordings have {top_k} and {final_top_k} experts per token: a share of K needs "
            "one K"
        )
    shared: list[Tensor] = []
    now: list[Tensor] = []
    end: list[Tensor] = []
    tokens = 0
    for now_LTE, end_LTE in paired_sets(checkpoint, final):
        shared.append((now_LTE & end_LTE).sum(dim=(1, 2)))
        now.append(now_LTE.sum(dim=1))
        end.append(end_LTE.sum(dim=1))
        tokens += now_LTE.shape[1]
    if not tokens:
        raise ValueError("the recordings hold no token: run the models inside record_routing")
    sums = [torch.stack(rows).sum(dim=0).double().cpu() for rows in (shared, now, end)]
    return Saturation(
        shared_L=sums[0],
        count_LE=sums[1],
        final_count_LE=sums[2],
        num_tokens=tokens,
        top_k=top_k,
    )


def _top_k(trace: RoutingTrace) -> int:
    return trace.forwards[0].routings[0].top_k if trace.num_layers else 0
