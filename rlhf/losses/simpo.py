"""Simple preference optimisation (Meng et al. 2024, arxiv.org/abs/2405.14734, eq. 6).

The decision to know: no reference. The reward is beta times the log-probability per token, what
generation itself goes by, so an answer gains nothing by being long; nothing but the learning rate
keeps the policy near where it began.

Shapes: B batch (pairs).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch.nn.functional import logsigmoid

from moe.errors import UserError
from rlhf.losses import LossOutput, PairLogps
from rlhf.losses.pairs import check_positive, mean_logps, pair_output


@dataclass(frozen=True, kw_only=True)
class SimPOLoss:
    """-log sigma(chosen - rejected - target_margin), of rewards beta * log pi(y|x) / |y|.

    beta: above 0, and far above DPO's, because it multiplies a mean. target_margin: the paper's
    gamma, at least 0, in units of the reward. The defaults are where the authors' README says to
    begin: beta 2 and gamma / beta 1/2.

    Metrics as DPO's: preference/margin without target_margin, logp summed over the completion.
    Raises UserError for options out of range.
    """

    needs_reference: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    value_at_reference: ClassVar[None] = None  # depends on the policy that it starts from

    beta: float = 2.0
    target_margin: float = 1.0

    def __post_init__(self) -> None:
        check_positive("SimPO", beta=self.beta)
        if not 0.0 <= self.target_margin < math.inf:
            raise UserError(
                "SimPO: target_margin must be a finite number of 0 or more, "
                f"got {self.target_margin}"
            )

    def __call__(self, policy: PairLogps) -> LossOutput:
        """The loss of B pairs; a completion without tokens has reward 0."""
        chosen_B, rejected_B = mean_logps(policy)
        chosen_B, rejected_B = self.beta * chosen_B, self.beta * rejected_B
        return pair_output(
            -logsigmoid(chosen_B - rejected_B - self.target_margin),
            policy,
            chosen_reward_B=chosen_B,
            rejected_reward_B=rejected_B,
        )
