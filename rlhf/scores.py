"""What a policy is worth on held-out rows: pairs (DPO), judged answers (KTO), samples (PPO).

The decision to know: the same rows, the same random numbers and the same reference before and
after training, so that the two lines differ by the training alone.

Shapes: B rows, P prompt, R response.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.generation import sample
from rlhf import kl
from rlhf.dpo import completion_logps, pair_logps
from rlhf.kto import mismatched_log_ratios
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses import PairLogps, PreferenceLoss, wins
from rlhf.losses.kto import KTOLoss, reference_point
from rlhf.ppo import response_logits
from rlhf.reference import Reference
from rlhf.reward import RewardSource
from sft.rows import PromptRow
from sft.text import TextPath, pad_batch


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Means over held-out pairs: loss, margin of the loss's rewards, share of pairs got right."""

    loss: float
    margin: float
    accuracy: float
    num_pairs: int


@torch.no_grad()
def score_pairs(
    policy: nn.Module,
    reference: Reference,
    loss: PreferenceLoss,
    *,
    batches: Sequence[Mapping[str, Tensor]],
) -> PairScores:
    """Loss, margin and accuracy (a tie counts half) over batches of the preference collator."""
    was_training = policy.training
    policy.eval()
    totals = {"loss": 0.0, "preference/margin": 0.0, "preference/accuracy": 0.0}
    count = 0
    for batch in batches:
        measured_from: tuple[PairLogps, ...] = ()
        if loss.needs_reference:
            with reference.lend() as frozen:
                measured_from = (pair_logps(frozen, batch),)
        output = loss(pair_logps(policy, batch), *measured_from)
        totals["loss"] += float(output.loss_sum)
        for name in ("preference/margin", "preference/accuracy"):
            totals[name] += float(output.metrics[name][0])
        count += int(output.count)
    policy.train(was_training)
    means = {name: total / count for name, total in totals.items()}
    return PairScores(
        loss=means["loss"],
        margin=means["preference/margin"],
        accuracy=means["preference/accuracy"],
        num_pairs=count,
    )


@dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Over held-out judged answers: means of the loss and of the margin, and what they rest on.

    margin: mean reward of good minus that of bad answers; accuracy: of all pairs of a good and a
    bad answer, to whatever prompts, the share where the good one has the higher reward (ties half);
    both None where all answers are of one kind. reference_point: z0 in nats.
    """

    loss: float
    margin: float | None
    accuracy: float | None
    reference_point: float
    num_answers: int


@torch.no_grad()
def score_answers(
    policy: nn.Module,
    reference: Reference,
    loss: KTOLoss,
    *,
    batches: Sequence[Mapping[str, Tensor]],
) -> AnswerScores:
    """Loss, margin and accuracy over batches of `sft.unpaired.UnpairedCollator`, one z0 for all."""
    was_training = policy.training
    policy.eval()
    ratio_B = torch.cat([mismatched_log_ratios(policy, reference, batch) for batch in batches])
    point = reference_point(ratio_B.sum(), torch.tensor(ratio_B.numel()))
    total, rewards = 0.0, []
    for batch in batches:
        logp_B, _ = completion_logps(policy, batch)
        with reference.lend() as frozen:
            reference_logp_B, _ = completion_logps(frozen, batch)
        output = loss(
            logp_B,
            reference_logp_B,
            is_good_B=batch["is_good"],
            reference_point=point.to(logp_B.dtype),
        )
        total += float(output.loss_sum)
        rewards.append(loss.beta * (logp_B - reference_logp_B).double())
    policy.train(was_training)
    reward_B = torch.cat(rewards)
    is_good_B = torch.cat([batch["is_good"] for batch in batches])
    margin_GB = reward_B[is_good_B][:, None] - reward_B[~is_good_B]
    both = margin_GB.numel() > 0
    return AnswerScores(
        loss=total / reward_B.numel(),
        margin=float(margin_GB.mean()) if both else None,
        accuracy=float(wins(margin_GB).mean()) if both else None,
        reference_point=float(point),
        num_answers=reward_B.numel(),
    )


@dataclass(frozen=True, kw_only=True)
class PolicyScores:
    """Means over the sampled answers to held-out prompts.

    reward: the reward model's; kl: nats per answer from the reference, a Monte-Carlo sum; length:
    tokens with EOS; entropy: nats per token; ended: share with a stop token.
    """

    reward: float
    kl: float
    length: float
    entropy: float
    ended: float
    num_prompts: int


@torch.no_grad()
def score_policy(
    policy: nn.Module,
    reference: Reference,
    *,
    reward: RewardSource,
    rows: Sequence[PromptRow],
    text_path: TextPath,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: torch.device,
) -> PolicyScores:
    """Draw one answer to each prompt, with the same random numbers every time, and measure it."""
    prompt_BP, mask_BP = pad_batch(
        [row["prompt_ids"] for row in rows], pad_id=text_path.pad_id, side="left"
    )
    rollout = sample(
        policy,
        prompt_BP.to(device),
        prompt_mask_BP=mask_BP.to(device),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        stop_ids=text_path.stop_ids,
        seed=seed,
        purpose="ppo-evaluate",
        pad_id=text_path.pad_id,
    )
    ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
    mask = torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1)
    length = rollout.response_BR.shape[1]
    was_training = policy.training
    policy.eval()

    def logits_of(model: nn.Module) -> Tensor:
        return response_logits(model, ids, mask, length)

    def logp_of(logits: Tensor) -> Tensor:
        logp = token_logps(logits, ids[:, -length - 1 :], temperature=temperature)
        return response_logps(logp[:, 1:], rollout.mask_BR)

    logits = logits_of(policy)
    with reference.lend() as frozen:
        reference_logp_BR = logp_of(logits_of(frozen))
    kl_B = kl.k1(logp_of(logits), reference_logp_BR).double().sum(dim=1)
    entropy_BR = response_logps(entropy(logits, temperature=temperature)[:, 1:], rollout.mask_BR)
    policy.train(was_training)
    return PolicyScores(
        reward=float(reward(ids, mask).double().mean()),
        kl=float(kl_B.mean()),
        length=rollout.num_tokens / len(rows),
        entropy=float(entropy_BR.double().sum()) / rollout.num_tokens,
        ended=float(rollout.ended_B.double().mean()),
        num_prompts=len(rows),
    )
