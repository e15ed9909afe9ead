"""The experts by `torch.nn.functional.grouped_mm`: one call for all experts, meant for CUDA.

Decision to know: what the operator cannot do is refused with the reason, never sent elsewhere: a
run that asked for one kernel should not silently have used another. The sizes of the groups stay on
the device; the only synchronisation is the count of the kept assignments.

Shapes: T tokens, D width, F expert width, G = 2F, E experts, A kept assignments.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe.autocast import as_autocast
from moe.dispatch import Combine, Dispatch, Gather, bags
from moe.errors import UserError

# Rows must begin on a 16-byte boundary.
MULTIPLE_OF = {torch.float32: 4, torch.bfloat16: 8, torch.float16: 8}
OLDEST_CUDA = (8, 0)


def check_grouped(dtype: torch.dtype, *, device: torch.device, widths: tuple[int, int]) -> None:
    """Raises UserError if grouped_mm cannot run experts of these (hidden, expert) widths.

    Takes float32 with widths that are multiples of 4, bfloat16 and float16 with multiples of 8; no
    float64; on CUDA compute capability 8.0 or newer.
    """
    if dtype not in MULTIPLE_OF:
        raise UserError(
            f"The experts backend 'grouped_mm' does not take {_name(dtype)}, only "
            f"{', '.join(map(_name, MULTIPLE_OF))}: set_experts_backend(model, 'lean') does."
        )
    step = MULTIPLE_OF[dtype]
    if any(width % step for width in widths):
        raise UserError(
            f"The experts backend 'grouped_mm' needs widths that are multiples of {step} in "
            f"{_name(dtype)}, not hidden_size {widths[0]} and intermediate_size {widths[1]}: "
            "set_experts_backend(model, 'lean') takes any."
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST_CUDA:
        found = ".".join(map(str, torch.cuda.get_device_capability(device)))
        raise UserError(
            f"The experts backend 'grouped_mm' needs a GPU of compute capability 8.0 or newer, not "
            f"{found}: set_experts_backend(model, 'lean') takes any."
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_experts_grouped(
    x_TD: Tensor, plan: Dispatch, *, weight_A: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighed sum of the experts' outputs (T, D), as `run_experts_naive`.

    weight_A: float32, in the plan's order. Raises UserError as `check_grouped`.
    """
    dtype = x_TD.dtype
    x_TD, gate_up_EGD, down_EDF = as_autocast(x_TD, gate_up_EGD, down_EDF)
    check_grouped(x_TD.dtype, device=x_TD.device, widths=(down_EDF.shape[1], down_EDF.shape[2]))
    places = bags(plan.token_A, num_tokens=x_TD.shape[0])
    ends_E = plan.size_E.cumsum(0).to(torch.int32)
    # The operator refuses to run under autocast: what is to be cast has been.
    with torch.autocast(x_TD.device.type, enabled=False):
        x_AD = Gather.apply(x_TD, plan.token_A, places)
        z_AG = functional.grouped_mm(x_AD, gate_up_EGD.transpose(1, 2), offs=ends_E)
        gate_AF, up_AF = z_AG.chunk(2, dim=-1)
        h_AF = functional.silu(gate_AF) * up_AF
        y_AD = functional.grouped_mm(h_AF, down_EDF.transpose(1, 2), offs=ends_E)
        y_AD = y_AD * weight_A[:, None].to(y_AD.dtype)
        return Combine.apply(y_AD, plan.token_A, places).to(dtype)
