"""From logits to scores, and from the chosen scores to weights: one entry a scoring.

A score decides and weighs; a probability is the same opinion as a distribution, for the balance
loss and the statistics.

Shapes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe.router_spec import RouterSpec

TINY = torch.finfo(torch.float32).tiny
SIGMOID_EPSILON = 1e-20  # Hugging Face's DeepSeek-V3 and GLM-4-MoE: all chosen scores may be 0


@dataclass(frozen=True, kw_only=True)
class ScoringRule:
    """How one scoring reads the logits, all float32.

    score: logits_TE to the scores that choose. probability: logits_TE and score_TE to a
    distribution over E. normalise: chosen scores (T, K) to weights that sum to 1.
    """

    score: Callable[[Tensor], Tensor]
    probability: Callable[[Tensor, Tensor], Tensor]
    normalise: Callable[[Tensor], Tensor]


def softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1)


def _share(score_TK: Tensor) -> Tensor:
    # A choice that is not by score can sum to 0 in float32; its weights are then 0, not NaN.
    return score_TK / score_TK.sum(dim=-1, keepdim=True).clamp(min=TINY)


def _share_of_sigmoids(score_TK: Tensor) -> Tensor:
    return score_TK / (score_TK.sum(dim=-1, keepdim=True) + SIGMOID_EPSILON)


def _sigmoid_probability(logits_TE: Tensor, score_TE: Tensor) -> Tensor:
    """s / sum s (DeepSeek-V3, eq. 18), in logarithms: where every sigmoid is 0 the ratio is not."""
    return softmax(functional.logsigmoid(logits_TE))


SCORINGS: dict[str, ScoringRule] = {
    "softmax": ScoringRule(
        score=softmax, probability=lambda logits_TE, score_TE: score_TE, normalise=_share
    ),
    "softmax_chosen": ScoringRule(
        score=lambda logits_TE: logits_TE,
        probability=lambda logits_TE, score_TE: softmax(logits_TE),
        normalise=softmax,
    ),
    "sigmoid": ScoringRule(
        score=torch.sigmoid, probability=_sigmoid_probability, normalise=_share_of_sigmoids
    ),
}


def weigh(score_TE: Tensor, expert_TK: Tensor, spec: RouterSpec) -> Tensor:
    """Combine weights (T, K) of the chosen experts, before anything is dropped."""
    weight_TK = score_TE.gather(-1, expert_TK)
    if spec.normalize_weights:
        weight_TK = SCORINGS[spec.scoring].normalise(weight_TK)
    if spec.routed_scaling_factor != 1.0:
        weight_TK = weight_TK * spec.routed_scaling_factor
    return weight_TK
