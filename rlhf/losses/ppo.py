"""Proximal policy optimisation (Schulman et al. 2017, arxiv.org/abs/1707.06347): both losses.

The decision to know: the losses of policy and critic are sums over real tokens. Padding is selected
away before anything is computed from it, so that a NaN there reaches neither value nor gradient;
advantages, returns and everything called old are constants.

Shapes: B batch, R response tokens. Masks are true (or 1) at a real token.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moe.errors import UserError
from rlhf import kl
from rlhf.advantage import Moments, masked_moments
from rlhf.logprobs import check_same_shape, where_real
from rlhf.losses import LossOutput, metric
from rlhf.losses.mean import TOKEN_MEAN, LossMean


def policy_loss(
    logp_BR: Tensor,
    old_logp_BR: Tensor,
    *,
    advantage_BR: Tensor,
    mask_BR: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mean: LossMean = TOKEN_MEAN,
) -> LossOutput:
    """The clipped surrogate, max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high)), summed.

    ratio = exp(logp - old_logp), eq. 7 of the paper with its two bounds apart (DAPO, Yu et al.
    2025). dual_clip c > 1 bounds the loss of a token with A < 0 by -c A (Ye et al. 2020, dual-clip
    PPO), where eq. 7 alone lets it grow with the ratio; None leaves it out. mean: what the sum and
    its count are over; metrics are over tokens whatever it is.

    Metrics, one count per token: policy/ratio; policy/clip_fraction (tokens whose loss the clip
    made larger: no gradient); policy/dual_clip_fraction (only with dual_clip: tokens held by c);
    policy/approx_kl_k2 and _k3 (KL from the old policy to this one, see `rlhf.kl`);
    policy/ratio_deviation, policy/ratio_deviation_squared (of ratio - 1, float64): the sums that
    `ratio_variance` reads.
    Maxima: policy/ratio_max_deviation, the largest |ratio - 1|, 0 in a step's first minibatch.
    Raises UserError for bounds out of range, ValueError when shapes differ.
    """
    return surrogate(
        logp_BR,
        old_logp_BR,
        log_ratio=lambda logp_BR, old_logp_BR, mask_BR: logp_BR - old_logp_BR,
        advantage_BR=advantage_BR,
        mask_BR=mask_BR,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        mean=mean,
    )


def surrogate(
    logp_BR: Tensor,
    old_logp_BR: Tensor,
    *,
    log_ratio: Callable[[Tensor, Tensor, Tensor], Tensor],
    advantage_BR: Tensor,
    mask_BR: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    mean: LossMean,
) -> LossOutput:
    """`policy_loss` with a ratio of one's own: log_ratio(logp, old_logp, mask), all (B, R).

    It is given log-probabilities that are 0 where masked, and has to give 0 there.
    """
    check_same_shape(logp=logp_BR, old_logp=old_logp_BR, advantage=advantage_BR, mask=mask_BR)
    _check_clips(clip_low, clip_high, dual_clip)
    mask_BR = mask_BR.bool()
    logp_BR = where_real(logp_BR, mask_BR)
    old_logp_BR = where_real(old_logp_BR.detach(), mask_BR)
    advantage_BR = where_real(advantage_BR.detach(), mask_BR)

    ratio_BR = log_ratio(logp_BR, old_logp_BR, mask_BR).exp()
    free_BR = -advantage_BR * ratio_BR
    clipped_BR = -advantage_BR * ratio_BR.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss_BR = torch.maximum(free_BR, clipped_BR)
    metrics = {
        "policy/ratio": metric(ratio_BR, mask_BR),
        "policy/clip_fraction": metric(clipped_BR > free_BR, mask_BR),
        # Tokens come from the old policy, so it is the first argument.
        "policy/approx_kl_k2": metric(kl.k2(old_logp_BR, logp_BR), mask_BR),
        "policy/approx_kl_k3": metric(kl.k3(old_logp_BR, logp_BR), mask_BR),
    }
    if dual_clip is not None:
        ceiling_BR = -dual_clip * advantage_BR
        is_held_BR = (advantage_BR < 0.0) & (loss_BR > ceiling_BR)
        loss_BR = torch.where(is_held_BR, ceiling_BR, loss_BR)
        metrics["policy/dual_clip_fraction"] = metric(is_held_BR, mask_BR)
    # No selection needed: under padding both log-probabilities are 0 and the ratio is 1.
    deviation_BR = ratio_BR.detach() - 1.0
    # About 1, not about 0: the spread of a ratio near 1 would be lost in its square.
    deviations = masked_moments(deviation_BR, mask_BR)
    metrics["policy/ratio_deviation"] = (deviations.sum, deviations.count)
    metrics["policy/ratio_deviation_squared"] = (deviations.sum_squares, deviations.count)
    return LossOutput(
        loss_sum=mean.total(loss_BR, mask_BR),
        count=mean.count(mask_BR),
        metrics=metrics,
        maxima={"policy/ratio_max_deviation": _largest(deviation_BR.abs())},
    )


def value_loss(
    value_BR: Tensor,
    old_value_BR: Tensor,
    *,
    return_BR: Tensor,
    mask_BR: Tensor,
    clip: float | None,
) -> LossOutput:
    """max((V - R)^2, (V_clip - R)^2) / 2, summed, with V_clip = V_old + clip(V - V_old, +-clip).

    The clip is not in the paper but in OpenAI's code (Huang et al. 2022, "The 37 implementation
    details of PPO", no. 9); None leaves it out.

    Metrics, one count per token: value/clip_fraction (only with clip: tokens whose loss it made
    larger, no gradient); value/error, value/error_squared (of return - value), value/return,
    value/return_squared: the sums that `explained_variance` reads, float64.
    Raises UserError for a clip of 0 or less, ValueError when shapes differ.
    """
    check_same_shape(value=value_BR, old_value=old_value_BR, returns=return_BR, mask=mask_BR)
    if clip is not None and not clip > 0.0:
        raise UserError(f"PPO: the value clip must be above 0, or None for no clip, got {clip}")
    mask_BR = mask_BR.bool()
    value_BR = where_real(value_BR, mask_BR)
    old_value_BR = where_real(old_value_BR.detach(), mask_BR)
    return_BR = where_real(return_BR.detach(), mask_BR)

    free_BR = (value_BR - return_BR).square()
    loss_BR = free_BR
    count = mask_BR.sum()
    errors = masked_moments((return_BR - value_BR).detach(), mask_BR)
    returns = masked_moments(return_BR, mask_BR)
    metrics = {
        "value/error": (errors.sum, count),
        "value/error_squared": (errors.sum_squares, count),
        "value/return": (returns.sum, count),
        "value/return_squared": (returns.sum_squares, count),
    }
    if clip is not None:
        # Clamping V itself leaves it bit for bit within the bounds; V_old + clip(V - V_old) rounds.
        near_BR = torch.clamp(value_BR, old_value_BR - clip, old_value_BR + clip)
        clipped_BR = (near_BR - return_BR).square()
        loss_BR = torch.maximum(free_BR, clipped_BR)
        metrics["value/clip_fraction"] = metric(clipped_BR > free_BR, mask_BR)
    return LossOutput(loss_sum=0.5 * loss_BR.sum(), count=count, metrics=metrics)


def explained_variance(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> float | None:
    """1 - Var(return - value) / Var(return) from the sums of `value_loss`, added over the step.

    1 is a perfect critic, 0 one that knows a constant. None when there are no returns, or none that
    vary by more than a millionth of their size.
    """
    errors, returns = (_moments(metrics, name) for name in ("value/error", "value/return"))
    if returns.count == 0:
        return None
    variance = returns.variance(unbiased=False)
    if variance <= 1e-12 * returns.sum_squares / returns.count:
        return None
    return 1.0 - float(errors.variance(unbiased=False) / variance)


def ratio_variance(metrics: Mapping[str, tuple[Tensor, Tensor]]) -> float | None:
    """Variance over tokens of new over old probability, from the sums of `policy_loss`.

    None without tokens.
    """
    deviations = _moments(metrics, "policy/ratio_deviation")
    return None if deviations.count == 0 else float(deviations.variance(unbiased=False))


def _check_clips(clip_low: float, clip_high: float, dual_clip: float | None) -> None:
    if not 0.0 <= clip_low <= 1.0:
        raise UserError(f"PPO: clip_low must lie between 0 and 1, got {clip_low}")
    if not clip_high >= 0.0:
        raise UserError(f"PPO: clip_high must be 0 or more, got {clip_high}")
    if dual_clip is not None and not 1.0 < dual_clip < math.inf:
        raise UserError(f"PPO: dual_clip must be above 1, or None to leave it out, got {dual_clip}")


def _moments(metrics: Mapping[str, tuple[Tensor, Tensor]], name: str) -> Moments:
    total, count = metrics[name]
    return Moments(sum=total, sum_squares=metrics[f"{name}_squared"][0], count=count)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())
