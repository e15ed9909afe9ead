"""What a policy is worth on held-out rows: on pairs for DPO, on sampled answers for PPO.

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
from rlhf.dpo import pair_logps
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses.dpo import DPOLoss
from rlhf.ppo import response_logits
from rlhf.reference import Reference
from rlhf.reward import RewardSource
from sft.rows import PromptRow
from sft.text import TextPath, pad_batch


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Means over held-out pairs: loss, margin of implicit rewards, share of pairs it gets right."""

    loss: float
    margin: float
    accuracy: float
    num_pairs: int


@torch.no_grad()
def score_pairs(
    policy: nn.Module,
    reference: Reference,
    loss: DPOLoss,
    *,
    batches: Sequence[Mapping[str, Tensor]],
) -> PairScores:
    """Loss, margin and accuracy (a tie counts half) over batches of the preference collator."""
    was_training = policy.training
    policy.eval()
    totals = {"loss": 0.0, "preference/margin": 0.0, "preference/accuracy": 0.0}
    count = 0
    for batch in batches:
        with reference.lend() as frozen:
            frozen_logps = pair_logps(frozen, batch)
        output = loss(pair_logps(policy, batch), frozen_logps)
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
