"""`rlhf.train --method ppo` and its kin: a policy against a reward model that was measured."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from moe.errors import UserError
from rlhf.job import (
    Job,
    Policy,
    answer_prompts,
    make_policy,
    sample_prompts,
    save_trained,
)
from rlhf.kl import AdaptiveKL, FixedKL, KLController
from rlhf.method_rm import weakness
from rlhf.options import Config
from rlhf.ppo import PPOTrainer
from rlhf.reward import ModelReward, RewardSource
from rlhf.scores import PolicyScores, score_policy
from sft.adapt import base_of
from sft.command import refuse_idle
from sft.data import read_examples, require
from sft.models import (
    adapted,
    find_model,
    fingerprint_files,
    load_scalar_model,
    lora_spec,
)
from sft.rows import (
    PromptRow,
    Rows,
    SupervisedRow,
    document_rows,
    prompt_rows,
    supervised_rows,
)
from sft.session import (
    Session,
    before_and_after,
    is_sharded,
    latest,
)
from sft.text import load_tokenizer

EVALUATION_PROMPTS = 64  # held-out prompts that a PPO policy is measured on


def train_ppo(job: Job) -> None:
    """PPO, or with the settings of another method that method, against a reward model."""
    config, text_path = job.config, job.text_path
    assert config.reward_model is not None
    if is_sharded():
        raise UserError(
            f"--method {config.method} cannot draw answers from a model that is sharded over "
            "processes: use data parallelism (sft/accelerate/ddp_cpu.yaml, or torchrun)."
        )
    remark, idle = _check_reward_model(job, config.reward_model)
    policy = make_policy(job)
    reward_model = load_scalar_model(config.reward_model).requires_grad_(False)
    reward = ModelReward(model=reward_model.to(job.device), batch_size=job.micro_batch)
    ppo = config.ppo_settings()
    critic = _critic(job, policy) if ppo.has_critic else None
    settings = job.settings(
        len(job.train),
        max_steps=ppo.steps,
        batch_size=ppo.minibatch_size,
        log_steps=config.log_steps or ppo.epochs * ppo.minibatches,
        adam_eps=1e-5,  # 28
        activation_checkpointing=False,  # the loop cannot reach into policy and critic
    )
    if config.activation_checkpointing:
        for model in filter(None, (policy.model, critic)):
            inner: Any = base_of(model)
            inner.activation_checkpointing_enable()
    room = config.max_length - config.max_new_tokens
    rows = prompt_rows(job.train, text_path, max_prompt_length=room)
    texts = _texts(job)
    evaluation = _Evaluation(job, policy, reward=reward, rows=_held_out(job, room))
    with job.session(idle | policy.idle, **_more_fingerprints(config)) as session:
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
            ptx_rows=texts,
            allow_batch_dependent_routing=config.allow_batch_dependent_routing,
            balance=policy.balance,
            freeze_router=config.freeze_router,
            **session.trainer_options(),
        )
        data = [f"{job.train.name}: {len(rows):,} prompts, {len(job.val):,} held out", *rows.notes]
        if texts is not None:
            data += [f"{config.ptx_data}: {len(texts):,} texts mixed in", *texts.notes]
        job.header(session, trainer, size=policy.size, data=[*data, remark])
        before = evaluation.look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after = evaluation.look()
        lines = _leave(session, trainer, evaluation, before=before, after=after, seconds=seconds)
        save_trained(job, session, policy.model, lines)


def _critic(job: Job, policy: Policy) -> nn.Module | None:
    """A copy of the reward model, with the policy's kind of adapters; None for a shared trunk."""
    if job.config.critic == "shared":
        return None
    assert job.config.reward_model is not None
    critic: nn.Module = load_scalar_model(job.config.reward_model)
    if policy.spec is not None:
        parts = lora_spec(critic, rank=policy.spec.rank, alpha=None, targets=("auto",))
        critic = adapted(critic, parts, seed=job.config.seed)
    return critic


def _texts(job: Job) -> Rows[SupervisedRow] | None:
    """The rows of --ptx-data: plain texts in blocks, or conversations whose answers are learned."""
    if job.config.ptx_data is None:
        return None
    examples = read_examples(job.config.ptx_data)
    if examples.kind == "document":
        return document_rows(examples, job.text_path, block=job.config.max_length)
    return supervised_rows(require(examples, "instruction"), job.text_path)


def _held_out(job: Job, room: int) -> Rows[PromptRow]:
    if not len(job.val):
        return Rows([])
    kept = job.val.select(range(min(len(job.val), EVALUATION_PROMPTS)))
    return prompt_rows(kept, job.text_path, max_prompt_length=room)


def _more_fingerprints(config: Config) -> dict[str, str]:
    assert config.reward_model is not None
    found = {"reward_model": fingerprint_files(find_model(config.reward_model).files)}
    if config.ptx_data is not None:
        found["ptx_data"] = fingerprint_files([config.ptx_data])
    return found


class _Evaluation:
    """What the policy is measured by, before and after: held-out prompts, and answers to show."""

    def __init__(
        self, job: Job, policy: Policy, *, reward: RewardSource, rows: Rows[PromptRow]
    ) -> None:
        self.job, self.policy, self.reward, self.rows = job, policy, reward, rows
        self.prompts, origin = sample_prompts(job)
        self.origin = origin if self.prompts else None

    def look(self) -> tuple[PolicyScores | None, list[str]]:
        """Scores on the held-out prompts, None without any, and the answers."""
        job, scores = self.job, None
        if self.rows:
            scores = score_policy(
                self.policy.model,
                self.policy.reference,
                reward=self.reward,
                rows=self.rows,
                text_path=job.text_path,
                max_new_tokens=job.config.max_new_tokens,
                temperature=job.config.temperature,
                seed=job.config.seed,
                device=job.device,
            )
        return scores, answer_prompts(job, self.policy.model, self.prompts)


def _leave(
    session: Session,
    trainer: PPOTrainer,
    evaluation: _Evaluation,
    *,
    before: tuple[PolicyScores | None, list[str]],
    after: tuple[PolicyScores | None, list[str]],
    seconds: float,
) -> list[str]:
    """Write the run's summary and samples; the lines that tell of them."""
    last = latest(trainer)
    steps, skipped = trainer.settings.max_steps, trainer.brake.skipped_steps
    (scores_before, texts_before), (scores_after, texts_after) = before, after
    if scores_after is not None:
        names = ("reward", "kl", "length", "entropy", "ended")
        found = {f"eval/{n}": (getattr(scores_after, n), scores_after.num_prompts) for n in names}
        session.log(found, step=steps)
    session.leave(
        {
            "method": evaluation.job.config.method,
            "steps": steps,
            **({"skipped_steps": skipped} if trainer.brake.is_on else {}),
            "tokens_generated": trainer.tokens_generated,
            "last_update": {
                "reward": last["reward/score"],
                "kl": last["policy/kl_sequence"],
                "length": last["rollout/length"],
                "entropy": last["policy/entropy"],
            },
            "before": None if scores_before is None else asdict(scores_before),
            "after": None if scores_after is None else asdict(scores_after),
            "samples_from": evaluation.origin,
        },
        samples=before_and_after(evaluation.prompts, texts_before, texts_after),
        seconds=seconds,
    )
    lines = [
        f"last update: reward {last['reward/score']:+.4f}, "
        f"KL {last['policy/kl_sequence']:.4f}, length {last['rollout/length']:.1f}, "
        f"entropy {last['policy/entropy']:.3f}"
    ]
    if trainer.brake.is_on:
        lines.append(f"{skipped} of {steps} steps were left out (--target-kl, --ratio-threshold)")
    if scores_before is not None and scores_after is not None:
        one, two = scores_before, scores_after
        lines.append(
            f"on {two.num_prompts} held-out prompts: reward {one.reward:+.4f} -> "
            f"{two.reward:+.4f}, KL {two.kl:.4f} nats, length {one.length:.1f} -> "
            f"{two.length:.1f}, entropy {one.entropy:.3f} -> {two.entropy:.3f}"
        )
    return lines


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
