"""What the arms of a seed are measured and judged by, and how their routing is recorded.

Gold is used here by `judge_arm` and `judge_frontier` alone, after training. `measure_arm` is what
anyone may see, and what tuning chooses by.
"""

import json
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.lab.evaluation import (
    Measured,
    completion_ids,
    draw_completions,
    encode_prompts,
    judge,
    measure,
    perplexity,
)
from experiments.lab.presets import BestOfNArm
from experiments.lab.seed import Seed, load_policy
from experiments.lab.specialisation import domain_use, expert_distance_L
from experiments.lab.tales import FEW_SHOT_STOP
from moe.generation import Rollout, sample
from moe.record import RoutingTrace, has_router, record_routing
from moe.stats import RouterStats, drift
from rlhf.best_of_n import best_of_n, kl_bound
from rlhf.reward import (
    ModelReward,
)
from sft.rows import SupervisedCollator
from sft.text import pad_batch
from sft.tracking import Tracker


def measure_arm(
    seed: Seed, arm: str, prompts: list[str], *, best: BestOfNArm | None = None
) -> tuple[Measured, int]:
    """An arm's completions on these prompts and their measures; tokens drawn to get them."""
    scale, text_path = seed.scale, seed.text_path()
    reward = ModelReward(model=seed.load("rm", seed.reward_model()))
    reference, original = seed.sft().eval(), seed.world.original()
    if arm == "few_shot":
        return _measure_few_shot(seed, prompts, reward, reference)
    if arm == "best_of_n":
        assert best is not None
        rollouts, tokens = _best_rollouts(seed, reference, prompts, reward, best)
        kl = kl_bound(best.n)
        measured = measure(
            rollouts,
            text_path,
            reward=reward,
            reference=reference,
            original=original,
            kl_value=kl,
        )
        return measured, tokens
    rollouts = draw_completions(
        load_policy(seed, arm),
        prompts,
        text_path,
        max_new_tokens=scale.max_new_tokens,
        seed=seed.seed,
        purpose="evaluate",
    )
    measured = measure(rollouts, text_path, reward=reward, reference=reference, original=original)
    return measured, 0


def judge_arm(seed: Seed, arm: str, *, best: BestOfNArm | None = None) -> dict[str, Any]:
    """Metrics of one arm on the held-out prompts, and its completions for the record."""
    scale, text_path = seed.scale, seed.text_path()
    measured, tokens = measure_arm(seed, arm, seed.eval_prompts(scale.num_eval_prompts), best=best)
    judged = judge(measured, seed.world.gold())
    model = load_policy(seed, {"few_shot": "base", "best_of_n": "sft"}.get(arm, arm))
    held_out = seed.world.forgetting_rows(seed.seed, seed.folder)
    metrics = {
        **judged.metrics,
        "base_perplexity": perplexity(model, held_out, pad_id=text_path.pad_id),
    }
    return {"metrics": metrics, "texts": judged.texts, "gold": judged.gold_B, "drawn": tokens}


def _best_rollouts(
    seed: Seed, model: nn.Module, prompts: list[str], reward: ModelReward, best: BestOfNArm
) -> tuple[list[Rollout], int]:
    text_path, chosen, tokens = seed.text_path(), [], 0
    for start in range(0, len(prompts), 128):
        ids, mask = encode_prompts(prompts[start : start + 128], text_path)
        found = best_of_n(
            model,
            ids,
            prompt_mask_BP=mask,
            reward=reward,
            n=best.n,
            max_new_tokens=seed.scale.max_new_tokens,
            temperature=1.0,
            stop_ids=text_path.stop_ids,
            seed=seed.seed,
            sample_ids=range(start, start + len(ids)),
            pad_id=text_path.pad_id,
        )
        chosen.append(found.rollout)
        tokens += found.tokens_generated
    return chosen, tokens


def _measure_few_shot(
    seed: Seed, prompts: list[str], reward: ModelReward, reference: nn.Module
) -> tuple[Measured, int]:
    """The base model with worked examples in its prompt; it stops at the end of the line."""
    model = seed.base().eval()
    scale, text_path = seed.scale, seed.text_path()
    asked = seed.world.few_shot_prompts(prompts, seed=seed.seed)
    assert asked is not None
    rows = [text_path.encode_document(text)[:-1] for text in asked]  # without the EOS
    newline = text_path.tokenizer.encode(FEW_SHOT_STOP, add_special_tokens=False)
    rollouts, plain = [], []
    for start in range(0, len(rows), 64):
        ids, mask = pad_batch(rows[start : start + 64], pad_id=text_path.pad_id, side="left")
        rollout = sample(
            model,
            ids,
            prompt_mask_BP=mask,
            max_new_tokens=scale.max_new_tokens,
            stop_ids=(*text_path.stop_ids, *newline[-1:]),
            seed=seed.seed,
            purpose="few-shot",
            sample_ids=range(start, start + len(ids)),
            pad_id=text_path.pad_id,
        )
        rollouts.append(rollout)
        plain_ids, plain_mask = encode_prompts(prompts[start : start + 64], text_path)
        # For the reward model and the reference the answer ends with EOS, as theirs do.
        response = torch.where(
            rollout.mask_BR & torch.isin(rollout.response_BR, torch.tensor(newline[-1:])),
            text_path.eos_id,
            rollout.response_BR,
        )
        plain.append(
            Rollout(
                prompt_BP=plain_ids,
                prompt_mask_BP=plain_mask,
                response_BR=response,
                mask_BR=rollout.mask_BR,
                logp_BR=rollout.logp_BR,
                ended_B=rollout.ended_B,
            )
        )
    measured = measure(
        rollouts, text_path, reward=reward, reference=reference, reference_rollouts=plain
    )
    return measured, sum(r.num_tokens for r in rollouts)


# Routing: the same texts through every stage.


def record_texts(seed: Seed, model: nn.Module) -> RoutingTrace:
    """Where the world's held-out texts go; the same rows for every stage of a seed."""
    rows = seed.world.routing_rows(seed.seed, seed.folder)
    collate = SupervisedCollator(seed.text_path().pad_id)
    model.eval()
    with torch.no_grad(), record_routing(model) as trace:
        for start in range(0, len(rows), 32):
            numbered: list[Any] = [
                {**row, "sample_id": start + i} for i, row in enumerate(rows[start : start + 32])
            ]
            batch = collate(numbered)
            model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                sample_ids=batch["sample_ids"],
                use_cache=False,
            )
    return trace


def routing_of(seed: Seed, stage: str) -> dict[str, Any] | None:
    """Expert use of a stage and its drift from SFT, per layer; None for a model without experts.

    Where experts began as copies, also how far they have come apart.
    """
    model = seed.load("rm", seed.reward_model()) if stage == "rm" else load_policy(seed, stage)
    if not has_router(model):
        return None
    trace = record_texts(seed, model)
    stats = RouterStats.from_trace(trace)
    moved = drift(record_texts(seed, load_policy(seed, "sft")), trace)
    found = {
        "load_entropy": stats.load_entropy_L.tolist(),
        "max_vio": stats.max_vio_L.tolist(),
        "max_vio_floor": stats.max_vio_floor_L.tolist(),
        "dead_experts": stats.dead_experts_L.tolist(),
        "dropped_share": stats.dropped_share_L.tolist(),
        "jaccard_from_sft": moved.jaccard_L.tolist(),
        "jsd_from_sft": moved.jsd_bits_L.tolist(),
        "load_share": stats.relative_load_LE.tolist(),
    }
    if seed.world.experts_begin_equal:
        rows = seed.world.routing_rows(seed.seed, seed.folder)
        found["expert_distance"] = expert_distance_L(model)
        found |= domain_use(trace, [row["domain"] for row in rows], seed=seed.seed)
    folder = seed.arm_folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "routing.npz",
        count=stats.count_LE.numpy(),
        importance=stats.importance_LE.numpy(),
        tokens=stats.tokens_L.numpy(),
    )
    return found


def show_stage(seed: Seed, arm: str, model: nn.Module, tracker: Tracker) -> None:
    """The expert heat map of a stage, for the mirror; a model without experts has none."""
    if not has_router(model):
        return
    stats = RouterStats.from_trace(record_texts(seed, model))
    tracker.heat_map(arm, stats.relative_load_LE.tolist())


def show_samples(seed: Seed, arm: str, policy: nn.Module, tracker: Tracker) -> None:
    """A few held-out prompts answered before (by SFT) and after, for the mirror."""
    text_path, prompts = seed.text_path(), seed.eval_prompts(8)
    answers = []
    for model in (seed.sft(), policy):
        rollouts = draw_completions(
            model,
            prompts,
            text_path,
            max_new_tokens=seed.scale.max_new_tokens,
            seed=seed.seed,
            purpose="evaluate",
        )
        answers.append([text_path.decode(ids).strip() for ids in completion_ids(rollouts)])
    tracker.samples(
        arm,
        [
            {"prompt": prompt, "before": before, "after": after}
            for prompt, before, after in zip(prompts, *answers, strict=True)
        ],
    )


def judge_frontier(seed: Seed, arm: str) -> list[dict[str, float]]:
    """The kept points of an arm's training, with gold."""
    gold, points = seed.world.gold(), []
    for path in sorted((seed.folder / arm / "frontier").glob("step-*.json")):
        kept = json.loads(path.read_text(encoding="utf-8"))
        step = kept.pop("step")
        metrics = judge(Measured(**kept), gold).metrics
        points.append(
            {
                "step": step,
                "kl": metrics["kl_sequence"],
                "gold": metrics["gold_reward"],
                "proxy": metrics["proxy_reward"],
            }
        )
    return points
