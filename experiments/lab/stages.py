"""The stages of one seed on the world `tales`: pretrain, SFT, pairs, reward model, DPO, PPO, judge.

Every stage reads its input from the seed's folder, trains with checkpoints, and leaves its weights
there, so that an interrupted run continues where it was. Gold is touched twice, in functions that
say so: when the simulated annotators label pairs, and when the evaluator judges.
"""

import copy
import json
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from experiments.lab import tales
from experiments.lab.corpus import pretraining_documents
from experiments.lab.evaluation import (
    Measured,
    completion_ids,
    draw_completions,
    encode_prompts,
    judge,
    measure,
    perplexity,
)
from experiments.lab.gold import GoldReward, label_pairs
from experiments.lab.presets import BestOfNArm, DPOArm, PPOArm, Scale
from moe import MoEConfig, MoEForCausalLM
from moe.generation import Rollout, sample
from moe.record import RoutingTrace, record_routing
from moe.stats import RouterStats, drift
from rlhf.best_of_n import best_of_n, kl_bound
from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.losses.dpo import DPOLoss
from rlhf.ppo import PPOTrainer
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import (
    ModelReward,
    RewardTrainer,
    center_reward,
    reward_accuracy,
    scalar_model,
    sequence_scores,
)
from sft.adapt import LoraSpec, add_lora, copy_adapter, merged
from sft.checkpoint import (
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sft.data import split_by_prompt
from sft.examples import Document, Instruction, Preference
from sft.rows import (
    PreferenceCollator,
    SupervisedCollator,
    document_rows,
    prompt_rows,
    supervised_rows,
)
from sft.run import write_json_atomic
from sft.text import Message, TextPath, load_tokenizer, pad_batch, pick_template, train_bpe
from sft.tracking import Tracker
from sft.trainer import BalancePolicy, SFTTrainer, StageTrainer, TrainSettings

Progress = Callable[[str, int, int], None]
LORA_TARGETS = ("attention", "experts")


@dataclass(frozen=True, kw_only=True)
class Seed:
    """One seed of a run: where it works, how big, and how it tells what it is doing.

    folder: private files (weights, pairs). arms: parent of `<arm>-s<seed>` folders.
    lora_rank: 0 for full updates; pretraining is always full.
    """

    seed: int
    scale: Scale
    folder: Path
    arms: Path
    lora_rank: int = 0
    experiment: str = "compare"
    mirror: bool = True
    progress: Progress = lambda stage, step, total: None

    @property
    def lora(self) -> LoraSpec | None:
        if not self.lora_rank:
            return None
        return LoraSpec(rank=self.lora_rank, alpha=2.0 * self.lora_rank, targets=LORA_TARGETS)

    def arm_folder(self, arm: str) -> Path:
        return self.arms / f"{arm}-s{self.seed}"

    def lr(self, lr: float) -> float:
        """Adapters start at zero and want larger steps than full updates."""
        return lr * self.scale.lora_lr_scale if self.lora_rank else lr

    # Text.

    def text_path(self) -> TextPath:
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        template = pick_template(tokenizer, "plain")
        return TextPath(tokenizer, template, max_length=self.scale.max_length)

    def eval_prompts(self, count: int) -> list[str]:
        """Held-out prompts, the same for every seed and arm."""
        return tales.prompts(0, count, split="held_out")

    # Models on disk.

    def save(self, stage: str, model: nn.Module, facts: dict[str, Any]) -> None:
        write_checkpoint(
            self.folder / stage / "final",
            tensors={"model": live_tensors(model)},
            documents={"facts": facts},
            facts={"stage": stage, "seed": self.seed},
        )

    def facts(self, stage: str) -> dict[str, Any]:
        path = self.folder / stage / "final" / "facts.json"
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage / "final" / "MANIFEST.json").is_file()

    def load(self, stage: str, model: nn.Module) -> nn.Module:
        checkpoint = read_checkpoint(self.folder / stage / "final")
        load_strictly(model, checkpoint.tensors["model"], source=str(checkpoint.folder))
        return model

    def fresh_model(self) -> MoEForCausalLM:
        text_path = self.text_path()
        config = MoEConfig(
            vocab_size=len(text_path.tokenizer),
            pad_token_id=text_path.pad_id,
            bos_token_id=text_path.bos_id,
            eos_token_id=text_path.eos_id,
            **self.scale.model,
        )
        torch.manual_seed(self.seed)
        return MoEForCausalLM(config)

    def base(self) -> nn.Module:
        return self.load("base", self.fresh_model())

    def sft(self) -> nn.Module:
        """The SFT policy: the whole model, or the base with its adapter `sft`."""
        model: nn.Module = self.fresh_model()
        if self.lora:
            model = add_lora(model, self.lora, name="sft")
        return self.load("sft", model)

    def policy_and_reference(self) -> tuple[nn.Module, Reference]:
        """A trainable policy that starts as SFT, and SFT as its reference."""
        policy = self.sft()
        if self.lora:
            copy_adapter(policy, "sft", name="policy")
            return policy, FrozenAdapter(policy, "sft")
        return policy, FrozenCopy(policy)

    def reward_model(self) -> nn.Module:
        """The scalar model on the SFT backbone (adapters folded in, own adapters on top)."""
        torch.manual_seed(self.seed + 1)  # the fresh head
        plain = merged(copy.deepcopy(self.sft()))
        model: nn.Module = scalar_model(plain)
        return add_lora(model, self.lora) if self.lora else model

    # Running a trainer.

    @contextmanager
    def tracked(self, arm: str, job: str) -> Iterator[Tracker]:
        folder = self.arm_folder(arm)
        resume = _resume_steps(self.folder / job, job)
        with Tracker(
            folder,
            group=self.experiment,
            job_type=job,
            name=f"{arm}-s{self.seed}",
            config={"seed": self.seed, "arm": arm, "lora_rank": self.lora_rank},
            mirror="wandb" if self.mirror else "none",
            resume_step=resume,
            console=None,
        ) as tracker:
            yield tracker

    def trainer_options(self, job: str, tracker: Tracker) -> dict[str, Any]:
        return {
            "folder": self.folder / job,
            "stage": job,
            "tracker": tracker,
            "on_progress": lambda step, total: self.progress(job, step, total),
        }


def _resume_steps(folder: Path, stage: str) -> dict[str, int]:
    """How far this stage's metrics count: to its newest checkpoint, else not at all."""
    newest, _ = newest_checkpoint(folder)
    return {stage: int(newest.name.rpartition("-")[2]) if newest else 0}


@dataclass
class Meter:
    """Seconds and peak memory of a stage; outside the identity of a run."""

    start: float
    seconds: float = 0.0
    peak_mib: float = 0.0


@contextmanager
def metered() -> Iterator[Meter]:
    meter = Meter(start=time.perf_counter())
    yield meter
    meter.seconds = time.perf_counter() - meter.start
    meter.peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# The trunk: what all arms share.


def prepare_text(seed: Seed) -> list[str]:
    """Train the tokenizer on the pretraining documents; returns the corpus's notes."""
    folder = seed.folder / "tokenizer"
    corpus = pretraining_documents(seed.seed, seed.scale.num_documents)
    if not (folder / "tokenizer.json").is_file():
        texts = [document.text for document in corpus.documents]
        train_bpe(texts, vocab_size=seed.scale.vocab_size).save_pretrained(folder)
    return list(corpus.notes)


def pretraining_rows(seed: Seed, *, split: Any = "train", count: int) -> Any:
    corpus = pretraining_documents(seed.seed, count, split=split)
    documents = [Document(text=d.text, domain=d.domain) for d in corpus.documents]
    return document_rows(documents, seed.text_path(), block=seed.scale.block)


def pretrain(seed: Seed) -> None:
    notes = prepare_text(seed)
    scale = seed.scale
    rows = pretraining_rows(seed, count=scale.num_documents)
    settings = TrainSettings(
        max_steps=scale.pretrain_steps,
        batch_size=scale.pretrain_batch,
        lr=scale.pretrain_lr,
        warmup_steps=min(20, scale.pretrain_steps // 4),
        weight_decay=0.1,
        seed=seed.seed,
        log_steps=10,
        save_steps=scale.save_steps,
        keep_checkpoints=1,
    )
    model = seed.fresh_model()
    with metered() as meter, seed.tracked("base", "pretrain") as tracker:
        trainer = SFTTrainer(
            model,
            settings,
            rows=rows,
            collator=SupervisedCollator(seed.text_path().pad_id),
            **seed.trainer_options("pretrain", tracker),
        )
        trainer.fit(resume=True)
        show_stage(seed, "base", model, tracker)
    tokens = settings.max_steps * settings.batch_size * scale.block
    seed.save("base", model, {"notes": notes, "tokens_trained": tokens, "seconds": meter.seconds})


def supervised_finetune(seed: Seed) -> None:
    scale, text_path = seed.scale, seed.text_path()
    examples = [
        Instruction(conversation=(Message("user", e.prompt), Message("assistant", e.answer)))
        for e in tales.sft_examples(seed.seed, scale.num_sft)
    ]
    rows = supervised_rows(examples, text_path)
    settings = scale.train(
        rows=len(rows),
        batch=scale.sft_batch,
        epochs=scale.sft_epochs,
        lr=seed.lr(scale.sft_lr),
        seed=seed.seed,
    )
    model = seed.base()
    balance = BalancePolicy.of_model(model)
    if seed.lora:
        model = add_lora(model, seed.lora, name="sft")
    with metered() as meter, seed.tracked("sft", "sft") as tracker:
        SFTTrainer(
            model,
            settings,
            rows=rows,
            collator=SupervisedCollator(text_path.pad_id),
            balance=balance,
            **seed.trainer_options("sft", tracker),
        ).fit(resume=True)
        show_stage(seed, "sft", model, tracker)
    tokens = _tokens(rows, settings)
    seed.save("sft", model, {"tokens_trained": tokens, "seconds": meter.seconds})


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
    scale, text_path = seed.scale, seed.text_path()
    prompts = tales.prompts(seed.seed, scale.num_pair_prompts, split="train")
    model = seed.sft()
    drawn = []
    for side in ("a", "b"):
        rollouts = draw_completions(
            model,
            prompts,
            text_path,
            max_new_tokens=scale.max_new_tokens,
            seed=seed.seed,
            purpose=f"pairs-{side}",
        )
        ids = completion_ids(rollouts)
        ended = [bool(e) for r in rollouts for e in r.ended_B]
        drawn.append((ids, ended))
        seed.progress("pairs", 1 + (side == "b"), 2)
    gold = GoldReward()
    scores = [
        [gold(text_path.decode(row).strip(), ended=end) for row, end in zip(*side, strict=True)]
        for side in drawn
    ]
    rng = tales.seeded(seed.seed, "labels")
    chosen_a = label_pairs(*scores, rng=rng, temperature=scale.label_temperature)
    pairs = [
        {"prompt": prompt, "chosen": a if first else b, "rejected": b if first else a}
        for prompt, a, b, first in zip(prompts, drawn[0][0], drawn[1][0], chosen_a, strict=True)
        if a != b
    ]
    tokens = sum(len(row) for ids, _ in drawn for row in ids)
    agree = [first == (x > y) for first, x, y in zip(chosen_a, *scores, strict=True) if x != y]
    write_json_atomic(
        path,
        {
            "pairs": pairs,
            "tokens_generated": tokens,
            "label_accuracy": sum(agree) / max(len(agree), 1),
        },
    )


def pair_rows(seed: Seed) -> tuple[list[Any], list[Any]]:
    """(training, validation) rows of the labelled pairs, split by prompt, from their token ids."""
    held = json.loads((seed.folder / "pairs.json").read_text(encoding="utf-8"))["pairs"]
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
        epochs=scale.rm_epochs,
        lr=seed.lr(scale.rm_lr),
        seed=seed.seed,
    )
    model = seed.reward_model()
    collator = PreferenceCollator(text_path.pad_id)
    with metered() as meter, seed.tracked("rm", "rm") as tracker:
        RewardTrainer(
            model,
            settings,
            rows=train,
            collator=collator,
            balance=BalancePolicy.of_model(model),
            **seed.trainer_options("rm", tracker),
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
        "seconds": meter.seconds,
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
        rows=len(train), batch=arm.batch_size, epochs=arm.epochs, lr=seed.lr(arm.lr), seed=seed.seed
    )
    policy, reference = seed.policy_and_reference()
    with metered() as meter, seed.tracked(name, name) as tracker:
        trainer = DPOTrainer(
            policy,
            settings,
            reference=reference,
            loss=DPOLoss(beta=arm.beta),
            rows=train,
            collator=PreferenceCollator(text_path.pad_id),
            **seed.trainer_options(name, tracker),
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
        "seconds": meter.seconds,
        "peak_mib": meter.peak_mib,
    }
    seed.save(name, policy, facts)


def train_ppo(seed: Seed, arm: PPOArm, *, name: str = "ppo") -> None:
    scale, text_path = seed.scale, seed.text_path()
    prompts = [
        Instruction(conversation=(Message("user", p), Message("assistant", "")))
        for p in tales.prompts(seed.seed, scale.num_pair_prompts, split="train")
    ]
    ppo = scale.ppo_settings(arm)
    settings = TrainSettings(
        max_steps=ppo.steps,
        batch_size=ppo.minibatch_size,
        lr=seed.lr(arm.lr),
        lr_schedule="linear",
        adam_eps=1e-5,
        seed=seed.seed,
        log_steps=ppo.epochs * ppo.minibatches,
        save_steps=scale.save_steps,
        keep_checkpoints=1,
    )
    policy, reference = seed.policy_and_reference()
    with metered() as meter, seed.tracked(name, name) as tracker:
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
            **seed.trainer_options(name, tracker),
        )
        watch_frontier(seed, trainer, policy, reference, name=name)
        trainer.fit(resume=True)
        show_stage(seed, name, policy, tracker)
        show_samples(seed, name, policy, tracker)
    facts = {
        "tokens_generated": trainer.tokens_generated,
        "tokens_trained": trainer.tokens_generated * ppo.epochs,
        "seconds": meter.seconds,
        "peak_mib": meter.peak_mib,
    }
    seed.save(name, policy, facts)


def load_policy(seed: Seed, arm: str) -> nn.Module:
    """The trained policy of an arm, ready to sample from."""
    if arm == "base":
        return seed.base().eval()
    if arm == "sft":
        return seed.sft().eval()
    policy, _ = seed.policy_and_reference()
    return seed.load(arm, policy).eval()


# Judging.


def measure_arm(
    seed: Seed, arm: str, prompts: list[str], *, best: BestOfNArm | None = None
) -> tuple[Measured, int]:
    """An arm's completions on these prompts and their measures; tokens drawn to get them."""
    scale, text_path = seed.scale, seed.text_path()
    reward = ModelReward(model=seed.load("rm", seed.reward_model()))
    reference = seed.sft().eval()
    if arm == "few_shot":
        return _measure_few_shot(seed, prompts, reward, reference)
    if arm == "best_of_n":
        assert best is not None
        rollouts, tokens = _best_rollouts(seed, reference, prompts, reward, best)
        kl = kl_bound(best.n)
        measured = measure(rollouts, text_path, reward=reward, reference=reference, kl_value=kl)
        return measured, tokens
    rollouts = draw_completions(
        load_policy(seed, arm),
        prompts,
        text_path,
        max_new_tokens=scale.max_new_tokens,
        seed=seed.seed,
        purpose="evaluate",
    )
    return measure(rollouts, text_path, reward=reward, reference=reference), 0


def judge_arm(seed: Seed, arm: str, *, best: BestOfNArm | None = None) -> dict[str, Any]:
    """Metrics of one arm on the held-out prompts, and its completions for the record."""
    scale, text_path = seed.scale, seed.text_path()
    measured, tokens = measure_arm(seed, arm, seed.eval_prompts(scale.num_eval_prompts), best=best)
    judged = judge(measured, GoldReward())
    model = load_policy(seed, {"few_shot": "base", "best_of_n": "sft"}.get(arm, arm))
    held_out = pretraining_rows(seed, split="held_out", count=max(40, scale.num_documents // 30))
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
    rng = tales.seeded(seed.seed, "few-shot")
    asked = [tales.few_shot_prompt(p, scale.few_shot, rng=rng) for p in prompts]
    rows = [text_path.encode_document(text)[:-1] for text in asked]  # without the EOS
    newline = text_path.tokenizer.encode("\n", add_special_tokens=False)
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
    """Where held-out tales and pretraining text go; the same rows for every stage of a seed."""
    scale, text_path = seed.scale, seed.text_path()
    examples = [
        Instruction(conversation=(Message("user", e.prompt), Message("assistant", e.answer)))
        for e in tales.sft_examples(0, scale.num_routing_texts, split="held_out")
    ]
    rows: list[Any] = list(supervised_rows(examples, text_path))
    rows += list(pretraining_rows(seed, split="held_out", count=max(40, scale.num_documents // 60)))
    collate = SupervisedCollator(text_path.pad_id)
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


def routing_of(seed: Seed, stage: str) -> dict[str, Any]:
    """Expert use of a stage and its drift from SFT, per layer."""
    model = seed.load("rm", seed.reward_model()) if stage == "rm" else load_policy(seed, stage)
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
    """The expert heat map of a stage, for the mirror."""
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
    gold, points = GoldReward(), []
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
