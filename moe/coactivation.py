"""Which experts are chosen together by one token: every pair of its K experts counts.

The decision to know: of K experts all K (K - 1) / 2 pairs are counted. A count of neighbours in
the ranking alone sees K - 1 of them, 7 of 28 for K = 8, and calls most partners strangers.

Shapes: L MoE layers, T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.record import RoutingTrace
from moe.routing import Routing, chosen_table


@dataclass(frozen=True, kw_only=True)
class CoActivation:
    """Sums over real tokens, before dropping; two of the same model add up with `merge`.

    pair_LEE: float64, tokens that chose both experts; on the diagonal, tokens that chose the one.
    tokens_L: float64, real tokens. top_k: K.
    """

    pair_LEE: Tensor
    tokens_L: Tensor
    top_k: int

    @classmethod
    def from_routings(cls, routings: tuple[Routing, ...]) -> "CoActivation":
        """The sums of one forward pass, one Routing per layer; nothing is read from the device.

        Raises ValueError for expert choice, where tokens have no K in common.
        """
        if any(r.balanced_by_construction for r in routings):
            raise ValueError("with expert choice tokens have different numbers of experts, no K")
        with torch.no_grad():
            tables = [chosen_table(r).float() for r in routings]
            return cls(
                # float32 counts exactly up to 2**24 tokens of one pass
                pair_LEE=torch.stack([table.T @ table for table in tables]).double(),
                tokens_L=torch.stack([r.mask_T.sum().double() for r in routings]),
                top_k=routings[0].top_k,
            )

    @classmethod
    def from_trace(cls, trace: RoutingTrace) -> "CoActivation":
        """Raises ValueError for an empty trace."""
        if not trace.forwards:
            raise ValueError("the trace is empty: run the model inside record_routing")
        total = cls.from_routings(trace.forwards[0].routings)
        for forward in trace.forwards[1:]:
            total = total.merge(cls.from_routings(forward.routings))
        return total

    def merge(self, other: "CoActivation") -> "CoActivation":
        """Raises ValueError if K differs."""
        if self.top_k != other.top_k:
            raise ValueError(f"cannot merge co-activation of top_k {self.top_k} and {other.top_k}")
        return CoActivation(
            pair_LEE=self.pair_LEE + other.pair_LEE,
            tokens_L=self.tokens_L + other.tokens_L,
            top_k=self.top_k,
        )

    @property
    def usage_LE(self) -> Tensor:
        """Share of tokens with the expert among their choices; rows sum to K."""
        count_LE = self.pair_LEE.diagonal(dim1=-2, dim2=-1)
        return count_LE / self.tokens_L[:, None].clamp(min=1)

    @property
    def conditional_LEE(self) -> Tensor:
        """P(j | i) in row i, column j: of the tokens that chose i, the share that also chose j.

        (Muennighoff et al. 2024, OLMoE, section 5.2.) The diagonal is 1, off it a row sums to
        K - 1; a row is 0 where i was never chosen.
        """
        chosen_LE = self.pair_LEE.diagonal(dim1=-2, dim2=-1)
        return self.pair_LEE / chosen_LE[..., None].clamp(min=1)

    @property
    def usage_null_LEE(self) -> Tensor:
        """About what P(j | i) would be from the loads alone: (K - 1) u_j / (K - u_i), i != j.

        u is `usage_LE`. The other K - 1 places of a token go to the other experts in proportion to
        their use, so a row sums to K - 1 as P(j | i) does, and with even use it is (K - 1)/(E - 1).
        The diagonal is 1.
        """
        usage_LE = self.usage_LE
        others_LE = (self.top_k - usage_LE).clamp(min=torch.finfo(torch.float64).tiny)
        null_LEE = (self.top_k - 1) * usage_LE[:, None, :] / others_LE[:, :, None]
        diagonal = torch.eye(usage_LE.shape[-1], dtype=torch.bool, device=usage_LE.device)
        return null_LEE.masked_fill(diagonal, 1.0)

    @property
    def uniform_null(self) -> float:
        """P(j | i) with even use and no preference: (K - 1) / (E - 1)."""
        experts = self.pair_LEE.shape[-1]
        return (self.top_k - 1) / (experts - 1) if experts > 1 else 0.0
