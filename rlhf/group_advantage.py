"""Advantages without a critic: what stands in a value's place is the other answers to the prompt.

The decision to know: a group is `group_size` rows that follow one another, and every function here
takes all rows of an update. Who drew which of them, in which process, then has no part in it.

Scores are one number per answer, the KL taken off if the reward pays it. Nothing carries a
gradient.

Shapes: B answers of an update, G groups, K answers of a group; B = G * K.
"""

import torch
from einops import rearrange
from torch import Tensor

from moe.errors import UserError

# Bounds how far scores that differ by rounding are blown up: by a million.
EPSILON = 1e-6


@torch.no_grad()
def centered(score_B: Tensor, *, group_size: int) -> Tensor:
    """s_i - mean of its group: GRPO without a deviation (Dr. GRPO, Liu et al. 2025,
    arxiv.org/abs/2503.20783).

    The answer itself is part of that mean, so that this is (K - 1) / K of `leave_one_out`: the same
    direction, one scale for all answers. 0 for every answer of a group of equal scores.
    """
    score_GK = _groups(score_B, group_size)
    centered_GK = score_GK - score_GK.mean(dim=1, keepdim=True)
    # The mean of equal numbers may round to another number.
    return torch.where(_are_equal(score_GK), 0.0, centered_GK).flatten()


@torch.no_grad()
def standardized(score_B: Tensor, *, group_size: int) -> Tensor:
    """(s_i - mean) / (deviation + 1e-6) within the group: GRPO (Shao et al. 2024, section 4.1.2,
    arxiv.org/abs/2402.03300).

    The deviation is over K - 1, as public code has it; the paper does not say. A group of equal
    scores has advantage 0: it says nothing about its answers. Dividing makes groups whose scores
    hardly differ weigh as much as any other (Liu et al. 2025 call it a bias; see `centered`).
    """
    deviation_GK = _groups(score_B, group_size).std(dim=1, keepdim=True)
    centered_GK = _groups(centered(score_B, group_size=group_size), group_size)
    return (centered_GK / (deviation_GK + EPSILON)).flatten()


@torch.no_grad()
def leave_one_out(score_B: Tensor, *, group_size: int) -> Tensor:
    """s_i - mean of the K - 1 others: RLOO (Ahmadian et al. 2024, arxiv.org/abs/2402.14740).

    The baseline knows nothing of the answer it is for, so the policy gradient has no bias.
    """
    others = group_size / (group_size - 1) if group_size > 1 else 1.0
    return others * centered(score_B, group_size=group_size)


@torch.no_grad()
def group_deviation(score_B: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """(deviation_B, are_equal_B): of each answer's group, over K - 1; whether its scores differ."""
    score_GK = _groups(score_B, group_size)
    equal_GK = _are_equal(score_GK).expand_as(score_GK)
    deviation_GK = score_GK.std(dim=1, keepdim=True).expand_as(score_GK)
    return torch.where(equal_GK, 0.0, deviation_GK).flatten(), equal_GK.flatten()


def _groups(score_B: Tensor, group_size: int) -> Tensor:
    if group_size < 2:
        raise UserError(
            f"group_size is {group_size}: a baseline of other answers to the same prompt needs at "
            "least 2."
        )
    if len(score_B) % group_size:
        raise UserError(f"{len(score_B)} scores are no whole number of groups of {group_size}.")
    return rearrange(score_B, "(g k) -> g k", k=group_size)


def _are_equal(score_GK: Tensor) -> Tensor:
    return (score_GK == score_GK[:, :1]).all(dim=1, keepdim=True)
