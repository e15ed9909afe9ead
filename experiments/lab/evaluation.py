"""One evaluator for every arm: the same held-out prompts, the same measures, the only user of gold.

Completions are measured first (`measure`: no gold) and judged after training (`judge`: gold);
divergence from the SFT policy is a Monte-Carlo sum of log-probability differences over the arm's
own completions.

Shapes: B prompts, P prompt, R response.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from experiments.lab.gold import distinct_n
from moe.generation import Rollout, positions, sample
from rlhf.logprobs import token_logps
from rlhf.reward import RewardSource
from sft.loss import language_model_loss
from sft.rows import SupervisedCollator, SupervisedRow
from sft.text import Message, TextPath, pad_batch

Gold = Callable[..., float]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An arm's completions on some prompts: metrics, and the rows behind them."""

    metrics: dict[str, float]
    texts: list[str]
    gold_B: list[float] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Completions and what can be said of them without gold."""

    metrics: dict[str, float]
    texts: list[str]
    ended: list[bool]


def encode_prompts(prompts: Sequence[str], text_path: TextPath) -> tuple[Tensor, Tensor]:
    """Left-padded (ids (B, P), mask (B, P)) of single-turn prompts."""
    rows = [text_path.encode_prompt((Message("user", prompt),)) for prompt in prompts]
    return pad_batch(rows, pad_id=text_path.pad_id, side="left")


def draw_completions(
    model: nn.Module,
    prompts: Sequence[str],
    text_path: TextPath,
    *,
    max_new_tokens: int,
    seed: int,
    purpose: str,
    batch_size: int = 128,
) -> list[Rollout]:
    """Temperature-1 completions, in batches; the random numbers depend on prompt index alone."""
    rollouts = []
    for start in range(0, len(prompts), batch_size):
        ids, mask = encode_prompts(prompts[start : start + batch_size], text_path)
        rollouts.append(
            sample(
                model,
                ids,
                prompt_mask_BP=mask,
                max_new_tokens=max_new_tokens,
                stop_ids=text_path.stop_ids,
                seed=seed,
                purpose=purpose,
                sample_ids=range(start, start + len(ids)),
                pad_id=text_path.pad_id,
            )
        )
    return rollouts


def completion_ids(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Token ids of each completion, the stop token included."""
    return [
        row[mask].tolist()
        for rollout in rollouts
        for row, mask in zip(rollout.response_BR, rollout.mask_BR, strict=True)
    ]


@torch.no_grad()
def response_logp_sums(model: nn.Module, rollouts: Sequence[Rollout]) -> list[float]:
    """log p(completion | prompt) of each row, summed over its tokens."""
    model.eval()
    sums: list[float] = []
    for rollout in rollouts:
        ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
        mask = torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1)
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            use_cache=False,
        ).logits
        logp_BR = token_logps(logits, ids)[:, -rollout.response_BR.shape[1] :]
        sums += torch.where(rollout.mask_BR, logp_BR, 0.0).double().sum(dim=1).tolist()
    return sums


def text_perplexity(model: nn.Module, rollouts: Sequence[Rollout], text_path: TextPath) -> float:
    """Perplexity of the completions' words under a model that may end a text by another token.

    So the token that ends one is not counted: a model that never writes it would call every text
    that ends unlikely. A set without any other token gives 1, as an empty product does.
    """
    stops = torch.tensor(text_path.stop_ids)
    words = [replace(r, mask_BR=r.mask_BR & ~torch.isin(r.response_BR, stops)) for r in rollouts]
    count = sum(r.num_tokens for r in words)
    return math.exp(-sum(response_logp_sums(model, words)) / max(count, 1))


def proxy_scores(reward: RewardSource, rollouts: Sequence[Rollout]) -> list[float]:
    """The learned reward of each completion."""
    scores: list[float] = []
    for rollout in rollouts:
        scores += reward(
            torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1),
            torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1),
        ).tolist()
    return scores


def measure(
    rollouts: Sequence[Rollout],
    text_path: TextPath,
    *,
    reward: RewardSource,
    reference: nn.Module,
    original: nn.Module | None = None,
    policy_logp_B: Sequence[float] | None = None,
    reference_rollouts: Sequence[Rollout] | None = None,
    kl_value: float | None = None,
) -> Measured:
    """What anyone may know of completions: all but gold.

    original: a model under which the text's own perplexity is told, where there is one.
    policy_logp_B: log-probability of each completion under the policy that drew it; default what
    the sampler reported. reference_rollouts: the same completions behind the plain prompts, where
    the arm was asked in another way. kl_value: a divergence known in closed form (best-of-n), put
    in its place.
    """
    plain = rollouts if reference_rollouts is None else reference_rollouts
    ids = completion_ids(rollouts)
    ended = [bool(e) for rollout in rollouts for e in rollout.ended_B]
    if policy_logp_B is None:
        policy_logp_B = [float(x) for r in rollouts for x in r.logp_BR.double().sum(dim=1)]
    reference_B = response_logp_sums(reference, plain)
    num_tokens = sum(len(row) for row in ids)
    kl = _mean([p - q for p, q in zip(policy_logp_B, reference_B, strict=True)])
    own = (
        {}
        if original is None
        else {"original_perplexity": text_perplexity(original, plain, text_path)}
    )
    return Measured(
        metrics={
            "proxy_reward": _mean(proxy_scores(reward, plain)),
            "kl_sequence": kl if kl_value is None else kl_value,
            "length": num_tokens / len(ids),
            "distinct_2": distinct_n(ids, 2),
            "reference_perplexity": math.exp(-sum(reference_B) / num_tokens),
            "ended": _mean([float(end) for end in ended]),
            **own,
        },
        texts=[text_path.decode(row).strip() for row in ids],
        ended=ended,
    )


def judge(measured: Measured, gold: Gold) -> Judged:
    """Add gold: the evaluator's privilege, used after training alone."""
    gold_B = [
        gold(text, ended=end) for text, end in zip(measured.texts, measured.ended, strict=True)
    ]
    return Judged(
        metrics={"gold_reward": _mean(gold_B), **measured.metrics},
        texts=measured.texts,
        gold_B=gold_B,
    )


def win_rate(gold_B: Sequence[float], against_B: Sequence[float]) -> float:
    """Share of prompts on which the first is better by gold; ties count half."""
    wins = [
        1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(gold_B, against_B, strict=True)
    ]
    return _mean(wins)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Sequence[SupervisedRow], *, pad_id: int) -> float:
    """exp of the mean cross-entropy per learned token, token-weighted over all rows."""
    model.eval()
    collate = SupervisedCollator(pad_id)
    total = count = 0.0
    for start in range(0, len(rows), 32):
        batch = collate(rows[start : start + 32])
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).logits
        output = language_model_loss(logits, batch["labels"])
        total += float(output.loss_sum)
        count += float(output.count)
    return math.exp(total / count)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
