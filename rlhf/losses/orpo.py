"""Odds ratio preference optimisation (Hong et al. 2024, arxiv.org/abs/2403.07691, eq. 6 and 7).

The decision to know: likelihood and preference in one stage, without a reference. The likelihood
term is the paper's, a mean over the tokens of each chosen answer and then over pairs, prompt left
out; TRL instead takes a mean over all tokens of a micro-batch, prompts too, and the authors' code
counts prompts unless told not to.

Shapes: B batch (pairs).
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.losses import LossOutput, PairLogps, metric
from rlhf.losses.pairs import check_positive, mean_logps, pair_output


@dataclass(frozen=True, kw_only=True)
class ORPOLoss:
    """-log P(chosen) - odds_coef * log sigma(log odds of chosen - log odds of rejected).

    log P(y) = log pi(y|x) / |y| is a token's log-probability on average (eq. 3), the odds are
    P / (1 - P) (eq. 4), odds_coef is the paper's lambda, above 0.

    Metrics as DPO's, where the reward is the log odds; and preference/chosen_nll, the first term.
    Raises UserError for a coefficient out of range.
    """

    needs_reference: ClassVar[bool] = False
    couples_batch: ClassVar[bool] = False
    value_at_reference: ClassVar[None] = None  # depends on the policy that it starts from

    odds_coef: float = 0.1

    def __post_init__(self) -> None:
        check_positive("ORPO", odds_coef=self.odds_coef)

    def __call__(self, policy: PairLogps) -> LossOutput:
        """The loss of B pairs; a completion without tokens counts as P just below 1."""
        chosen_B, rejected_B = mean_logps(policy)
        chosen_odds_B, rejected_odds_B = log_odds(chosen_B), log_odds(rejected_B)
        preferred_B = -logsigmoid(chosen_odds_B - rejected_odds_B)
        output = pair_output(
            -chosen_B + self.odds_coef * preferred_B,
            policy,
            chosen_reward_B=chosen_odds_B,
            rejected_reward_B=rejected_odds_B,
        )
        more = {"preference/chosen_nll": metric(-chosen_B)}
        return replace(output, metrics={**output.metrics, **more})


def log_odds(logp_B: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P < 0, without cancellation at either end.

    log P above -eps of its type counts as -eps, without gradient: P = 1 has no odds.
    """
    held_B = logp_B.clamp(max=-torch.finfo(logp_B.dtype).eps)
    # log(1 - P): near P = 1 expm1 keeps the digits, near P = 0 log1p does (Maechler 2012, eq. 7).
    is_likely_B = held_B > -math.log(2.0)
    # Each form only where it is taken: the other one's infinite slope would make 0 * inf.
    likely_B = torch.where(is_likely_B, held_B, -1.0)
    unlikely_B = torch.where(is_likely_B, -1.0, held_B)
    log_rest_B = torch.where(is_likely_B, (-likely_B.expm1()).log(), (-unlikely_B.exp()).log1p())
    return held_B - log_rest_B
