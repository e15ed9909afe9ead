"""A sampler whose numerics differ on purpose, so that train-inference mismatch shows on one CPU.

In large systems an inference engine samples and a training engine learns, and the two round
differently; a mixture of experts is hit hardest, because a small difference moves a token to
another expert (Ma et al. 2025, arXiv 2510.11370). The decision to know: what differs are weights
that stand in for the policy's own while it samples, so that a token's difference is its own,
whatever batch or process draws it, and nothing of the policy is touched or copied twice.

Shapes: E experts, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moe.counters import stream
from moe.router_modules import foreign_routers
from moe.switch_ffn import Router
from rlhf.ppo_settings import PPOSettings

Stand = dict[nn.Parameter, Tensor]  # what stands in for which parameter


@contextmanager
def sampling_numerics(
    policy: nn.Module, ppo: PPOSettings, *, seed: int, update: int
) -> Iterator[None]:
    """Inside the `with` the policy computes as `rollout_numerics` says; afterwards as before.

    `bf16`: every floating-point weight in bfloat16; what a model keeps as a buffer (rotary
    frequencies, a selection bias) stays, as it does in inference engines. `router_noise`: see
    `noisy_routers`, drawn anew each update.
    """
    with standing_in(policy, _stand_ins(policy, ppo, seed=seed, update=update)):
        yield


def _stand_ins(policy: nn.Module, ppo: PPOSettings, *, seed: int, update: int) -> Stand:
    if ppo.rollout_numerics == "bf16":
        return {p: p.detach().bfloat16() for p in policy.parameters() if p.is_floating_point()}
    if ppo.rollout_numerics == "router_noise":
        return noisy_routers(policy, ppo.rollout_noise, seed=seed, update=update)
    return {}


def noisy_routers(policy: nn.Module, size: float, *, seed: int, update: int) -> Stand:
    """Router weights plus N(0, size^2 / D): a logit moves by N(0, size^2) times its input's rms.

    Behind a norm that rms is about 1. A token's noise follows from what its router reads and from
    (seed, update, layer) alone: independent over experts and layers, equal for equal inputs.
    """
    routers = [m for m in policy.modules() if isinstance(m, Router)] + foreign_routers(policy)
    stand: Stand = {}
    for layer, router in enumerate(routers):
        weight = router.weight
        assert isinstance(weight, nn.Parameter)
        random = stream(seed, "rollout-router-noise", update, layer)
        noise_ED = torch.from_numpy(random.standard_normal(tuple(weight.shape)))
        noise_ED = noise_ED * (size / weight.shape[-1] ** 0.5)
        stand[weight] = weight.detach() + noise_ED.to(weight)
    return stand


@contextmanager
def standing_in(model: nn.Module, stand: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other tensors in the places of some parameters, which keep their data, dtype and hooks.

    A tied parameter is replaced wherever it stands.
    """
    new = {own: nn.Parameter(tensor, requires_grad=False) for own, tensor in stand.items()}
    places = [
        (module, name, own)
        for module in model.modules()
        for name, own in module._parameters.items()
        if own is not None and own in new
    ]
    try:
        for module, name, own in places:
            module._parameters[name] = new[own]
        yield
    finally:
        for module, name, own in places:
            module._parameters[name] = own
