"""What PPO minimises on a micro-batch: the sum of its terms over units, with metrics.

The decision to know: every term is a sum that the trainer divides by the step's units (response
tokens, or answers; `policy_mean`); a term with units of its own comes with a weight that puts its
own denominator in that one's place.

Shapes: B episodes of a micro-batch, R response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf import kl
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses import metric
from rlhf.losses.gspo import gspo_loss
from rlhf.losses.mean import LossMean
from rlhf.losses.ppo import policy_loss, value_loss
from rlhf.ppo_settings import PPOSettings
from sft.loss import LossOutput


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What the terms of a step weigh beside the settings.

    kl_coef: price of a nat in the loss, 0 where the reward pays. value: units over value tokens of
    the step, 1 where they are the same; text: units over learned tokens of its texts.
    policy_learns: false while the critic warms up.
    """

    kl_coef: float = 0.0
    value: float = 1.0
    text: float = 0.0
    policy_learns: bool = True


def policy_mean(ppo: PPOSettings) -> LossMean:
    """What the policy's terms are a mean over."""
    length = ppo.max_new_tokens if ppo.loss_mean == "constant" else None
    return LossMean(over=ppo.loss_mean, max_length=length)


def batch_logps(logits: Tensor, batch: Mapping[str, Tensor], *, temperature: float) -> Tensor:
    """Log-probabilities (B, R) of the response at the sampling temperature (4).

    logits (B, R+1, V): of the position before the response and its R positions.
    """
    ids = batch["input_ids"][:, -logits.shape[1] :]
    logp = token_logps(logits, ids, temperature=temperature)
    return response_logps(logp[:, 1:], batch["mask_BR"])


def episode_loss(
    logits: Tensor,
    value_BR: Tensor | None,
    *,
    batch: Mapping[str, Tensor],
    ppo: PPOSettings,
    weights: Weights,
) -> LossOutput:
    """policy + value_coef * value - entropy_coef * entropy (+ kl_coef * KL), summed.

    value_BR: None without a critic. A `correction_BR` in the batch weighs the policy's own term; a
    weight of 0 or more on an advantage is one on its loss, clipped or not.
    """
    mask_BR, mean = batch["mask_BR"], policy_mean(ppo)
    logp_BR = batch_logps(logits, batch, temperature=ppo.temperature)
    entropy_BR = response_logps(entropy(logits, temperature=ppo.temperature)[:, 1:], mask_BR)  # 25
    advantage_BR = batch["advantage_BR"]
    if "correction_BR" in batch:
        advantage_BR = advantage_BR * batch["correction_BR"]
    surrogate = gspo_loss if ppo.ratio_level == "sequence" else policy_loss
    policy = surrogate(  # 23
        logp_BR,
        batch["old_logp_BR"],
        advantage_BR=advantage_BR,
        mask_BR=mask_BR,
        clip_low=ppo.clip,
        clip_high=ppo.clip_high or ppo.clip,
        dual_clip=ppo.dual_clip or None,
        mean=mean,
    )
    # 32: times 0, not left out: under data parallelism every parameter has to have a gradient.
    total = policy.loss_sum if weights.policy_learns else 0.0 * policy.loss_sum
    metrics = {**policy.metrics}
    losses = {"policy/loss": policy}
    if value_BR is not None:
        value = value_loss(  # 24
            value_BR,
            batch["value_BR"],
            return_BR=batch["return_BR"],
            mask_BR=batch["value_mask_BR"],
            clip=ppo.value_clip or None,
        )
        total = total + ppo.value_coef * weights.value * value.loss_sum
        metrics |= value.metrics
        losses["value/loss"] = value
    metrics |= {name: (loss.loss_sum.detach(), loss.count) for name, loss in losses.items()}
    metrics["policy/entropy"] = metric(entropy_BR, mask_BR)
    if weights.policy_learns and ppo.entropy_coef:
        total = total - ppo.entropy_coef * mean.total(entropy_BR, mask_BR)
    if ppo.kl_in == "loss":  # 14
        kl_BR = kl_estimate(logp_BR, batch["ref_logp_BR"], mask_BR, ppo.kl_estimator)
        metrics["policy/kl_loss"] = metric(kl_BR, mask_BR)
        if weights.policy_learns:
            total = total + weights.kl_coef * mean.total(kl_BR, mask_BR)
    return LossOutput(loss_sum=total, count=policy.count, metrics=metrics, maxima=policy.maxima)


def kl_estimate(logp_BR: Tensor, ref_logp_BR: Tensor, mask_BR: Tensor, name: str) -> Tensor:
    """k2 or k3 per token, zero where masked; the gradient is the policy's alone."""
    estimator = {"k2": kl.k2, "k3": kl.k3}[name]
    kept_BR = torch.where(mask_BR.bool(), logp_BR, 0.0)
    return estimator(kept_BR, torch.where(mask_BR.bool(), ref_logp_BR.detach(), 0.0))
