"""What PPO minimises on a micro-batch: the sum of its terms over response tokens, with metrics.

The decision to know: every term is a sum that the trainer divides by the step's response tokens; a
term with units of its own comes with a weight that puts its own denominator in that one's place.

Shapes: B episodes of a micro-batch, R response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import kl
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses import metric
from rlhf.losses.ppo import policy_loss, value_loss
from rlhf.ppo_settings import PPOSettings
from sft.loss import LossOutput


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the terms of a step weigh beside the settings.

    kl_coef: price of a nat in the loss, 0 where the reward pays. value: response tokens over value
    tokens of the step, 1 unless n_plus; text: response tokens over learned tokens of its texts.
    policy_learns: false while the critic warms up.
    """

    kl_coef: float = 0.0
    value: float = 1.0
    text: float = 0.0
    policy_learns: bool = True


def batch_logps(logits: Tensor, batch: Mapping[str, Tensor], *, temperature: float) -> Tensor:
    """Log-probabilities (B, R) of the response at the sampling temperature (4).

    logits (B, R+1, V): of the position before the response and its R positions.
    """
    ids = batch["input_ids"][:, -logits.shape[1] :]
    logp = token_logps(logits, ids, temperature=temperature)
    return response_logps(logp[:, 1:], batch["mask_BR"])


def episode_loss(
    logits: Tensor,
    value_BR: Tensor,
    *,
    batch: Mapping[str, Tensor],
    ppo: PPOSettings,
    weights: Weights,
) -> LossOutput:
    """policy + value_coef * value - entropy_coef * entropy (+ kl_coef * KL), summed."""
    logp_BR = batch_logps(logits, batch, temperature=ppo.temperature)
    entropy_BR = response_logps(  # 25
        entropy(logits, temperature=ppo.temperature)[:, 1:], batch["mask_BR"]
    )
    policy = policy_loss(  # 23
        logp_BR,
        batch["old_logp_BR"],
        advantage_BR=batch["advantage_BR"],
        mask_BR=batch["mask_BR"],
        clip_low=ppo.clip,
        clip_high=ppo.clip_high or ppo.clip,
        dual_clip=ppo.dual_clip or None,
    )
    value = value_loss(  # 24
        value_BR,
        batch["value_BR"],
        return_BR=batch["return_BR"],
        mask_BR=batch["value_mask_BR"],
        clip=ppo.value_clip or None,
    )
    # 32: times 0, not left out: under data parallelism every parameter has to have a gradient.
    total = policy.loss_sum if weights.policy_learns else 0.0 * policy.loss_sum
    total = total + ppo.value_coef * weights.value * value.loss_sum
    metrics = {
        **policy.metrics,
        **value.metrics,
        "policy/loss": (policy.loss_sum.detach(), policy.count),
        "value/loss": (value.loss_sum.detach(), value.count),
        "policy/entropy": metric(entropy_BR, batch["mask_BR"]),
    }
    if weights.policy_learns and ppo.entropy_coef:
        total = total - ppo.entropy_coef * entropy_BR.sum()
    if ppo.kl_in == "loss":  # 14
        kl_BR = kl_estimate(logp_BR, batch["ref_logp_BR"], batch["mask_BR"], ppo.kl_estimator)
        metrics["policy/kl_loss"] = metric(kl_BR, batch["mask_BR"])
        if weights.policy_learns:
            total = total + weights.kl_coef * kl_BR.sum()
    return LossOutput(loss_sum=total, count=policy.count, metrics=metrics, maxima=policy.maxima)


def kl_estimate(logp_BR: Tensor, ref_logp_BR: Tensor, mask_BR: Tensor, name: str) -> Tensor:
    """k2 or k3 per token, zero where masked; the gradient is the policy's alone."""
    estimator = {"k2": kl.k2, "k3": kl.k3}[name]
    kept_BR = torch.where(mask_BR.bool(), logp_BR, 0.0)
    return estimator(kept_BR, torch.where(mask_BR.bool(), ref_logp_BR.detach(), 0.0))
