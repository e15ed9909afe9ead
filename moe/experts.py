"""Fused SwiGLU experts: run a given Routing.

`run_experts_naive` is the specification, one token and one expert at a time. The module sorts the
assignments by expert and hands them to a backend, by name:

    loop        the default: matrix products per expert; on the CPU it repeats to the bit
    lean        keeps the least for backward, and repeats to the bit on any device
    grouped_mm  one operator call for all experts, for CUDA; limits in `moe.experts_grouped`

Decision to know: a backend is no part of the configuration, because it changes no result beyond
rounding: `set_experts_backend(model, "lean")` chooses it where the program runs.

Shapes: T tokens, K experts per token, E experts, D width, F expert width, G = 2F, A kept
assignments.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Protocol, get_args

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from moe.dispatch import Dispatch, dispatch
from moe.errors import UserError
from moe.experts_grouped import check_grouped, run_experts_grouped
from moe.experts_lean import run_experts_lean
from moe.experts_loop import run_experts_loop
from moe.routing import Routing
from moe.swiglu import swiglu

Backend = Literal["loop", "lean", "grouped_mm"]


class RunExperts(Protocol):
    """A backend: the weighed sum (T, D) for sorted assignments and their weights (A,)."""

    def __call__(
        self,
        x_TD: Tensor,
        plan: Dispatch,
        *,
        weight_A: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
    ) -> Tensor: ...


_RUN: Mapping[Backend, RunExperts] = MappingProxyType(
    {"loop": run_experts_loop, "lean": run_experts_lean, "grouped_mm": run_experts_grouped}
)


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

    gate_up_proj (E, 2F, D), gate rows first; down_proj (E, D, F). `backend` is the name of what
    runs them; `set_experts_backend` checks it.
    """

    def __init__(self, *, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.backend: Backend = "loop"
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(
            torch.empty(num_experts, 2 * intermediate_size, hidden_size)
        )
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The weighed sum (T, D) of what each token's kept experts give; 0 if none is kept."""
        if x_TD.shape[0] == 1 and not torch.is_grad_enabled() and self.backend == "loop":
            return self._one_token(x_TD, routing)
        plan = dispatch(routing)
        return _RUN[self.backend](
            x_TD,
            plan,
            weight_A=rearrange(routing.weight_TK, "t k -> (t k)").index_select(0, plan.slot_A),
            gate_up_EGD=self.gate_up_proj,
            down_EDF=self.down_proj,
        )

    def _one_token(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """The loop's steps for T = 1, where sorting would take longer than the products."""
        chosen = zip(routing.expert_TK[0].tolist(), routing.kept_TK[0].tolist(), strict=True)
        order = sorted((e, k) for k, (e, kept) in enumerate(chosen) if kept)
        if not order:
            return torch.zeros_like(x_1D)
        # Read once: under an adapter each reading computes the whole stack.
        gate_up_EGD, down_EDF = self.gate_up_proj, self.down_proj
        parts = [
            functional.linear(swiglu(functional.linear(x_1D, gate_up_EGD[e])), down_EDF[e])
            for e, _ in order
        ]
        weight_A = routing.weight_TK[0, [k for _, k in order]]
        y_AD = torch.cat(parts) * weight_A[:, None].to(x_1D.dtype)
        # Not sum: in bfloat16 that would round at other places than the loop does.
        token_A = torch.zeros(len(order), dtype=torch.long, device=x_1D.device)
        return torch.zeros_like(x_1D).index_add(0, token_A, y_AD)

    def extra_repr(self) -> str:
        experts, double, width = self.gate_up_proj.shape
        return f"num_experts={experts}, hidden_size={width}, intermediate_size={double // 2}"


def set_experts_backend(model: nn.Module, backend: Backend) -> None:
    """Choose what runs the experts of every MoE layer in `model`, from now on.

    Raises UserError for an unknown name, for a model without fused experts, and for grouped_mm if
    the experts' present dtype, widths or device are beyond it; nothing is changed then.
    """
    if backend not in get_args(Backend):
        raise UserError(
            f"Unknown experts backend {backend!r}: it must be one of "
            f"{', '.join(get_args(Backend))}."
        )
    found = [module for module in model.modules() if isinstance(module, FusedExperts)]
    if not found:
        raise UserError(
            f"The experts backend {backend!r} would have no effect: {type(model).__name__} has no "
            "mixture-of-experts layer."
        )
    if backend == "grouped_mm":
        for experts in found:
            down = experts.down_proj
            check_grouped(down.dtype, device=down.device, widths=(down.shape[1], down.shape[2]))
    for experts in found:
        experts.backend = backend
