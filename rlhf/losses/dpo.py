"""Direct preference optimisation (Rafailov et al. 2023, arxiv.org/abs/2305.18290, eq. 7).

The decision to know: log-probabilities are summed over a completion unless `normalisation` says
otherwise, so that the implicit reward is beta * (log pi(y|x) - log pi_ref(y|x)) as in the paper.

Shapes: B batch (pairs).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from moe.errors import UserError
from rlhf.losses import LossOutput, PairLogps
from rlhf.losses.pairs import (
    Normalisation,
    check_normalisation,
    check_positive,
    implicit_rewards,
    pair_output,
)


@dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """-(1 - eps) log sigma(margin) - eps log sigma(-margin), margin the gap of implicit rewards.

    beta: the price of a nat of KL in the objective that DPO solves; above 0.
    label_smoothing: eps, the share of labels believed to be flipped (cDPO, Mitchell 2023); 0 is
    DPO, and from 0.5 on the labels would say nothing.
    normalisation: "mean" takes each log-ratio over the tokens of its completion, as Tulu 3 does
    (Lambert et al. 2024, length-normalised DPO, beta 5; sigmoid_norm in TRL).

    Metrics, one count per pair: preference/margin (in rewards), preference/accuracy (a tie counts
    half), reward/chosen, reward/rejected (implicit), logp/chosen, logp/rejected (policy, summed).
    Raises UserError for a beta, a smoothing or a normalisation out of range.
    """

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False

    beta: float = 0.1
    label_smoothing: float = 0.0
    normalisation: Normalisation = "sum"

    def __post_init__(self) -> None:
        check_positive("DPO", beta=self.beta)
        check_normalisation("DPO", self.normalisation)
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
        chosen_reward_B, rejected_reward_B = implicit_rewards(
            policy, reference, beta=self.beta, normalisation=self.normalisation
        )
        margin_B = chosen_reward_B - rejected_reward_B
        eps = self.label_smoothing
        loss_B = -(1.0 - eps) * logsigmoid(margin_B) - eps * logsigmoid(-margin_B)
        return pair_output(
            loss_B, policy, chosen_reward_B=chosen_reward_B, rejected_reward_B=rejected_reward_B
        )
