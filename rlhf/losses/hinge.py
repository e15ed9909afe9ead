"""The hinge on log-ratios (Liu et al. 2023, RSO, arxiv.org/abs/2309.06657).

The decision to know: it is the hinge of SLiC (Zhao et al. 2023) with the reference's likelihoods
divided out, what RSO calls hinge-norm, so that it has DPO's implicit rewards and DPO's beta; a pair
that is ahead by 1 has no gradient left.

Shapes: B batch (pairs).
"""

from dataclasses import dataclass
from typing import ClassVar

from rlhf.losses import LossOutput, PairLogps
from rlhf.losses.pairs import (
    Normalisation,
    check_normalisation,
    check_positive,
    implicit_rewards,
    pair_output,
)


@dataclass(frozen=True, kw_only=True)
class HingeLoss:
    """max(0, 1 - margin), margin the gap of the rewards beta * log(policy / reference).

    normalisation: of each log-ratio over the tokens of its completion, "sum" or "mean".
    Metrics as DPO's. Raises UserError for a beta or a normalisation out of range.
    """

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False

    beta: float = 0.1
    normalisation: Normalisation = "sum"

    def __post_init__(self) -> None:
        check_positive("hinge", beta=self.beta)
        check_normalisation("hinge", self.normalisation)

    @property
    def value_at_reference(self) -> float:
        """1, whatever beta is."""
        return 1.0

    def __call__(self, policy: PairLogps, reference: PairLogps) -> LossOutput:
        """The loss of B pairs; the reference is a constant. Raises ValueError if B differs."""
        chosen_B, rejected_B = implicit_rewards(
            policy, reference, beta=self.beta, normalisation=self.normalisation
        )
        return pair_output(
            (1.0 - (chosen_B - rejected_B)).relu(),
            policy,
            chosen_reward_B=chosen_B,
            rejected_reward_B=rejected_B,
        )
