"""The stages of one seed on its pairs: SFT on the chosen answers, reward model, DPO; judging.

Every stage trains with checkpoints on the training side alone, measures itself on the held-out side
before and after, and leaves its weights and facts, so that an interrupted run goes on where it was.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn

from experiments.lab.evaluation import perplexity
from experiments.lab.pairs_baselines import baselines
from experiments.lab.pairs_data import chosen_rows
from experiments.lab.pairs_seed import PairsSeed, check_given
from moe.errors import UserError
from moe.record import RoutingTrace, has_router, record_routing
from moe.stats import RouterStats, drift
from rlhf.calibration import measure_reward
from rlhf.dpo import DPOTrainer
from rlhf.losses.dpo import DPOLoss
from rlhf.reference import FrozenCopy
from rlhf.reward import RewardTrainer, reward_accuracy, wilson_interval
from rlhf.scores import PairScores, score_pairs
from sft.rows import (
    PreferenceCollator,
    PreferenceRow,
    SupervisedCollator,
    prompt_rows,
)
from sft.run import write_json_atomic, write_text_atomic
from sft.session import answers, before_and_after
from sft.trainer import SFTTrainer

EVALUATION_PAIRS = 32  # of a forward pass without gradients
CPU = torch.device("cpu")


def batches_of(seed: PairsSeed, rows: Sequence[PreferenceRow]) -> list[dict[str, Tensor]]:
    collate = PreferenceCollator(seed.text_path.pad_id)
    size = EVALUATION_PAIRS
    return [collate(rows[i : i + size]) for i in range(0, len(rows), size)]


def _some_learned(seed: PairsSeed) -> list[PreferenceRow]:
    """As many training pairs as are held out: enough to see what was learned by heart."""
    return seed.sides.train_rows[: len(seed.sides.held_out_rows)]


def describe_pairs(seed: PairsSeed) -> None:
    """Leaves `split.json`: what was read, cut and held out.

    Raises UserError if a resumed run finds another file or model than it began with.
    """
    path = seed.folder / "split.json"
    if path.is_file():
        held = json.loads(path.read_text(encoding="utf-8"))
        for name, fingerprint in held["fingerprints"].items():
            if fingerprint != seed.fingerprints[name]:
                raise UserError(
                    f"The {name} of this run has changed since it began: put the old one back, or "
                    "start a new run."
                )
        return
    seed.folder.mkdir(parents=True, exist_ok=True)
    _, examples = check_given(seed.config)
    sides = seed.sides
    write_json_atomic(
        path,
        {
            "fingerprints": seed.fingerprints,
            "num_train_pairs": len(sides.train),
            "num_held_out_pairs": len(sides.held_out),
            "notes": list(examples.notes),
        },
    )


def train_sft(seed: PairsSeed) -> None:
    """Learn the chosen answers of the training side."""
    rows = chosen_rows(seed.sides.train_rows)
    model = seed.base()
    before = _held_out_loss(seed, model)
    with seed.metered("sft") as meter, seed.tracked("sft") as tracker:
        SFTTrainer(
            model,
            seed.settings(seed.scale.sft, num_rows=len(rows)),
            rows=rows,
            collator=SupervisedCollator(seed.text_path.pad_id),
            balance=seed.balance(model),
            **seed.trainer_options("sft", tracker, meter),
        ).fit(resume=True)
        after = _held_out_loss(seed, model)
    seed.save("sft", model, {"held_out_loss": {"before": before, "after": after}, **meter.facts()})


def _held_out_loss(seed: PairsSeed, model: nn.Module) -> float:
    """Nats per token of the held-out chosen answers."""
    rows = chosen_rows(seed.sides.held_out_rows)
    return math.log(perplexity(model, rows, pad_id=seed.text_path.pad_id))


def train_reward_model(seed: PairsSeed) -> None:
    """Bradley-Terry on the training side; a report on the held-out side."""
    rows = seed.sides.train_rows
    settings = seed.settings(seed.scale.rm, num_rows=len(rows))
    model = seed.reward_model()
    held_out = batches_of(seed, seed.sides.held_out_rows)
    before = reward_accuracy(model, held_out)
    with seed.metered("rm") as meter, seed.tracked("rm") as tracker:
        RewardTrainer(
            model,
            settings,
            rows=rows,
            collator=PreferenceCollator(seed.text_path.pad_id),
            balance=seed.balance(model),
            **seed.trainer_options("rm", tracker, meter),
        ).fit(resume=True)
        report = measure_reward(model, held_out, train_batches=batches_of(seed, rows))
        found, count = report.accuracy, report.accuracy.num_pairs
        tracker.log(
            {
                "preference/accuracy": (found.accuracy, count),
                "preference/margin": (found.margin, count),
            },
            step=settings.max_steps,
            stage="rm",
            split="val",
        )
        on_train = reward_accuracy(model, batches_of(seed, _some_learned(seed)))
    metrics = {
        "accuracy": found.accuracy,
        "wilson_low": found.low,
        "wilson_high": found.high,
        "accuracy_before": before.accuracy,
        "train_accuracy": on_train.accuracy,
        "reward_margin": found.margin,
    }
    seed.save("rm", model, {"metrics": metrics, "report": asdict(report), **meter.facts()})


def train_dpo(seed: PairsSeed) -> None:
    """DPO from the policy, measured by its implicit reward before and after."""
    rows = seed.sides.train_rows
    settings = seed.settings(seed.scale.dpo, num_rows=len(rows))
    policy, loss = seed.policy(), DPOLoss(beta=seed.scale.beta)
    reference = FrozenCopy(policy)
    held_out = batches_of(seed, seed.sides.held_out_rows)
    before = score_pairs(policy, reference, loss, batches=held_out)
    with seed.metered("dpo") as meter, seed.tracked("dpo") as tracker:
        DPOTrainer(
            policy,
            settings,
            reference=reference,
            loss=loss,
            rows=rows,
            collator=PreferenceCollator(seed.text_path.pad_id),
            **seed.trainer_options("dpo", tracker, meter),
        ).fit(resume=True)
        after = score_pairs(policy, reference, loss, batches=held_out)
        tracker.log(
            {
                "preference/accuracy": (after.accuracy, after.num_pairs),
                "preference/margin": (after.margin, after.num_pairs),
            },
            step=settings.max_steps,
            stage="dpo",
            split="val",
        )
        learned = batches_of(seed, _some_learned(seed))
        on_train = score_pairs(policy, reference, loss, batches=learned)
    seed.save("dpo", policy, {"metrics": _dpo_metrics(before, after, on_train), **meter.facts()})


def _dpo_metrics(before: PairScores, after: PairScores, train: PairScores) -> dict[str, float]:
    low, high = wilson_interval(after.accuracy * after.num_pairs, after.num_pairs)
    return {
        "accuracy": after.accuracy,
        "wilson_low": low,
        "wilson_high": high,
        "accuracy_before": before.accuracy,
        "train_accuracy": train.accuracy,
        "implicit_margin": after.margin,
        "implicit_margin_before": before.margin,
        "dpo_loss": after.loss,
    }


# Judging: the rules without a model, the samples, and the routing of every stage.


def judge_baselines(seed: PairsSeed) -> None:
    """Leaves `baselines.json`; does nothing if it is there."""
    path = seed.folder / "baselines.json"
    if not path.is_file():
        found = baselines(seed.sides.train, seed.sides.held_out)
        write_json_atomic(path, {name: asdict(accuracy) for name, accuracy in found.items()})


def answer_prompts(seed: PairsSeed, stage: str, *, against: str) -> None:
    """Leaves `samples.jsonl`: greedy answers to held-out prompts before and after a stage."""
    path = seed.arm_folder(stage) / "samples.jsonl"
    if path.is_file():
        return
    room = max(1, seed.scale.max_length - seed.scale.max_new_tokens)
    first = seed.sides.held_out.select(range(min(seed.scale.num_samples, len(seed.sides.held_out))))
    prompts = prompt_rows(first, seed.text_path, max_prompt_length=room)
    before, after = (
        answers(
            seed.model_of(name).eval(),
            prompts,
            seed.text_path,
            max_new_tokens=seed.scale.max_new_tokens,
            device=CPU,
        )
        for name in (against, stage)
    )
    rows = before_and_after(prompts, before, after)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)


def record_stage(seed: PairsSeed, stage: str, *, start: str) -> None:
    """Leaves `routing.json` and `routing.npz` of a stage; nothing for a model without experts.

    Drift is from `start`, the stage that the reward model and DPO begin with.
    """
    path = seed.arm_folder(stage) / "routing.json"
    if path.is_file():
        return
    model = seed.model_of(stage)
    if not has_router(model):
        return
    trace = _trace(seed, model)
    stats = RouterStats.from_trace(trace)
    moved = drift(_trace(seed, seed.model_of(start)), trace)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path.with_suffix(".npz"),
        count=stats.count_LE.numpy(),
        importance=stats.importance_LE.numpy(),
        tokens=stats.tokens_L.numpy(),
    )
    write_json_atomic(
        path,
        {
            "load_entropy": stats.load_entropy_L.tolist(),
            "max_vio": stats.max_vio_L.tolist(),
            "max_vio_floor": stats.max_vio_floor_L.tolist(),
            "dead_experts": stats.dead_experts_L.tolist(),
            "dropped_share": stats.dropped_share_L.tolist(),
            f"jaccard_from_{start}": moved.jaccard_L.tolist(),
            f"jsd_from_{start}": moved.jsd_bits_L.tolist(),
            "load_share": stats.relative_load_LE.tolist(),
        },
    )


@torch.no_grad()
def _trace(seed: PairsSeed, model: nn.Module) -> RoutingTrace:
    """Where the tokens of the first held-out pairs go, both answers; the same for every stage."""
    rows = seed.sides.held_out_rows[: seed.scale.num_routing_pairs]
    model.eval()
    with record_routing(model) as trace:
        for batch in batches_of(seed, rows):
            inputs: Mapping[str, Tensor] = {k: batch[k] for k in ("input_ids", "attention_mask")}
            model(**inputs, use_cache=False)
    return trace
