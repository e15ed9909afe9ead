"""The random numbers that some routers draw in training, from a generator that the caller names.

Shapes: T tokens, D width, E experts.
"""

import torch
from torch import Tensor


def global_generator(device: torch.device) -> torch.Generator:
    """Torch's own generator of the device, which activation checkpointing rewinds.

    Devices other than CUDA's draw on the CPU.
    """
    if device.type != "cuda":
        return torch.default_generator
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]


def jittered(x_TD: Tensor, width: float, *, generator: torch.Generator) -> Tensor:
    """x, each number times one of U(1 - width, 1 + width) (Fedus et al. 2022), float32."""
    uniform_TD = torch.rand(x_TD.shape, generator=generator, device=generator.device)
    return x_TD.float() * (1 + width * (2 * uniform_TD - 1)).to(x_TD.device)


def noisy_logits(logits_TE: Tensor, std: float, *, generator: torch.Generator) -> Tensor:
    """The logits plus N(0, std^2), each its own (Riquelme et al. 2021)."""
    noise_TE = torch.randn(logits_TE.shape, generator=generator, device=generator.device)
    return logits_TE + std * noise_TE.to(logits_TE.device)
