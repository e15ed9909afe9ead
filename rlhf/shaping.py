"""From what the reward source gave to advantages and returns: every option of PPO in one order.

score -> missing EOS -> scale -> clip -> reward per token (minus KL) -> whitened -> advantage (GAE,
or one without a critic) -> whitened.
The decision to know: every process holds all episodes of an update, so that each moment here is
over the whole update without a word between processes.

Shapes: B episodes of an update, R response tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.advantage import (
    Moments,
    apply_missing_eos,
    gae,
    masked_moments,
    one_longer,
    token_rewards,
    whiten,
)
from rlhf.group_advantage import centered, leave_one_out, standardized
from rlhf.ppo_settings import GROUPED, PPOSettings


class RunningScale:
    """The standard deviation of all scores so far, which scores are divided by (MOSS PPO-max).

    No mean is taken away: the sign of a score keeps its meaning. The scores at hand count before
    they are divided.
    """

    def __init__(self) -> None:
        zero = torch.zeros((), dtype=torch.float64)
        self.moments = Moments(sum=zero, sum_squares=zero, count=zero)

    def __call__(self, score_B: Tensor) -> Tensor:
        found = masked_moments(score_B.cpu(), torch.ones(score_B.shape, dtype=torch.bool))
        self.moments = self.moments + found
        return score_B / self.deviation

    @property
    def deviation(self) -> float:
        """1 until there are two scores that differ."""
        if float(self.moments.count) < 2:
            return 1.0
        deviation = float(self.moments.variance(unbiased=True).sqrt())
        size = float((self.moments.sum_squares / self.moments.count).sqrt())
        return deviation if deviation > 1e-6 * size else 1.0

    def state_dict(self) -> dict[str, float]:
        held = self.moments
        return {
            "sum": float(held.sum),
            "sum_squares": float(held.sum_squares),
            "count": float(held.count),
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.moments = Moments(
            **{name: torch.tensor(state[name], dtype=torch.float64) for name in state}
        )


@dataclass(frozen=True, kw_only=True)
class Shaped:
    """What shaping makes of an update's episodes; (B, R) tensors are zero where masked.

    score_B: after missing EOS, scale and clip. value_mask_BR: where a value counts. advantage_BR:
    whitened if that is asked for and its scope is the update.
    """

    score_B: Tensor
    reward_BR: Tensor
    advantage_BR: Tensor
    return_BR: Tensor
    value_mask_BR: Tensor


def value_mask(mask_BR: Tensor, ppo: PPOSettings) -> Tensor:
    """Where a value counts: the response's tokens; under n_plus the place after them as well."""
    return one_longer(mask_BR) if ppo.compat == "n_plus" else mask_BR


def shape(
    score_B: Tensor,
    ended_B: Tensor,
    *,
    old_logp_BR: Tensor,
    ref_logp_BR: Tensor,
    value_BR: Tensor,
    mask_BR: Tensor,
    ppo: PPOSettings,
    kl_coef: float,
    scale: RunningScale | None,
) -> Shaped:
    """kl_coef: of k1 in the reward, 0 where the loss pays. scale: None leaves scores alone."""
    score_B = apply_missing_eos(  # 16
        score_B,
        ended_B,
        penalty=ppo.missing_eos_penalty or None,
        replace_with=ppo.missing_eos_replace,
    )
    if scale is not None:
        score_B = scale(score_B)  # 19
    if ppo.score_clip:
        score_B = score_B.clamp(-ppo.score_clip, ppo.score_clip)  # 19
    value_mask_BR = value_mask(mask_BR, ppo)
    reward_BR = token_rewards(  # 14, 15
        score_B,
        old_logp_BR,
        ref_logp_BR,
        mask_BR=mask_BR,
        kl_coef=kl_coef,
        score_mask_BR=value_mask_BR,
    )
    if ppo.whiten_rewards:  # 18
        reward_BR = whiten(reward_BR, mask=value_mask_BR, shift_mean=False, unbiased=ppo.unbiased)
    if ppo.has_critic:
        advantage_BR, return_BR = gae(  # 20
            reward_BR, value_BR, mask_BR=value_mask_BR, gamma=ppo.gamma, lam=ppo.lam
        )
        if ppo.critic_lam is not None:  # 32
            _, return_BR = gae(
                reward_BR, value_BR, mask_BR=value_mask_BR, gamma=ppo.gamma, lam=ppo.critic_lam
            )
    else:
        advantage_BR = critic_free(reward_BR, mask_BR=mask_BR, ppo=ppo)
        return_BR = torch.zeros_like(advantage_BR)
    if ppo.whitens and ppo.whitening_scope == "update":  # 22
        advantage_BR = whiten(advantage_BR, mask=mask_BR, unbiased=ppo.unbiased)
    return Shaped(
        score_B=score_B,
        reward_BR=reward_BR,
        advantage_BR=torch.where(mask_BR, advantage_BR, 0.0),
        return_BR=torch.where(value_mask_BR, return_BR, 0.0),
        value_mask_BR=value_mask_BR,
    )


def critic_free(reward_BR: Tensor, *, mask_BR: Tensor, ppo: PPOSettings) -> Tensor:
    """Advantages before whitening, zero where masked, from token rewards alone.

    reward_BR: with the score at the last token and, if the reward pays it, the KL at each: RLOO's
    R = s - beta sum_t k1 is its sum over an answer. A group's mean is taken from that sum (Ahmadian
    et al. 2024); OpenRLHF takes it from the score, and the KL of each token comes after.
    """
    if ppo.advantage in GROUPED:
        score_B = torch.where(mask_BR, reward_BR, 0.0).sum(dim=1)
        baseline = leave_one_out if ppo.advantage == "rloo" else centered
        if ppo.advantage == "grpo" and ppo.scale_by_std:
            baseline = standardized
        advantage_B1 = baseline(score_B, group_size=ppo.group_size)[:, None]
        return torch.where(mask_BR, advantage_B1, 0.0)
    # What is to come is GAE where every value is 0 and lambda is 1.
    to_come_BR, _ = gae(
        reward_BR, torch.zeros_like(reward_BR), mask_BR=mask_BR, gamma=ppo.gamma, lam=1.0
    )
    return to_come_BR
