"""Group sequence policy optimisation (Zheng et al. 2025, arxiv.org/abs/2507.18071).

The decision to know: this is the paper's GSPO-token (section 4.3), which lets tokens of one answer
have advantages of their own. Where they have one in common, as with every group baseline, values,
clipping and gradients are those of GSPO (eq. 5 to 7), and there is one loss for both.

Shapes: B answers, R response tokens. Masks are true (or 1) at a real token.
"""

from torch import Tensor

from rlhf.losses import LossOutput
from rlhf.losses.mean import LossMean
from rlhf.losses.ppo import surrogate

SEQUENCE_MEAN = LossMean(over="sequence")


def gspo_loss(
    logp_BR: Tensor,
    old_logp_BR: Tensor,
    *,
    advantage_BR: Tensor,
    mask_BR: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    mean: LossMean = SEQUENCE_MEAN,
) -> LossOutput:
    """PPO's clipped surrogate with one ratio an answer, so that an answer is clipped as a whole.

    s_i = exp(mean_t (logp - old_logp)) (eq. 7). It moves far less than the ratio of a token: the
    paper clips at 3e-4 and 4e-4. mean: the paper's is over sequences (eq. 5).
    Metrics and errors are `policy_loss`'s, where the ratio of a token is that of its answer.
    """
    return surrogate(
        logp_BR,
        old_logp_BR,
        log_ratio=sequence_log_ratio,
        advantage_BR=advantage_BR,
        mask_BR=mask_BR,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        mean=mean,
    )


def sequence_log_ratio(logp_BR: Tensor, old_logp_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """log s_i at each real token, zero where masked; each token's gradient is its own logp's.

    Differentiable once: the value of s_i is held fixed and each token carries the gradient of its
    own log-probability, which over an answer adds up to |o_i| times that of log s_i.
    """
    length_B = mask_BR.sum(dim=1).clamp(min=1)
    log_ratio_B = (logp_BR - old_logp_BR).detach().sum(dim=1) / length_B
    own_BR = logp_BR - logp_BR.detach()  # 0, with a gradient
    return (log_ratio_B[:, None] + own_BR).where(mask_BR, 0.0)
