"""How far the sampler's log-probabilities are from the trainer's, and what a loss makes of it.

The decision to know: the ratio of the two engines weighs the policy's loss and nothing else, and is
apart from PPO's own ratio, which is clipped: one is about who drew the text, the other about how
far the update has gone since.

Shapes: B answers, R response tokens. Masks are true (or 1) at a real token.
"""

from typing import Literal

import torch
from torch import Tensor

from rlhf import kl
from rlhf.losses import metric

Correction = Literal["none", "token", "sequence"]


def correction_weights(
    old_logp_BR: Tensor, drawn_logp_BR: Tensor, mask_BR: Tensor, *, kind: str, cap: float
) -> Tensor:
    """What each token's policy loss is multiplied by, (B, R), zero where masked.

    r_t = exp(old_logp - drawn_logp): trainer over sampler, at the policy that drew. `token`:
    min(r_t, cap), truncated importance sampling (Yao et al. 2025, "Your efficient RL framework
    secretly brings you off-policy RL training"). `sequence`: the product of an answer's r_t for all
    its tokens, and 0 for the whole answer where that is above cap, masked importance sampling by
    the sequence (Liu et al. 2025, "When speed kills stability").
    """
    mask_BR = mask_BR.bool()
    log_ratio_BR = torch.where(mask_BR, old_logp_BR - drawn_logp_BR, 0.0)
    if kind == "token":
        weight_BR = log_ratio_BR.exp().clamp(max=cap)
    else:
        weight_B1 = log_ratio_BR.sum(dim=1, keepdim=True).exp()
        weight_BR = torch.where(weight_B1 <= cap, weight_B1, 0.0).expand_as(log_ratio_BR)
    return torch.where(mask_BR, weight_BR, 0.0)


def gap_metrics(
    old_logp_BR: Tensor, drawn_logp_BR: Tensor, mask_BR: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean |trainer - sampler| and k3 of KL(sampler, trainer), nats per token."""
    mask_BR = mask_BR.bool()
    old_BR = torch.where(mask_BR, old_logp_BR, 0.0)
    drawn_BR = torch.where(mask_BR, drawn_logp_BR, 0.0)
    return {
        "rollout/logp_gap": metric((old_BR - drawn_BR).abs(), mask_BR),
        "rollout/logp_gap_k3": metric(kl.k3(drawn_BR, old_BR), mask_BR),
    }
