"""The experts with little kept for the backward pass: the input, one pre-activation, the plan.

Decision to know: the outputs y of the experts are not kept, although the gradient of a combine
weight is <dL/dout, y>. With y = down(h) that is <down^T dL/dout, h>, two vectors that the backward
pass has at hand anyway (Guo et al. 2025, SonicMoE). So x, z = gate_up(x), the weights
and the plan are enough; h is computed again from z.

Shapes: T tokens, D width, F expert width, G = 2F, E experts, A kept assignments, n those of one
expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe.autocast import as_autocast
from moe.dispatch import Bags, Dispatch, bags, expert_rows, gradient_buffer, sum_by_token
from moe.swiglu import swiglu, swiglu_gradients


def run_experts_lean(
    x_TD: Tensor, plan: Dispatch, *, weight_A: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighed sum of the experts' outputs (T, D), as `run_experts_naive`.

    weight_A: float32, in the plan's order; it gets a gradient. Differentiable once.
    """
    places = bags(plan.token_A, num_tokens=x_TD.shape[0])
    inputs = as_autocast(x_TD, gate_up_EGD, down_EDF)
    return _LeanExperts.apply(*inputs, weight_A, plan, places).to(x_TD.dtype)


class _LeanExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        gate_up_EGD: Tensor,
        down_EDF: Tensor,
        weight_A: Tensor,
        plan: Dispatch,
        places: Bags,
    ) -> Tensor:
        sizes = plan.size_E.tolist()
        z_AG = x_TD.new_empty(len(plan.token_A), gate_up_EGD.shape[1])
        y_AD = x_TD.new_empty(len(plan.token_A), x_TD.shape[1])
        for e, rows in expert_rows(sizes):
            x_nD = x_TD.index_select(0, plan.token_A[rows])
            torch.mm(x_nD, gate_up_EGD[e].t(), out=z_AG[rows])
            torch.mm(swiglu(z_AG[rows]), down_EDF[e].t(), out=y_AD[rows])
        ctx.save_for_backward(
            *(x_TD, gate_up_EGD, down_EDF, weight_A),
            *(z_AG, plan.token_A, places.place_A, places.start_T),
        )
        ctx.sizes = sizes
        return sum_by_token(y_AD, places, weight_A=weight_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EGD, down_EDF, weight_A, z_AG, token_A, place_A, start_T = ctx.saved_tensors
        for_x, for_gate_up, for_down, for_weight = ctx.needs_input_grad[:4]
        dx_AD = x_TD.new_empty(len(token_A), x_TD.shape[1]) if for_x else None
        dweight_A = torch.empty_like(weight_A) if for_weight else None
        dgate_up_EGD = gradient_buffer(gate_up_EGD, ctx.sizes) if for_gate_up else None
        ddown_EDF = gradient_buffer(down_EDF, ctx.sizes) if for_down else None
        for e, rows in expert_rows(ctx.sizes):
            out_nD = out_gradient_TD.index_select(0, token_A[rows])
            weight_n1 = weight_A[rows, None].to(x_TD.dtype)
            # The gradients of h and z for weight 1: the weight comes in with the rows of x and out.
            dh_nF = torch.mm(out_nD, down_EDF[e])
            h_nF, dz_nG = swiglu_gradients(dh_nF, z_AG[rows])
            if dweight_A is not None:
                dweight_A[rows] = dh_nF.mul_(h_nF).sum(-1, dtype=dweight_A.dtype)
            if ddown_EDF is not None:
                torch.mm(out_nD.mul_(weight_n1).t(), h_nF, out=ddown_EDF[e])
            if dgate_up_EGD is not None:
                x_nD = x_TD.index_select(0, token_A[rows]).mul_(weight_n1)
                torch.mm(dz_nG.t(), x_nD, out=dgate_up_EGD[e])
            if dx_AD is not None:
                torch.mm(dz_nG, gate_up_EGD[e], out=dx_AD[rows])
        places = Bags(place_A=place_A, start_T=start_T)
        dx_TD = None if dx_AD is None else sum_by_token(dx_AD, places, weight_A=weight_A)
        return dx_TD, dgate_up_EGD, ddown_EDF, dweight_A, None, None
