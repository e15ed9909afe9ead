"""Best-of-n: draw n completions from the SFT policy, keep the one the reward source likes most.

No training; its KL from the policy is at most ln n - (n - 1) / n (Stiennon et al. 2020), which is
what other methods have to beat at equal reward.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.generation import Rollout, sample
from rlhf.reward import RewardSource


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """The chosen completions as a Rollout, their scores (B,), and the tokens drawn to get them."""

    rollout: Rollout
    score_B: Tensor
    tokens_generated: int


def kl_bound(n: int) -> float:
    """Nats; exact when no two completions tie."""
    return math.log(n) - (n - 1) / n


def best_of_n(
    model: nn.Module,
    prompt_BP: Tensor,
    *,
    prompt_mask_BP: Tensor,
    reward: RewardSource,
    n: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: Sequence[int],
    seed: int,
    purpose: str = "best-of-n",
    sample_ids: Sequence[int] | None = None,
    pad_id: int = 0,
) -> BestOfN:
    """Ties go to the first drawn. Raises ValueError for n below 1."""
    if n < 1:
        raise ValueError(f"n {n} must be at least 1")
    best: Rollout | None = None
    best_score_B = torch.full((len(prompt_BP),), -math.inf, device=prompt_BP.device)
    tokens = 0
    for draw in range(n):
        rollout = sample(
            model,
            prompt_BP,
            prompt_mask_BP=prompt_mask_BP,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            seed=seed,
            purpose=f"{purpose}-{draw}",
            sample_ids=sample_ids,
            pad_id=pad_id,
        )
        tokens += rollout.num_tokens
        score_B = reward(
            torch.cat([prompt_BP, rollout.response_BR], dim=1),
            torch.cat([prompt_mask_BP.bool(), rollout.mask_BR], dim=1),
        )
        better_B = score_B > best_score_B
        best_score_B = torch.where(better_B, score_B, best_score_B)
        best = rollout if best is None else _choose(better_B, rollout, best)
    assert best is not None
    return BestOfN(rollout=best, score_B=best_score_B, tokens_generated=tokens)


def _choose(take_B: Tensor, new: Rollout, old: Rollout) -> Rollout:
    take_B1 = take_B[:, None]
    return Rollout(
        prompt_BP=old.prompt_BP,
        prompt_mask_BP=old.prompt_mask_BP,
        response_BR=torch.where(take_B1, new.response_BR, old.response_BR),
        mask_BR=torch.where(take_B1, new.mask_BR, old.mask_BR),
        logp_BR=torch.where(take_B1, new.logp_BR, old.logp_BR),
        ended_B=torch.where(take_B, new.ended_B, old.ended_B),
    )
