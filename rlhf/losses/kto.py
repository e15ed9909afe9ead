"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arxiv.org/abs/2402.01306, eq. 8).

The decision to know: answers come alone, each judged good or bad, and are measured against a point
of reference z0, an estimate of KL(policy || reference) from prompts with answers to other prompts.
z0 belongs to the whole optimizer step and is a constant; it is given to the loss, which therefore
adds up over micro-batches.

Shapes: B batch (answers).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.logprobs import check_same_shape
from rlhf.losses import LossOutput, metric
from rlhf.losses.pairs import check_positive, log_ratio


@dataclass(frozen=True, kw_only=True)
class KTOLoss:
    """w sigma(-beta (r - z0)) for a good answer, w sigma(beta (r - z0)) for a bad one.

    r = log pi(y|x) - log pi_ref(y|x), summed over the answer; the paper's lambda - v with v of
    eq. 8. beta: above 0. desirable_weight, undesirable_weight: w, the paper's lambda_D and
    lambda_U, at least 0 and not both 0; where good and bad answers are not equally many, the paper
    chooses them so that lambda_D n_D is lambda_U n_U or a little more.

    Metrics: reward/chosen, reward/rejected (beta r of good and of bad answers), logp/chosen,
    logp/rejected, one count per answer of that kind.
    couples_batch: an answer's loss depends, through z0, on the others of the step.
    Raises UserError for options out of range.
    """

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = True

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        check_positive("KTO", beta=self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"KTO: {name} must be a finite number of 0 or more, got {getattr(self, name)}"
                )
        if self.desirable_weight == self.undesirable_weight == 0.0:
            raise UserError(
                "KTO: desirable_weight and undesirable_weight are both 0: nothing is left to learn"
            )

    def value_at_reference(self, good: int, bad: int) -> float:
        """The mean loss of so many answers where policy and reference agree: half their weights."""
        weight = good * self.desirable_weight + bad * self.undesirable_weight
        return 0.5 * weight / (good + bad)

    def __call__(
        self,
        logp_B: Tensor,
        reference_logp_B: Tensor,
        *,
        is_good_B: Tensor,
        reference_point: Tensor,
    ) -> LossOutput:
        """The loss of B answers; reference and reference_point (0-dim, z0) are constants.

        Raises ValueError when shapes differ or are not (B,).
        """
        check_same_shape(logp=logp_B, reference=reference_logp_B, is_good=is_good_B)
        if logp_B.ndim != 1:
            raise ValueError(f"log-probabilities of answers are (B,), got {tuple(logp_B.shape)}")
        is_good_B = is_good_B.bool()
        ratio_B = log_ratio(logp_B, reference_logp_B)
        gain_B = self.beta * (ratio_B - reference_point.detach())
        loss_B = torch.where(
            is_good_B,
            self.desirable_weight * (-gain_B).sigmoid(),
            self.undesirable_weight * gain_B.sigmoid(),
        )
        reward_B = self.beta * ratio_B
        return LossOutput(
            loss_sum=loss_B.sum(),
            count=torch.tensor(loss_B.numel(), device=loss_B.device),
            metrics={
                "reward/chosen": metric(reward_B, is_good_B),
                "reward/rejected": metric(reward_B, ~is_good_B),
                "logp/chosen": metric(logp_B, is_good_B),
                "logp/rejected": metric(logp_B, ~is_good_B),
            },
        )


def reference_point(log_ratio_sum: Tensor, count: Tensor) -> Tensor:
    """z0 = max(0, mean of log pi(y'|x) - log pi_ref(y'|x)), y' an answer to another prompt.

    Sum and number are those of a whole step over all processes; 0 where there is none.
    """
    return (log_ratio_sum / count.clamp(min=1)).clamp(min=0).detach()
