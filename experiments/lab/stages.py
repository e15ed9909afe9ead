"""The stages of one seed: base model, SFT, pairs, reward model, DPO, PPO.

Every stage reads its input from the seed's folder, trains with checkpoints, and leaves its weights
there, so that an interrupted run continues where it was. Gold is touched in one function, which
says so: when the simulated annotators label pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from experiments.lab.evaluation import (
    completion_ids,
    draw_completions,
    measure,
    perplexity,
)
from experiments.lab.gold import label_pairs
from experiments.lab.judging import show_samples, show_stage
from experiments.lab.presets import DPOArm, PPOArm
from experiments.lab.seed import Seed
from experiments.lab.tales import seeded
from moe.record import has_router
from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.losses.dpo import DPOLoss
from rlhf.ppo import PPOTrainer
from rlhf.reference import Reference
from rlhf.reward import (
    ModelReward,
    RewardTrainer,
    center_reward,
    reward_accuracy,
    sequence_scores,
)
from sft.data import split_by_prompt
from sft.examples import Instruction, Preference
from sft.rows import (
    PreferenceCollator,
    SupervisedCollator,
    prompt_rows,
    supervised_rows,
)
from sft.run import write_json_atomic
from sft.settings import TrainSettings
from sft.text import Message, TextPath
from sft.trainer import SFTTrainer, StageTrainer

# The trunk: what all arms share.


def make_base(seed: Seed) -> None:
    """The model that all stages start from: given, or pretrained on the world's text."""
    seed.folder.mkdir(parents=True, exist_ok=True)
    notes = seed.world.prepare(seed.seed, seed.folder)
    rows = seed.world.pretraining_rows(seed.seed, seed.text_path())
    if rows is None:
        _take_base(seed, notes)
    else:
        _pretrain(seed, rows, notes)


def _take_base(seed: Seed, notes: list[str]) -> None:
    model = seed.fresh_model()
    with seed.metered("base") as meter, seed.tracked("base") as tracker:
        show_stage(seed, "base", model, tracker)
    facts = {"notes": notes, "routed": has_router(model), "tokens_trained": 0}
    seed.save("base", model, {**facts, **meter.facts()})


def _pretrain(seed: Seed, rows: Sequence[Any], notes: list[str]) -> None:
    scale, pretraining = seed.scale, seed.scale.pretraining
    assert pretraining is not None
    settings = TrainSettings(
        max_steps=pretraining.steps,
        batch_size=pretraining.batch,
        lr=pretraining.lr,
        warmup_steps=min(20, pretraining.steps // 4),
        weight_decay=0.1,
        seed=seed.seed,
        log_steps=10,
        save_steps=scale.save_steps,
        keep_checkpoints=1,
    )
    model = seed.fresh_model()
    with (
        seed.metered("pretrain") as meter,
        seed.tracked("pretrain", arm="base") as tracker,
    ):
        trainer = SFTTrainer(
            model,
            settings,
            rows=rows,
            collator=SupervisedCollator(seed.text_path().pad_id),
            **seed.trainer_options("pretrain", tracker, meter),
        )
        trainer.fit(resume=True)
        show_stage(seed, "base", model, tracker)
    tokens = settings.max_steps * settings.batch_size * pretraining.block
    facts = {"notes": notes, "routed": has_router(model), "tokens_trained": tokens}
    seed.save("base", model, {**facts, **meter.facts()})


def supervised_finetune(seed: Seed) -> None:
    scale, text_path = seed.scale, seed.text_path()
    rows = supervised_rows(seed.world.sft_examples(seed.seed), text_path)
    settings = scale.train(
        rows=len(rows),
        batch=scale.sft_batch,
        epochs=seed.tuned.sft_epochs,
        lr=seed.tuned.sft_lr,
        seed=seed.seed,
    )
    model = seed.base()
    balance = seed.world.balance(model)
    before = held_out_loss(seed, model)
    if seed.lora_rank:
        model = seed.with_lora(model, name="sft")
    with seed.metered("sft") as meter, seed.tracked("sft") as tracker:
        SFTTrainer(
            model,
            settings,
            rows=rows,
            collator=SupervisedCollator(text_path.pad_id),
            balance=balance,
            **seed.trainer_options("sft", tracker, meter),
        ).fit(resume=True)
        show_stage(seed, "sft", model, tracker)
    facts: dict[str, Any] = {"tokens_trained": _tokens(rows, settings), **meter.facts()}
    if before is not None:
        facts["held_out_loss"] = {"before": before, "after": held_out_loss(seed, model)}
    seed.save("sft", model, facts)


def held_out_loss(seed: Seed, model: nn.Module) -> float | None:
    """Nats per learned token on SFT examples that training does not see; None if not told."""
    examples = seed.world.sft_held_out(seed.seed)
    if examples is None:
        return None
    text_path = seed.text_path()
    rows = supervised_rows(examples, text_path)
    return math.log(perplexity(model, rows, pad_id=text_path.pad_id))


def _tokens(rows: Sequence[Any], settings: TrainSettings) -> int:
    """Mean row length times rows seen, rounded; every row is seen equally often up to one."""
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    return round(mean * settings.max_steps * settings.batch_size)


def collect_pairs(seed: Seed) -> None:
    """Two completions of the SFT policy per training prompt, and which one annotators prefer.

    The annotators are gold under Bradley-Terry noise: here, and only here, gold makes data. What
    the methods get is the preference, never the number.
    """
    path = seed.folder / "pairs.json"
    if path.is_file():
        return
    prompts = seed.world.training_prompts(seed.seed, seed.scale.num_pair_prompts)
    with seed.metered("pairs") as meter:
        drawn = _draw_both_sides(seed, prompts)
    gold, text_path = seed.world.gold(), seed.text_path()
    scores = [
        [gold(text_path.decode(row).strip(), ended=end) for row, end in side] for side in drawn
    ]
    rng = seeded(seed.seed, "labels")
    chosen_a = label_pairs(*scores, rng=rng, temperature=seed.scale.label_temperature)
    pairs = [
        {"prompt": prompt, "chosen": a if first else b, "rejected": b if first else a}
        for prompt, (a, _), (b, _), first in zip(prompts, *drawn, chosen_a, strict=True)
        if a != b
    ]
    ended = [end for side in drawn for _, end in side]
    agree = [first == (x > y) for first, x, y in zip(chosen_a, *scores, strict=True) if x != y]
    write_json_atomic(
        path,
        {
            "pairs": pairs,
            "tokens_generated": sum(len(row) for side in drawn for row, _ in side),
            "label_accuracy": sum(agree) / max(len(agree), 1),
            "ended_share": sum(ended) / len(ended),
            **meter.facts(),
        },
    )


def _draw_both_sides(seed: Seed, prompts: list[str]) -> list[list[tuple[list[int], bool]]]:
    """Two sides of (token ids, whether it ended) for each prompt, by the SFT policy."""
    model, drawn = seed.sft(), []
    for place, side in enumerate(("a", "b")):
        rollouts = draw_completions(
            model,
            prompts,
            seed.text_path(),
            max_new_tokens=seed.scale.max_new_tokens,
            seed=seed.seed,
            purpose=f"pairs-{side}",
        )
        ended = [bool(e) for r in rollouts for e in r.ended_B]
        drawn.append(list(zip(completion_ids(rollouts), ended, strict=True)))
        seed.progress("pairs", 1 + place, 2)
    return drawn


def pair_rows(seed: Seed) -> tuple[list[Any], list[Any]]:
    """(training, validation) rows of the labelled pairs, split by prompt, from their token ids."""
    held = seed.pairs()["pairs"]
    text_path = seed.text_path()
    examples = [
        Preference(prompt=(Message("user", p["prompt"]),), chosen=str(i), rejected="")
        for i, p in enumerate(held)
    ]
    sides = split_by_prompt(examples, val_fraction=seed.scale.rm_val_fraction, seed=seed.seed)

    def rows(side: Any) -> list[Any]:
        return [
            {
                "prompt_ids": text_path.encode_prompt(example.prompt),
                "chosen_ids": held[int(example.chosen)]["chosen"],
                "rejected_ids": held[int(example.chosen)]["rejected"],
                "sample_id": i,
            }
            for i, example in enumerate(side)
        ]

    return rows(sides[0]), rows(sides[1])


def train_reward_model(seed: Seed) -> None:
    scale, text_path = seed.scale, seed.text_path()
    train, val = pair_rows(seed)
    settings = scale.train(
        rows=len(train),
        batch=scale.rm_batch,
        epochs=seed.tuned.rm_epochs,
        lr=seed.tuned.rm_lr,
        seed=seed.seed,
    )
    model = seed.reward_model()
    collator = PreferenceCollator(text_path.pad_id)
    with seed.metered("rm") as meter, seed.tracked("rm") as tracker:
        RewardTrainer(
            model,
            settings,
            rows=train,
            collator=collator,
            balance=seed.world.balance(model),
            **seed.trainer_options("rm", tracker, meter),
        ).fit(resume=True)
        show_stage(seed, "rm", model, tracker)
        held_out = [collator(val[i : i + 64]) for i in range(0, len(val), 64)]
        accuracy = reward_accuracy(model, held_out)
        tracker.log(
            {"preference/accuracy": (accuracy.accuracy, accuracy.num_pairs)},
            step=settings.max_steps,
            stage="rm",
            split="val",
        )
    center_reward(model, _scores_of_samples(model, train, text_path))
    facts = {
        "accuracy": accuracy.accuracy,
        "accuracy_interval95": [accuracy.low, accuracy.high],
        "num_val_pairs": accuracy.num_pairs,
        **meter.facts(),
    }
    seed.save("rm", model, facts)


@torch.no_grad()
def _scores_of_samples(model: nn.Module, rows: Sequence[Any], text_path: TextPath) -> torch.Tensor:
    """Scores of the SFT policy's own completions, both sides of the training pairs."""
    collate = PreferenceCollator(text_path.pad_id)
    scores = []
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64])
        scores.append(sequence_scores(model, batch["input_ids"], batch["attention_mask"]))
    return torch.cat(scores)


# The arms.


def frontier_steps(total: int, points: int) -> set[int]:
    """So many evenly spaced steps, the last included."""
    return {max(1, round(total * (i + 1) / points)) for i in range(points)}


def watch_frontier(
    seed: Seed, trainer: StageTrainer, policy: nn.Module, reference: Reference, *, name: str
) -> None:
    """At evenly spaced steps, keep what the policy says on a few held-out prompts.

    Completions, KL and learned reward are written down; gold judges them after training, so that
    training cannot see it and nothing is chosen by it.
    """
    scale, text_path = seed.scale, seed.text_path()
    prompts = seed.eval_prompts(scale.num_frontier_prompts)
    reward = ModelReward(model=seed.load("rm", seed.reward_model()))
    steps = frontier_steps(trainer.settings.max_steps, scale.frontier_points)
    tell = trainer.on_progress

    def look(step: int, total: int) -> None:
        if tell is not None:
            tell(step, total)
        if step not in steps:
            return
        rollouts = draw_completions(
            policy,
            prompts,
            text_path,
            max_new_tokens=scale.max_new_tokens,
            seed=seed.seed,
            purpose="frontier",
        )
        with reference.lend() as model:
            measured = measure(rollouts, text_path, reward=reward, reference=model)
        policy.train()
        folder = seed.folder / name / "frontier"
        folder.mkdir(parents=True, exist_ok=True)
        write_json_atomic(folder / f"step-{step:06d}.json", {"step": step, **asdict(measured)})

    trainer.on_progress = look


def train_dpo(seed: Seed, arm: DPOArm, *, name: str = "dpo") -> None:
    text_path = seed.text_path()
    train, _ = pair_rows(seed)
    settings = seed.scale.train(
        rows=len(train), batch=arm.batch_size, epochs=arm.epochs, lr=arm.lr, seed=seed.seed
    )
    policy, reference = seed.policy_and_reference()
    with seed.metered(name) as meter, seed.tracked(name) as tracker:
        trainer = DPOTrainer(
            policy,
            settings,
            reference=reference,
            loss=DPOLoss(beta=arm.beta),
            rows=train,
            collator=PreferenceCollator(text_path.pad_id),
            **seed.trainer_options(name, tracker, meter),
        )
        watch_frontier(seed, trainer, policy, reference, name=name)
        trainer.fit(resume=True)
        show_stage(seed, name, policy, tracker)
        show_samples(seed, name, policy, tracker)
    lengths = [
        2 * len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in train
    ]
    seen = settings.max_steps * settings.batch_size
    facts = {
        "tokens_generated": 0,
        "tokens_trained": round(sum(lengths) / len(lengths) * seen),
        **meter.facts(),
    }
    seed.save(name, policy, facts)


def train_ppo(seed: Seed, arm: PPOArm, *, name: str = "ppo") -> None:
    scale, text_path = seed.scale, seed.text_path()
    prompts = [
        Instruction(conversation=(Message("user", p), Message("assistant", "")))
        for p in seed.world.training_prompts(seed.seed, scale.num_pair_prompts)
    ]
    penalty = seed.world.missing_eos_penalty(seed.pairs()["ended_share"])
    ppo = scale.ppo_settings(arm, missing_eos_penalty=penalty)
    settings = TrainSettings(
        max_steps=ppo.steps,
        batch_size=ppo.minibatch_size,
        lr=arm.lr,
        lr_schedule="linear",
        adam_eps=1e-5,
        seed=seed.seed,
        log_steps=ppo.epochs * ppo.minibatches,
        save_steps=scale.save_steps,
        keep_checkpoints=1,
    )
    policy, reference = seed.policy_and_reference()
    with seed.metered(name) as meter, seed.tracked(name) as tracker:
        trainer = PPOTrainer(
            policy,
            settings,
            critic=seed.load("rm", seed.reward_model()),
            reference=reference,
            reward=ModelReward(model=seed.load("rm", seed.reward_model())),
            rows=prompt_rows(prompts, text_path),
            ppo=ppo,
            kl_controller=FixedKL(arm.kl_coef),
            pad_id=text_path.pad_id,
            stop_ids=text_path.stop_ids,
            **seed.trainer_options(name, tracker, meter),
        )
        watch_frontier(seed, trainer, policy, reference, name=name)
        trainer.fit(resume=True)
        show_stage(seed, name, policy, tracker)
        show_samples(seed, name, policy, tracker)
    facts = {
        "tokens_generated": trainer.tokens_generated,
        "tokens_trained": trainer.tokens_generated * ppo.epochs,
        **meter.facts(),
    }
    seed.save(name, policy, facts)
