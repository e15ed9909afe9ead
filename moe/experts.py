"""Fused SwiGLU experts: run a given Routing.

`run_experts_naive` is the specification, one token and one expert at a time; the module's forward
is the fast path: sort the assignments by expert, one matrix product per expert, add back.

Shapes: T tokens, K experts per token, E experts, D width, F expert width, A kept assignments.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from moe.routing import Routing


def run_experts_naive(
    x_TD: Tensor, routing: Routing, *, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over kept assignments of weight * down(silu(gate(x)) * up(x)); gate first in G = 2F."""
    out_TD = []
    for t in range(x_TD.shape[0]):
        total_D = torch.zeros_like(x_TD[t])
        for k in range(routing.top_k):
            if routing.kept_TK[t, k]:
                e = routing.expert_TK[t, k]
                gate_F, up_F = (gate_up_EGD[e] @ x_TD[t]).chunk(2)
                y_D = down_EDF[e] @ (functional.silu(gate_F) * up_F)
                total_D = total_D + routing.weight_TK[t, k].to(y_D.dtype) * y_D
        out_TD.append(total_D)
    return torch.stack(out_TD)


class FusedExperts(nn.Module):
    """E SwiGLU experts in two stacked parameters, HF's names and shapes.

    gate_up_proj (E, 2F, D), gate rows first; down_proj (E, D, F).
    """

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        num_tokens, top_k = routing.expert_TK.shape
        kept_A = rearrange(routing.kept_TK, "t k -> (t k)").nonzero().squeeze(-1)
        expert_A = rearrange(routing.expert_TK, "t k -> (t k)")[kept_A]
        # Stable, so that within an expert the tokens keep their order and sums are reproducible.
        expert_A, order_A = torch.sort(expert_A, stable=True)
        slot_A = kept_A[order_A]
        token_A = repeat(torch.arange(num_tokens, device=x_TD.device), "t -> (t k)", k=top_k)[
            slot_A
        ]
        x_AD = x_TD.index_select(0, token_A)
        sizes = torch.bincount(expert_A, minlength=self.num_experts).tolist()
        # unbind, not W[e]: indexing would fill a zero stack of all experts per expert in backward.
        parts = [
            self._one(x_nD, gate_up_GD, down_DF)
            for x_nD, gate_up_GD, down_DF in zip(
                x_AD.split(sizes),
                self.gate_up_proj.unbind(0),
                self.down_proj.unbind(0),
                strict=True,
            )
        ]
        weight_A = rearrange(routing.weight_TK, "t k -> (t k)").index_select(0, slot_A)
        y_AD = torch.cat(parts) * weight_A[:, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_A, y_AD)

    @staticmethod
    def _one(x_nD: Tensor, gate_up_GD: Tensor, down_DF: Tensor) -> Tensor:
        gate_nF, up_nF = functional.linear(x_nD, gate_up_GD).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate_nF) * up_nF, down_DF)

    def extra_repr(self) -> str:
        experts, double, width = self.gate_up_proj.shape
        return f"num_experts={experts}, hidden_size={width}, intermediate_size={double // 2}"
