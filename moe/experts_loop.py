"""The default experts: two matrix products per expert, gradients into one buffer.

Decision to know: this is the autograd of one `linear, silu * up, linear` per expert, step by step
and to the bit (widths of 1 aside), written out so that a weight's gradient is not first made per
expert and then stacked, and so that silu(gate) and h are computed again instead of kept. The sum
over a token's experts is `index_add`, which has one order on the CPU; on CUDA it has none, and
there the backends `lean` and `grouped_mm` are the ones that repeat to the bit.

Shapes: T tokens, D width, F expert width, G = 2F, E experts, A kept assignments, n those of one
expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.autocast import as_autocast
from moe.dispatch import Dispatch, expert_rows, gradient_buffer
from moe.swiglu import swiglu, swiglu_gradients


def run_experts_loop(
    x_TD: Tensor, plan: Dispatch, *, weight_A: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighed sum of the experts' outputs (T, D), as `run_experts_naive`.

    weight_A: float32, in the plan's order. Differentiable once.
    """
    x_AD, gate_up_EGD, down_EDF = as_autocast(
        x_TD.index_select(0, plan.token_A), gate_up_EGD, down_EDF
    )
    y_AD = _LoopExperts.apply(x_AD, gate_up_EGD, down_EDF, plan.size_E.tolist())
    y_AD = y_AD * weight_A[:, None].to(x_TD.dtype)
    return torch.zeros_like(x_TD).index_add(0, plan.token_A, y_AD)


class _LoopExperts(torch.autograd.Function):
    """x_AD -> y_AD of the experts, without weights."""

    @staticmethod
    def forward(
        ctx: Any, x_AD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, sizes: Sequence[int]
    ) -> Tensor:
        z_AG = x_AD.new_empty(x_AD.shape[0], gate_up_EGD.shape[1])
        y_AD = torch.empty_like(x_AD)
        for e, rows in expert_rows(sizes):
            torch.mm(x_AD[rows], gate_up_EGD[e].t(), out=z_AG[rows])
            torch.mm(swiglu(z_AG[rows]), down_EDF[e].t(), out=y_AD[rows])
        ctx.save_for_backward(x_AD, z_AG, gate_up_EGD, down_EDF)
        ctx.sizes = sizes
        return y_AD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_AD: Tensor) -> tuple[Tensor | None, ...]:
        x_AD, z_AG, gate_up_EGD, down_EDF = ctx.saved_tensors
        for_x, for_gate_up, for_down = ctx.needs_input_grad[:3]
        dx_AD = torch.empty_like(x_AD) if for_x else None
        dgate_up_EGD = gradient_buffer(gate_up_EGD, ctx.sizes) if for_gate_up else None
        ddown_EDF = gradient_buffer(down_EDF, ctx.sizes) if for_down else None
        for e, rows in expert_rows(ctx.sizes):
            dh_nF = torch.mm(dy_AD[rows], down_EDF[e])
            h_nF, dz_nG = swiglu_gradients(dh_nF, z_AG[rows])
            if ddown_EDF is not None:
                torch.mm(dy_AD[rows].t(), h_nF, out=ddown_EDF[e])
            if dgate_up_EGD is not None:
                torch.mm(dz_nG.t(), x_AD[rows], out=dgate_up_EGD[e])
            if dx_AD is not None:
                torch.mm(dz_nG, gate_up_EGD[e], out=dx_AD[rows])
        return dx_AD, dgate_up_EGD, ddown_EDF, None
