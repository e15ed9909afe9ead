"""Identity preference optimisation (Azar et al. 2023, arxiv.org/abs/2310.12036, eq. 17).

The decision to know: the gap of log-ratios is drawn to 1 / (2 beta) and no further, where DPO
drives it to infinity once a pair is never contradicted. Whether a log-ratio is a sum or a mean over
tokens decides what that number means, and the libraries disagree: the DPO authors' code and
OpenRLHF sum, TRL takes means. The default here is the equation as printed, the sum.

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
class IPOLoss:
    """(h - 1 / (2 beta))^2, with h the gap of the log-ratios of policy and reference.

    beta: the paper's tau, the price of a nat of KL; above 0. Where one of two answers is preferred
    with probability p, the optimum of both orders has h = (p - 1/2) / beta.
    normalisation: of each log-ratio over the tokens of its completion, "sum" or "mean".

    Metrics as DPO's: rewards are beta * log-ratio, so that the margin is beta * h, drawn to 1/2.
    Raises UserError for a beta or a normalisation out of range.
    """

    needs_reference: ClassVar[bool] = True
    couples_batch: ClassVar[bool] = False

    beta: float = 0.1
    normalisation: Normalisation = "sum"

    def __post_init__(self) -> None:
        check_positive("IPO", beta=self.beta)
        check_normalisation("IPO", self.normalisation)

    @property
    def value_at_reference(self) -> float:
        """(1 / (2 beta))^2, where h is 0."""
        return (0.5 / self.beta) ** 2

    def __call__(self, policy: PairLogps, reference: PairLogps) -> LossOutput:
        """The loss of B pairs; the reference is a constant. Raises ValueError if B differs."""
        chosen_B, rejected_B = implicit_rewards(
            policy, reference, beta=1.0, normalisation=self.normalisation
        )
        return pair_output(
            (chosen_B - rejected_B - 0.5 / self.beta).square(),
            policy,
            chosen_reward_B=self.beta * chosen_B,
            rejected_reward_B=self.beta * rejected_B,
        )
