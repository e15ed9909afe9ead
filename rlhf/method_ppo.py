"""`rlhf.train --method ppo`: a policy against a reward model that was measured first."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from moe.errors import UserError
from rlhf.job import (
    Job,
    answer_prompts,
    make_policy,
    sample_prompts,
    save_trained,
)
from rlhf.kl import AdaptiveKL, FixedKL, KLController
from rlhf.method_rm import weakness
from rlhf.options import Config
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reward import (
    ModelReward,
)
from rlhf.scores import PolicyScores, score_policy
from sft.adapt import base_of
from sft.command import refuse_idle
from sft.models import (
    adapted,
    find_model,
    fingerprint_files,
    load_scalar_model,
    lora_spec,
)
from sft.rows import PromptRow, Rows, prompt_rows
from sft.session import (
    before_and_after,
    is_sharded,
    latest,
)
from sft.text import load_tokenizer

EVALUATION_PROMPTS = 64  # held-out prompts that a PPO policy is measured on


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
    weak = weakness(accuracy)
    if weak is None:
        idle = {"allow_weak_reward_model": "for this reward model, which is above chance"}
        refuse_idle(job.parsed, idle)
        assert accuracy is not None
        return f"reward model {folder}: held-out accuracy {accuracy['accuracy']:.3f}", idle
    if not job.config.allow_weak_reward_model:
        raise UserError(f"{weak} Give --allow-weak-reward-model to go on with it.")
    return f"reward model {folder}, allowed: {weak}", {}
