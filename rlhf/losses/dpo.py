"""Direct preference optimisation (Rafailov et al. 2023, arxiv.org/abs/2305.18290, eq. 7).

The decision to know: log-probabilities are summed over a completion, never averaged, so that the
implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)) as in the paper.

Shapes: B batch (pairs).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moe.errors import UserError
from rlhf.logprobs import check_same_shape
from rlhf.losses import LossOutput, PairLogps, metric, wins


@dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin), margin the gap of implicit rewards.

    beta: the price of a nat of KL in the objective that DPO solves; above 0.
    label_smoothing: eps, the share of labels believed to be flipped (cDPO, Mitchell 2023); 0 is
    DPO, and from 0.5 on the labels would say nothing.

    Metrics, one count per pair: preference/margin (in rewards), preference/accuracy (a tie counts
    half), reward/chosen, reward/rejected (implicit), logp/chosen, logp/rejected (policy, summed).
    Raises UserError for a beta or a smoothing out of range.
    """

    needs_reference: ClassVar[bool] = True

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < math.inf:
            raise UserError(f"DPO: beta must be a finite number above 0, got {self.beta}")
        if not 0.0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"DPO: label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}"
            )

    @property
    def value_at_reference(self) -> float:
        """ln 2, whatever beta and smoothing are."""
        return math.log(2.0)

    def __call__(self, policy: PairLogps, reference: PairLogps) -> LossOutput:
        """The loss of B pairs; the reference is a constant. Raises ValueError if B differs."""
        check_same_shape(policy=policy.chosen, reference=reference.chosen)
        chosen_reward_B = self.beta * _log_ratio(policy.chosen, reference.chosen)
        rejected_reward_B = self.beta * _log_ratio(policy.rejected, reference.rejected)
        margin_B = chosen_reward_B - rejected_reward_B
        eps = self.label_smoothing
        loss_B = -(1.0 - eps) * logsigmoid(margin_B) - eps * logsigmoid(-margin_B)
        return LossOutput(
            loss_sum=loss_B.sum(),
            count=torch.tensor(loss_B.numel(), device=loss_B.device),
            metrics={
                "preference/margin": metric(margin_B),
                "preference/accuracy": metric(wins(margin_B)),
                "reward/chosen": metric(chosen_reward_B),
                "reward/rejected": metric(rejected_reward_B),
                "logp/chosen": metric(policy.chosen),
                "logp/rejected": metric(policy.rejected),
            },
        )


def _log_ratio(logp_B: Tensor, ref_logp_B: Tensor) -> Tensor:
    dtype = torch.promote_types(logp_B.dtype, torch.float32)
    return logp_B.to(dtype) - ref_logp_B.detach()
