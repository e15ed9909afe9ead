"""From scores to advantages: rewards per token, generalised advantage estimation, whitening.

Nothing here carries a gradient: rewards, advantages and returns are constants of the losses. Every
function selects by its mask before it computes, so what stands under padding (NaN included) has no
part in the result, and gives zero where masked. A row without a real token is an episode left out.

Shapes: B batch, R response tokens. Masks are (B, R), true (or 1) at a real token of the response;
false may also stand between real tokens, for example at a tool's output.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe.errors import UserError
from rlhf import kl
from rlhf.logprobs import check_same_shape, where_real


@torch.no_grad()
def apply_missing_eos(
    score_B: Tensor,
    ended_B: Tensor,
    *,
    penalty: float | None = None,
    replace_with: float | None = None,
) -> Tensor:
    """Scores in which a response that never ended pays for it; with neither option, as they were.

    penalty: taken off the score. replace_with: put in its place (Ziegler et al. 2019 use -1), so
    that a score computed on a cut-off text counts for nothing.
    ended_B: true where the response stopped by itself. Raises UserError when both are given, or for
    a penalty below 0, which would reward what it should price.
    """
    check_same_shape(score=score_B, ended=ended_B)
    if penalty is not None and replace_with is not None:
        raise UserError(
            f"a response without EOS has its score either lowered (penalty={penalty}) or replaced "
            f"(replace_with={replace_with}); give one of the two"
        )
    if penalty is not None:
        if penalty < 0.0:
            raise UserError(f"the missing-EOS penalty must be 0 or more, got {penalty}")
        return torch.where(ended_B.bool(), score_B, score_B - penalty)
    if replace_with is not None:
        return torch.where(ended_B.bool(), score_B, replace_with)
    return score_B


@torch.no_grad()
def token_rewards(
    score_B: Tensor,
    logp_BR: Tensor,
    ref_logp_BR: Tensor,
    *,
    mask_BR: Tensor,
    kl_coef: float,
    score_mask_BR: Tensor | None = None,
) -> Tensor:
    """-kl_coef * k1 at every real token, plus the score at the last one: reward_BR.

    logp_BR: of the policy that sampled the tokens. The score stands on the last real token, not on
    the place after it as in Huang et al. 2024 (N+): no value has to be estimated beyond the end.
    score_mask_BR: `one_longer(mask_BR)` puts it there all the same, for a reproduction.
    A row without a real token gets no reward.
    """
    score_mask_BR = mask_BR if score_mask_BR is None else score_mask_BR
    check_same_shape(logp=logp_BR, ref_logp=ref_logp_BR, mask=mask_BR, score_mask=score_mask_BR)
    check_same_shape(score=score_B, rows=mask_BR.any(dim=1))
    mask_BR, score_mask_BR = mask_BR.bool(), score_mask_BR.bool()
    penalty_BR = -kl_coef * kl.k1(where_real(logp_BR, mask_BR), where_real(ref_logp_BR, mask_BR))
    num_left_BR = score_mask_BR.long().flip(1).cumsum(1).flip(1)
    is_last_BR = score_mask_BR & (num_left_BR == 1)
    score_B1 = score_B[:, None].to(penalty_BR.dtype)
    return torch.where(is_last_BR, penalty_BR + score_B1, torch.where(mask_BR, penalty_BR, 0.0))


def one_longer(mask_BR: Tensor) -> Tensor:
    """The mask and the place after each row's last real token, where the width has one.

    TRL's and N+'s `padding_mask_p1` is its opposite. For rows without gaps; one without a real
    token stays empty.
    """
    mask_BR = mask_BR.bool()
    before_BR = torch.cat([torch.zeros_like(mask_BR[:, :1]), mask_BR[:, :-1]], dim=1)
    return mask_BR | before_BR


@torch.no_grad()
def gae(
    reward_BR: Tensor,
    value_BR: Tensor,
    *,
    mask_BR: Tensor,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that a critic learns: (advantage_BR, return_BR).

    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lam A_{t+1},  return_t = A_t + V_t
    (Schulman et al. 2016, eq. 16), over the real tokens alone: beyond the last one the value is 0,
    and a masked token between two real ones is stepped over, so that both neighbours meet without a
    further discount; a reward on it is not seen. Returns belong to advantages before whitening.
    float32, float64 if rewards or values are. gamma and lam lie in 0..1, or UserError is raised.
    """
    check_same_shape(reward=reward_BR, value=value_BR, mask=mask_BR)
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= number <= 1.0:
            raise UserError(f"{name} must lie between 0 and 1, got {number}")
    mask_BR = mask_BR.bool()
    reward_BR, value_BR = where_real(reward_BR, mask_BR), where_real(value_BR, mask_BR)
    advantage_BR = torch.zeros_like(reward_BR + value_BR)
    next_value_B = advantage_BR.new_zeros(advantage_BR.shape[0])
    next_advantage_B = next_value_B
    for t in reversed(range(reward_BR.shape[1])):
        is_real_B = mask_BR[:, t]
        delta_B = reward_BR[:, t] + gamma * next_value_B - value_BR[:, t]
        advantage_B = delta_B + gamma * lam * next_advantage_B
        advantage_BR[:, t] = torch.where(is_real_B, advantage_B, 0.0)
        next_advantage_B = torch.where(is_real_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(is_real_B, value_BR[:, t], next_value_B)
    return advantage_BR, advantage_BR + value_BR


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over real tokens, each 0-dim; those of two micro-batches or two ranks add up.

    float64 (float32 on MPS, which has none): a variance from sums of squares loses the digits that
    mean and spread do not share. `torch.stack([m.sum, m.sum_squares, m.count])` can be all-reduced.
    """

    sum: Tensor
    sum_squares: Tensor
    count: Tensor

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            sum=self.sum + other.sum,
            sum_squares=self.sum_squares + other.sum_squares,
            count=self.count + other.count,
        )

    @property
    def mean(self) -> Tensor:
        """NaN when nothing was counted."""
        return self.sum / self.count

    def variance(self, *, unbiased: bool) -> Tensor:
        """Over count - 1 if unbiased, over count if not; NaN when the divisor is 0."""
        spread = (self.sum_squares - self.sum * self.mean).clamp(min=0.0)
        return spread / (self.count - 1.0 if unbiased else self.count)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> Moments:
    """Sum, sum of squares and number of the entries that the mask keeps; any shape."""
    check_same_shape(x=x, mask=mask)
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    kept = where_real(x, mask).to(wide)
    return Moments(
        sum=kept.sum(), sum_squares=kept.square().sum(), count=mask.bool().sum().to(wide)
    )


@torch.no_grad()
def whiten(
    x: Tensor,
    *,
    mask: Tensor,
    shift_mean: bool = True,
    unbiased: bool = True,
    moments: Moments | None = None,
) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the real tokens, zero where masked; any shape.

    shift_mean: true takes the mean away, for advantages; false keeps it, for rewards, whose sign
    then still means something. (torchtune's flag of this name says the opposite.)
    unbiased: variance over count - 1; false is what Ziegler et al. 2019 used.
    moments: of the whole batch over all ranks, when x is a part of it; default those of x.
    With fewer than two tokens there is no spread to divide by, and x comes back unchanged.
    """
    kept = where_real(x, mask)
    moments = masked_moments(x, mask) if moments is None else moments
    if moments.count < 2:
        return kept
    scale = torch.rsqrt(moments.variance(unbiased=unbiased) + 1e-8).to(kept.dtype)
    mean = moments.mean.to(kept.dtype)
    whitened = (kept - mean) * scale
    return torch.where(mask.bool(), whitened if shift_mean else whitened + mean, 0.0)
