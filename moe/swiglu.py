"""SwiGLU on rows (gate, up), and its gradient, for the experts that keep only those rows.

Decision to know: every step is the one that autograd would take for
`functional.silu(gate) * up`, on tensors of the same shape, so that the results agree to the bit.

Shapes: n rows, F expert width, G = 2F with the gate first.
"""

import torch
from torch import Tensor
from torch.nn import functional


def swiglu(z_nG: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), (n, F); not differentiable."""
    gate_nF, up_nF = z_nG.chunk(2, dim=-1)
    return functional.silu(gate_nF).mul_(up_nF)


def swiglu_gradients(dh_nF: Tensor, z_nG: Tensor) -> tuple[Tensor, Tensor]:
    """h = swiglu(z) once more (n, F), and the gradient of z (n, G) for the gradient dh of h."""
    gate_nF, up_nF = z_nG.chunk(2, dim=-1)
    act_nF = functional.silu(gate_nF)
    dz_nG = torch.empty_like(z_nG)
    dgate_nF, dup_nF = dz_nG.chunk(2, dim=-1)
    torch.mul(dh_nF, act_nF, out=dup_nF)
    torch.ops.aten.silu_backward.grad_input(dh_nF * up_nF, gate_nF, grad_input=dgate_nF)
    return act_nF.mul_(up_nF), dz_nG
