"""The work of `python -m rlhf.train`: one function for each method.

Each makes its trainer, measures held-out rows before and after, and leaves a run that the next
command can open: a reward model for PPO, a policy for anything that takes a model folder.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.errors import UserError
from rlhf.dpo import DPOTrainer, SelfCheckFailed
from rlhf.job import (
    Job,
    answer_prompts,
    asked_spec,
    batches_of,
    make_policy,
    pair_rows,
    sample_prompts,
    save_trained,
)
from rlhf.kl import AdaptiveKL, FixedKL, KLController
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.options import Config
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reward import (
    ModelReward,
    RewardAccuracy,
    RewardTrainer,
    center_reward,
    reward_accuracy,
    scalar_model,
    sequence_scores,
)
from rlhf.scores import PairScores, PolicyScores, score_pairs, score_policy
from sft.adapt import base_of, merged
from sft.command import refuse_idle
from sft.data import read_examples, require, split_by_prompt
from sft.flags import Parsed
from sft.models import (
    adapted,
    check_fit,
    describe_size,
    find_model,
    fingerprint_files,
    load_causal_lm,
    load_scalar_model,
    lora_spec,
    tokenizer_of,
)
from sft.rows import PreferenceRow, PromptRow, Rows, prompt_rows
from sft.session import (
    Stopped,
    already_finished,
    before_and_after,
    is_sharded,
    join_processes,
    latest,
    leave_processes,
    whole_state,
)
from sft.text import TextPath, load_tokenizer, pick_template

EVALUATION_PROMPTS = 64  # held-out prompts that a PPO policy is measured on
CHANCE = 0.5


def train(parsed: Parsed[Config]) -> int:
    """Run the command; returns its exit code."""
    config = parsed.config
    if already_finished(config):
        return 0
    state = join_processes()
    examples = read_examples(config.data, columns=config.column_names)
    if config.method != "ppo":
        require(examples, "preference")
    found = find_model(config.model)
    tokenizer = tokenizer_of(found, config.tokenizer)
    text_path = TextPath(
        tokenizer,
        pick_template(tokenizer, config.template or found.template),
        max_length=config.max_length,
    )
    train_side, val = split_by_prompt(examples, val_fraction=config.val_set_size, seed=config.seed)
    job = Job(
        parsed=parsed,
        config=replace(config, template=text_path.template.name),
        state=state,
        found=found,
        text_path=text_path,
        train=train_side,
        val=val,
    )
    methods: dict[str, Callable[[Job], None]] = {
        "rm": train_reward_model,
        "dpo": train_dpo,
        "ppo": train_ppo,
    }
    try:
        methods[config.method](job)
    except SelfCheckFailed as error:
        raise Stopped(str(error)) from error
    leave_processes(state)
    return 0


# The reward model.


def train_reward_model(job: Job) -> None:
    """Bradley-Terry on pairs; the result is `model/`, adapters folded in."""
    config, text_path = job.config, job.text_path
    rows, val_rows, data = pair_rows(job)
    language_model: Any = merged(load_causal_lm(job.found))
    check_fit(language_model, text_path, named=config.model)
    torch.manual_seed(config.seed)  # the fresh head
    model: nn.Module = scalar_model(language_model)
    size = describe_size(model)
    balance, idle = job.balance(model)
    settings = job.settings(len(rows))
    if config.lora_rank:
        model = adapted(model, asked_spec(job, model), seed=config.seed)
    with job.session(idle) as session:
        trainer = RewardTrainer(
            model,
            settings,
            loss=BradleyTerryLoss(center_coef=config.center_coef),
            rows=rows,
            collator=job.collator,
            balance=balance,
            **session.trainer_options(),
        )
        job.header(session, trainer, size=size, data=data)
        held_out = batches_of(job, val_rows)
        before = reward_accuracy(trainer.model, held_out) if held_out else None
        seconds = session.fit(trainer, resume=config.resume is not None)
        after = reward_accuracy(trainer.model, held_out) if held_out else None
        shift = _center(job, trainer.model, rows) if config.center else 0.0
        train_loss = latest(trainer)["train/loss"]
        lines = [f"train loss {train_loss:.4f} (ln 2 is 0.6931)"]
        if before is not None and after is not None:
            session.log(
                {
                    "preference/accuracy": (after.accuracy, after.num_pairs),
                    "preference/margin": (after.margin, after.num_pairs),
                },
                step=settings.max_steps,
            )
            lines += [f"held-out accuracy {before.accuracy:.3f} -> {_told(after)}"]
        if weakness := _weakness(None if after is None else asdict(after)):
            lines.append(f"warning: {weakness}")
        session.leave(
            {
                "method": "rm",
                "steps": settings.max_steps,
                "train_loss": train_loss,
                "accuracy_before": None if before is None else asdict(before),
                "accuracy": None if after is None else asdict(after),
                "shift": shift,
            },
            samples=[],
            seconds=seconds,
        )
        state = whole_state(trainer)
        save_trained(job, session, merged(trainer.model), lines, state=state)


def _center(job: Job, model: nn.Module, rows: Sequence[PreferenceRow]) -> float:
    """Shift the head so that both sides of the training pairs have mean 0; the shift."""
    model.eval()
    with torch.no_grad():
        scores = [
            sequence_scores(model, batch["input_ids"], batch["attention_mask"])
            for batch in batches_of(job, rows)
        ]
    return center_reward(model, torch.cat(scores))


def _told(accuracy: RewardAccuracy) -> str:
    return (
        f"{accuracy.accuracy:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}] on "
        f"{accuracy.num_pairs} pairs"
    )


def _weakness(accuracy: Mapping[str, Any] | None) -> str | None:
    """A sentence about a reward model that PPO should not be given; None for a good one."""
    if accuracy is None:
        return "the reward model's held-out accuracy was never measured: PPO may chase noise."
    if accuracy["low"] > CHANCE:
        return None
    return (
        f"RM accuracy {accuracy['accuracy']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] "
        "is not above chance: PPO would chase noise."
    )


# DPO.


def train_dpo(job: Job) -> None:
    """Direct preference optimisation of a policy on pairs."""
    config = job.config
    rows, val_rows, data = pair_rows(job)
    policy = make_policy(job)
    loss = DPOLoss(beta=config.beta, label_smoothing=config.label_smoothing)
    settings = job.settings(len(rows))
    with job.session(policy.idle) as session:
        trainer = DPOTrainer(
            policy.model,
            settings,
            reference=policy.reference,
            loss=loss,
            rows=rows,
            collator=job.collator,
            balance=policy.balance,
            **session.trainer_options(),
        )
        job.header(session, trainer, size=policy.size, data=data)
        prompts, origin = sample_prompts(job)
        held_out = batches_of(job, val_rows)

        def look() -> tuple[PairScores | None, list[str]]:
            scores = None
            if held_out:
                scores = score_pairs(policy.model, policy.reference, loss, batches=held_out)
            return scores, answer_prompts(job, policy.model, prompts)

        before, texts_before = look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after, texts_after = look()
        last = latest(trainer)
        lines = [f"train loss {last['train/loss']:.4f} (ln 2 is 0.6931 at the reference)"]
        if before is not None and after is not None:
            lines.append(
                f"held-out margin {before.margin:+.4f} -> {after.margin:+.4f}, accuracy "
                f"{before.accuracy:.3f} -> {after.accuracy:.3f} on {after.num_pairs} pairs "
                "(ties count half)"
            )
            session.log(
                {
                    "preference/margin": (after.margin, after.num_pairs),
                    "preference/accuracy": (after.accuracy, after.num_pairs),
                },
                step=settings.max_steps,
            )
        session.leave(
            {
                "method": "dpo",
                "steps": settings.max_steps,
                "train_loss": last["train/loss"],
                "before": None if before is None else asdict(before),
                "after": None if after is None else asdict(after),
                "samples_from": origin if prompts else None,
            },
            samples=before_and_after(prompts, texts_before, texts_after),
            seconds=seconds,
        )
        save_trained(job, session, policy.model, lines, state=whole_state(trainer))


# PPO.


def train_ppo(job: Job) -> None:
    """Proximal policy optimisation against a reward model; the critic starts as its copy."""
    config, text_path = job.config, job.text_path
    assert config.reward_model is not None
    if is_sharded():
        raise UserError(
            "--method ppo cannot draw answers from a model that is sharded over processes: use "
            "data parallelism (sft/accelerate/ddp_cpu.yaml, or torchrun)."
        )
    remark, idle = _check_reward_model(job, config.reward_model)
    policy = make_policy(job)
    reward_model = load_scalar_model(config.reward_model).requires_grad_(False)
    reward = ModelReward(model=reward_model.to(job.device), batch_size=job.micro_batch)
    critic: nn.Module = load_scalar_model(config.reward_model)
    if policy.spec is not None:
        parts = lora_spec(critic, rank=policy.spec.rank, alpha=None, targets=("auto",))
        critic = adapted(critic, parts, seed=config.seed)
    ppo = _ppo_settings(config)
    settings = job.settings(
        len(job.train),
        max_steps=ppo.steps,
        batch_size=ppo.minibatch_size,
        log_steps=config.log_steps or ppo.epochs * ppo.minibatches,
        adam_eps=1e-5,
        activation_checkpointing=False,  # the loop cannot reach into policy and critic
    )
    if config.activation_checkpointing:
        for model in (policy.model, critic):
            inner: Any = base_of(model)
            inner.activation_checkpointing_enable()
    room = config.max_length - config.max_new_tokens
    rows = prompt_rows(job.train, text_path, max_prompt_length=room)
    val_rows = Rows[PromptRow]([])
    if len(job.val):
        kept = job.val.select(range(min(len(job.val), EVALUATION_PROMPTS)))
        val_rows = prompt_rows(kept, text_path, max_prompt_length=room)
    reward_files = find_model(config.reward_model).files
    idle |= policy.idle
    with job.session(idle, reward_model=fingerprint_files(reward_files)) as session:
        trainer = PPOTrainer(
            policy.model,
            settings,
            critic=critic,
            reference=policy.reference,
            reward=reward,
            rows=rows,
            ppo=ppo,
            kl_controller=_kl_controller(config),
            pad_id=text_path.pad_id,
            stop_ids=text_path.stop_ids,
            balance=policy.balance,
            **session.trainer_options(),
        )
        data = [f"{job.train.name}: {len(rows):,} prompts, {len(job.val):,} held out", *rows.notes]
        job.header(session, trainer, size=policy.size, data=[*data, remark])
        prompts, origin = sample_prompts(job)

        def look() -> tuple[PolicyScores | None, list[str]]:
            scores = None
            if val_rows:
                scores = score_policy(
                    policy.model,
                    policy.reference,
                    reward=reward,
                    rows=val_rows,
                    text_path=text_path,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    seed=config.seed,
                    device=job.device,
                )
            return scores, answer_prompts(job, policy.model, prompts)

        before, texts_before = look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after, texts_after = look()
        last = latest(trainer)
        lines = [
            f"last update: reward {last['reward/score']:+.4f}, "
            f"KL {last['policy/kl_sequence']:.4f}, length {last['rollout/length']:.1f}, "
            f"entropy {last['policy/entropy']:.3f}"
        ]
        if before is not None and after is not None:
            lines.append(
                f"on {after.num_prompts} held-out prompts: reward {before.reward:+.4f} -> "
                f"{after.reward:+.4f}, KL {after.kl:.4f} nats, length {before.length:.1f} -> "
                f"{after.length:.1f}, entropy {before.entropy:.3f} -> {after.entropy:.3f}"
            )
            names = ("reward", "kl", "length", "entropy", "ended")
            session.log(
                {f"eval/{n}": (getattr(after, n), after.num_prompts) for n in names},
                step=settings.max_steps,
            )
        session.leave(
            {
                "method": "ppo",
                "steps": settings.max_steps,
                "tokens_generated": trainer.tokens_generated,
                "last_update": {
                    "reward": last["reward/score"],
                    "kl": last["policy/kl_sequence"],
                    "length": last["rollout/length"],
                    "entropy": last["policy/entropy"],
                },
                "before": None if before is None else asdict(before),
                "after": None if after is None else asdict(after),
                "samples_from": origin if prompts else None,
            },
            samples=before_and_after(prompts, texts_before, texts_after),
            seconds=seconds,
        )
        save_trained(job, session, policy.model, lines)


def _ppo_settings(config: Config) -> PPOSettings:
    return PPOSettings(
        updates=config.updates,
        episodes=config.episodes,
        epochs=config.ppo_epochs,
        minibatches=config.minibatches,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        gamma=config.gamma,
        lam=config.lam,
        clip=config.clip,
        value_clip=config.value_clip,
        value_coef=config.value_coef,
        entropy_coef=config.entropy_coef,
        whiten_rewards=config.whiten_rewards,
        whiten_advantages=config.whiten_advantages,
        missing_eos_penalty=config.missing_eos_penalty,
        score_clip=config.score_clip,
        critic_lr_scale=config.critic_lr_scale,
    )


def _kl_controller(config: Config) -> KLController:
    if config.kl_target is None:
        return FixedKL(config.kl_coef)
    return AdaptiveKL(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)


def _check_reward_model(job: Job, folder: Path) -> tuple[str, dict[str, str]]:
    """What is said of the reward model, and the option that is idle with a good one.

    Raises UserError for one that PPO should not follow.
    """
    found = find_model(folder)
    if load_tokenizer(found.tokenizer).get_vocab() != job.text_path.tokenizer.get_vocab():
        raise UserError(
            f"The reward model {folder} has another vocabulary than {job.config.model}: its scores "
            "would be of other texts. Train it on the same model."
        )
    summary = folder / "summary.json"
    accuracy = None
    if summary.is_file():
        accuracy = json.loads(summary.read_text(encoding="utf-8")).get("accuracy")
    weakness = _weakness(accuracy)
    if weakness is None:
        idle = {"allow_weak_reward_model": "for this reward model, which is above chance"}
        refuse_idle(job.parsed, idle)
        assert accuracy is not None
        return f"reward model {folder}: held-out accuracy {accuracy['accuracy']:.3f}", idle
    if not job.config.allow_weak_reward_model:
        raise UserError(f"{weakness} Give --allow-weak-reward-model to go on with it.")
    return f"reward model {folder}, allowed: {weakness}", {}
