"""The reward model's loss: the pairwise model of Bradley and Terry (1952).

The decision to know: the model fixes scores only up to a constant per prompt. `center_coef` holds
that constant near 0 during training; without it, centre the scores afterwards.

Shapes: B batch (pairs).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from moe.errors import UserError
from rlhf.logprobs import check_same_shape
from rlhf.losses import LossOutput, metric, wins


@dataclass(frozen=True, kw_only=True)
class BradleyTerryLoss:
    """-log sigma(chosen - rejected - margin) + center_coef * (chosen + rejected)^2, per pair.

    The first term is Stiennon et al. 2020 (section 3.4), the margin Touvron et al. 2023 (Llama 2,
    eq. 2), the second term Eisenstein et al. 2023 (eq. 2, "Helping or Herding?").

    Metrics, one count per pair: preference/accuracy (a tie counts half; the margin plays no part),
    preference/margin (chosen - rejected), reward/chosen, reward/rejected.
    """

    center_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.center_coef < math.inf:
            raise UserError(
                f"Bradley-Terry: center_coef must be a finite number of 0 or more, "
                f"got {self.center_coef}"
            )

    @property
    def value_at_tie(self) -> float:
        """ln 2: the mean loss when both scores of every pair are 0 and no margin is asked."""
        return math.log(2.0)

    def __call__(
        self,
        chosen_score_B: Tensor,
        rejected_score_B: Tensor,
        *,
        margin_B: Tensor | None = None,
    ) -> LossOutput:
        """The loss of B pairs. Raises ValueError when shapes differ or are not (B,)."""
        check_same_shape(chosen=chosen_score_B, rejected=rejected_score_B, margin=margin_B)
        if chosen_score_B.ndim != 1:
            raise ValueError(f"scores are (B,), got {tuple(chosen_score_B.shape)}")
        dtype = torch.promote_types(chosen_score_B.dtype, torch.float32)
        chosen_B, rejected_B = chosen_score_B.to(dtype), rejected_score_B.to(dtype)
        gap_B = chosen_B - rejected_B
        loss_B = -logsigmoid(gap_B if margin_B is None else gap_B - margin_B)
        if self.center_coef > 0.0:
            loss_B = loss_B + self.center_coef * (chosen_B + rejected_B).square()
        return LossOutput(
            loss_sum=loss_B.sum(),
            count=torch.tensor(loss_B.numel(), device=loss_B.device),
            metrics={
                "preference/accuracy": metric(wins(gap_B)),
                "preference/margin": metric(gap_B),
                "reward/chosen": metric(chosen_B),
                "reward/rejected": metric(rejected_B),
            },
        )
