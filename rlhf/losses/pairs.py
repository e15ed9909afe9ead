"""What the losses of pairs share: how a completion's tokens are reduced, and what is reported.

The decision to know: `sum` and `mean` are two objectives, not two scalings. A sum is the log-ratio
of whole answers, as the papers of DPO and IPO write it; a mean over the answer's own tokens weighs
a long answer no more than a short one. Libraries differ in silence, so a loss names which it takes.

Shapes: B batch (pairs).
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from moe.errors import UserError
from rlhf.logprobs import check_same_shape
from rlhf.losses import LossOutput, PairLogps, metric, wins

Normalisation = Literal["sum", "mean"]


def check_normalisation(loss: str, value: str) -> None:
    """Raises UserError, naming the loss, for anything but "sum" and "mean"."""
    if value not in get_args(Normalisation):
        raise UserError(
            f"{loss}: normalisation must be one of {', '.join(get_args(Normalisation))}, "
            f"got {value!r}"
        )


def check_positive(loss: str, **options: float) -> None:
    """Raises UserError, naming the loss and the option, unless all are finite and above 0."""
    for name, value in options.items():
        if not 0.0 < value < math.inf:
            raise UserError(f"{loss}: {name} must be a finite number above 0, got {value}")


def normalised(value_B: Tensor, length_B: Tensor, *, normalisation: Normalisation) -> Tensor:
    """Sums over completions, or their means over length_B tokens; 0 where there is no token."""
    return value_B if normalisation == "sum" else value_B / length_B.clamp(min=1)


def implicit_rewards(
    policy: PairLogps, reference: PairLogps, *, beta: float, normalisation: Normalisation
) -> tuple[Tensor, Tensor]:
    """beta * log(policy / reference) of chosen and rejected, (B,) each; no gradient to reference.

    Raises ValueError when policy and reference hold different numbers of pairs.
    """
    check_same_shape(policy=policy.chosen, reference=reference.chosen)
    chosen_B = log_ratio(policy.chosen, reference.chosen)
    rejected_B = log_ratio(policy.rejected, reference.rejected)
    chosen_B = normalised(chosen_B, policy.chosen_length, normalisation=normalisation)
    rejected_B = normalised(rejected_B, policy.rejected_length, normalisation=normalisation)
    return beta * chosen_B, beta * rejected_B


def mean_logps(policy: PairLogps) -> tuple[Tensor, Tensor]:
    """log-probabilities per token of chosen and rejected, (B,) each, in float32 at least."""
    dtype = torch.promote_types(policy.chosen.dtype, torch.float32)
    return (
        normalised(policy.chosen.to(dtype), policy.chosen_length, normalisation="mean"),
        normalised(policy.rejected.to(dtype), policy.rejected_length, normalisation="mean"),
    )


def log_ratio(logp_B: Tensor, ref_logp_B: Tensor) -> Tensor:
    """log(policy / reference) in float32 at least; the reference is a constant."""
    dtype = torch.promote_types(logp_B.dtype, torch.float32)
    return logp_B.to(dtype) - ref_logp_B.detach()


def pair_output(
    loss_B: Tensor, policy: PairLogps, *, chosen_reward_B: Tensor, rejected_reward_B: Tensor
) -> LossOutput:
    """The summed loss with the metrics that every loss of pairs reports, one count per pair.

    preference/margin (of rewards), preference/accuracy (a tie counts half), reward/chosen,
    reward/rejected, logp/chosen, logp/rejected (policy, summed).
    """
    margin_B = chosen_reward_B - rejected_reward_B
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
