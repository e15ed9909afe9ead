"""The work of `python -m rlhf.train`: one function for each method, on what they share.

The decision to know: the reference follows from the model folder. A LoRA run's policy is a copy of
its adapter and the adapter itself, frozen, is the reference; with --lora-rank on a plain model it
is the base with adapters off; a full update is measured from a frozen copy.

Shapes: B rows, R response.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from moe.errors import UserError
from moe.generation import sample
from rlhf import kl
from rlhf.dpo import DPOTrainer, pair_logps
from rlhf.kl import AdaptiveKL, FixedKL, KLController
from rlhf.logprobs import entropy, response_logps, token_logps
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.ppo import PPOSettings, PPOTrainer, response_logits
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import (
    ModelReward,
    RewardAccuracy,
    RewardTrainer,
    center_reward,
    reward_accuracy,
    scalar_model,
    sequence_scores,
)
from rlhf.train import COMMAND, Config
from sft.adapt import (
    LoraSpec,
    adapter_spec,
    base_of,
    copy_adapter,
    describe_trainable,
    merged,
)
from sft.command import in_force, refuse_idle
from sft.data import (
    Examples,
    PreferenceCollator,
    PreferenceRow,
    PromptRow,
    Rows,
    preference_rows,
    prompt_rows,
    read_examples,
    require,
    split_by_prompt,
)
from sft.flags import Parsed
from sft.models import (
    POLICY_ADAPTER,
    SFT_ADAPTER,
    ModelFolder,
    adapted,
    check_fit,
    describe_size,
    find_model,
    fingerprint_files,
    fingerprint_tokenizer,
    load_causal_lm,
    load_scalar_model,
    lora_spec,
    save_policy,
    tokenizer_of,
)
from sft.session import (
    Session,
    already_finished,
    answers,
    balance_policy,
    before_and_after,
    describe_balance,
    describe_device,
    describe_log,
    first_prompts,
    join_processes,
    leave_processes,
    open_session,
    train_settings,
)
from sft.text import TextPath, load_tokenizer, pad_batch, pick_template
from sft.trainer import BalancePolicy, StageTrainer, TrainSettings

EVALUATION_ROWS = 64  # of a forward pass without gradients
EVALUATION_PROMPTS = 64  # held-out prompts that a PPO policy is measured on
CHANCE = 0.5


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every method starts from."""

    parsed: Parsed[Config]
    config: Config
    state: PartialState
    found: ModelFolder
    text_path: TextPath
    train: Examples
    val: Examples

    @property
    def micro_batch(self) -> int:
        return self.config.batch_size_per_device or EVALUATION_ROWS

    @property
    def collator(self) -> PreferenceCollator:
        return PreferenceCollator(self.text_path.pad_id)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.state.device
        return device

    def settings(self, num_rows: int, **fixed: Any) -> TrainSettings:
        fixed = {"log_steps": self.config.log_steps or 10} | fixed
        return train_settings(self.config, num_rows=num_rows, state=self.state, **fixed)

    def balance(self, model: nn.Module) -> tuple[BalancePolicy, dict[str, str]]:
        """Raises UserError when a balance option was given to a model without a router."""
        policy, idle = balance_policy(self.config, model)
        refuse_idle(self.parsed, idle)
        return policy, idle

    def session(
        self, idle: Mapping[str, str], **more_fingerprints: str
    ) -> AbstractContextManager[Session]:
        config = self.config
        return open_session(
            config,
            in_force(config, {**config.idle(), **idle}),
            experiment=config.method,
            stage=config.method,
            command=COMMAND,
            state=self.state,
            fingerprints={
                "data": fingerprint_files([config.data]),
                "tokenizer": fingerprint_tokenizer(self.text_path.tokenizer),
                "model": fingerprint_files(self.found.files),
                **more_fingerprints,
            },
        )

    def header(
        self, session: Session, trainer: StageTrainer, *, size: str, data: list[str]
    ) -> None:
        settings = trainer.settings
        first, *rest = data
        session.display.header(
            f"{self.config.method}  {session.run.folder}",
            [
                ("model", f"{self.config.model}: {size}"),
                ("train", describe_trainable(trainer.model).removeprefix("trainable: ")),
                ("", f"{settings.max_steps} steps of {settings.batch_size}, lr {settings.lr:g}"),
                ("data", first),
                *(("", line) for line in rest),
                ("balance", describe_balance(trainer.balance, trainer.routed_part)),
                ("device", describe_device(self.state)),
                ("log", describe_log(session)),
            ],
        )


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
    methods[config.method](job)
    leave_processes(state)
    return 0


# What the policies share.


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy at its start, what it is measured from, and how it is balanced."""

    model: nn.Module
    reference: Reference
    size: str
    spec: LoraSpec | None
    balance: BalancePolicy
    idle: dict[str, str]


def make_policy(job: Job) -> Policy:
    config = job.config
    model = load_causal_lm(job.found)
    check_fit(model, job.text_path, named=config.model)
    size = describe_size(model)
    balance, idle = job.balance(model)
    spec: LoraSpec | None = None
    reference: Reference
    if job.found.adapter is not None:
        reason = "with a LoRA run: the policy is a copy of its adapter"
        own = dict.fromkeys(("lora_rank", "lora_alpha", "lora_targets"), reason)
        refuse_idle(job.parsed, own)
        spec, idle = adapter_spec(model, SFT_ADAPTER), idle | own
        copy_adapter(model, SFT_ADAPTER, name=POLICY_ADAPTER)
        reference = FrozenAdapter(model, SFT_ADAPTER)
    elif config.lora_rank:
        spec = _spec(job, model)
        model = adapted(model, spec, seed=config.seed)
        reference = FrozenAdapter(model, None)
    else:
        frozen = FrozenCopy(model)
        frozen.model.to(job.device)
        reference = frozen
    return Policy(
        model=model, reference=reference, size=size, spec=spec, balance=balance, idle=idle
    )


def _spec(job: Job, model: nn.Module) -> LoraSpec:
    config = job.config
    return lora_spec(
        model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets
    )


def _pair_rows(job: Job) -> tuple[Rows[PreferenceRow], Rows[PreferenceRow], list[str]]:
    """(training, held-out) rows, and the lines that tell of them."""
    train = preference_rows(job.train, job.text_path)
    val = preference_rows(job.val, job.text_path) if len(job.val) else Rows[PreferenceRow]([])
    head = (
        f"{job.train.name} ({job.train.format}): {len(job.train) + len(job.val):,} pairs, split "
        f"{len(train):,} / {len(val):,} by prompt"
    )
    return train, val, [head, *dict.fromkeys((*job.train.notes, *train.notes))]


def _batches(job: Job, rows: Sequence[PreferenceRow]) -> list[dict[str, Tensor]]:
    """Rows as batches on the device, for a pass without gradients."""
    size = job.micro_batch
    batches = [job.collator(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [{name: x.to(job.device) for name, x in batch.items()} for batch in batches]


# The reward model.


def train_reward_model(job: Job) -> None:
    """Bradley-Terry on pairs; the result is `model/`, adapters folded in."""
    config, text_path = job.config, job.text_path
    rows, val_rows, data = _pair_rows(job)
    language_model: Any = merged(load_causal_lm(job.found))
    check_fit(language_model, text_path, named=config.model)
    torch.manual_seed(config.seed)  # the fresh head
    model: nn.Module = scalar_model(language_model)
    size = describe_size(model)
    balance, idle = job.balance(model)
    settings = job.settings(len(rows))
    if config.lora_rank:
        model = adapted(model, _spec(job, model), seed=config.seed)
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
        held_out = _batches(job, val_rows)
        before = reward_accuracy(trainer.model, held_out) if held_out else None
        seconds = session.fit(trainer, resume=config.resume is not None)
        after = reward_accuracy(trainer.model, held_out) if held_out else None
        shift = _center(job, trainer.model, rows) if config.center else 0.0
        lines = [f"train loss {trainer.state.log_history[-1]['train/loss']:.4f} (ln 2 is 0.6931)"]
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
                "train_loss": trainer.state.log_history[-1]["train/loss"],
                "accuracy_before": None if before is None else asdict(before),
                "accuracy": None if after is None else asdict(after),
                "shift": shift,
            },
            samples=[],
            seconds=seconds,
        )
        where = session.run.folder
        if session.first:
            where = save_policy(merged(trainer.model), text_path, session.run.folder)
        session.conclude(lines, where=where)


def _center(job: Job, model: nn.Module, rows: Sequence[PreferenceRow]) -> float:
    """Shift the head so that both sides of the training pairs have mean 0; the shift."""
    model.eval()
    with torch.no_grad():
        scores = [
            sequence_scores(model, batch["input_ids"], batch["attention_mask"])
            for batch in _batches(job, rows)
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


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """Means over held-out pairs: loss, margin of implicit rewards, share of pairs it gets right."""

    loss: float
    margin: float
    accuracy: float
    num_pairs: int


@torch.no_grad()
def score_pairs(
    policy: nn.Module, reference: Reference, loss: DPOLoss, *, batches: Sequence[dict[str, Tensor]]
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


def train_dpo(job: Job) -> None:
    """Direct preference optimisation of a policy on pairs."""
    config = job.config
    rows, val_rows, data = _pair_rows(job)
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
        prompts, origin = _sample_prompts(job)
        held_out = _batches(job, val_rows)

        def look() -> tuple[PairScores | None, list[str]]:
            scores = None
            if held_out:
                scores = score_pairs(policy.model, policy.reference, loss, batches=held_out)
            return scores, _answers(job, policy.model, prompts)

        before, texts_before = look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after, texts_after = look()
        last = trainer.state.log_history[-1]
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
        _save(job, session, policy.model, lines)


def _save(job: Job, session: Session, policy: nn.Module, lines: Sequence[str]) -> None:
    where = session.run.folder
    if session.first:
        where = save_policy(policy, job.text_path, where, base=job.found.base)
    session.conclude(lines, where=where)


def _sample_prompts(job: Job) -> tuple[Sequence[PromptRow], str]:
    chosen, origin = first_prompts(job.val, job.train, count=job.config.num_samples)
    if not len(chosen):
        return [], origin
    room = max(1, job.config.max_length - job.config.max_new_tokens)
    return prompt_rows(chosen, job.text_path, max_prompt_length=room), origin


def _answers(job: Job, model: nn.Module, prompts: Sequence[PromptRow]) -> list[str]:
    return answers(
        model,
        prompts,
        job.text_path,
        max_new_tokens=job.config.max_new_tokens,
        device=job.device,
    )


# PPO.


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
    job: Job, policy: nn.Module, reference: Reference, reward: ModelReward, rows: Rows[PromptRow]
) -> PolicyScores:
    """Draw one answer to each prompt, with the same random numbers every time, and measure it."""
    config, text_path = job.config, job.text_path
    prompt_BP, mask_BP = pad_batch(
        [row["prompt_ids"] for row in rows], pad_id=text_path.pad_id, side="left"
    )
    rollout = sample(
        policy,
        prompt_BP.to(job.device),
        prompt_mask_BP=mask_BP.to(job.device),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=text_path.stop_ids,
        seed=config.seed,
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
        logp = token_logps(logits, ids[:, -length - 1 :], temperature=config.temperature)
        return response_logps(logp[:, 1:], rollout.mask_BR)

    logits = logits_of(policy)
    with reference.lend() as frozen:
        reference_logp_BR = logp_of(logits_of(frozen))
    kl_B = kl.k1(logp_of(logits), reference_logp_BR).double().sum(dim=1)
    entropy_BR = response_logps(
        entropy(logits, temperature=config.temperature)[:, 1:], rollout.mask_BR
    )
    policy.train(was_training)
    return PolicyScores(
        reward=float(reward(ids, mask).double().mean()),
        kl=float(kl_B.mean()),
        length=rollout.num_tokens / len(rows),
        entropy=float(entropy_BR.double().sum()) / rollout.num_tokens,
        ended=float(rollout.ended_B.double().mean()),
        num_prompts=len(rows),
    )


def train_ppo(job: Job) -> None:
    """Proximal policy optimisation against a reward model; the critic starts as its copy."""
    config, text_path = job.config, job.text_path
    assert config.reward_model is not None
    remark = _check_reward_model(job, config.reward_model)
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
    with job.session(policy.idle, reward_model=fingerprint_files(reward_files)) as session:
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
        job.header(session, trainer, size=policy.size, data=[*data, *remark])
        prompts, origin = _sample_prompts(job)

        def look() -> tuple[PolicyScores | None, list[str]]:
            scores = None
            if val_rows:
                scores = score_policy(job, policy.model, policy.reference, reward, val_rows)
            return scores, _answers(job, policy.model, prompts)

        before, texts_before = look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after, texts_after = look()
        last = trainer.state.log_history[-1]
        lines = [
            f"last update: reward {last['reward/score']:+.4f}, "
            f"KL {last['policy/kl_sequence']:.4f}, length {last['rollout/length']:.1f}, entropy {last['policy/entropy']:.3f}"
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
        _save(job, session, policy.model, lines)


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


def _check_reward_model(job: Job, folder: Path) -> list[str]:
    """What is said of the reward model; raises UserError for one that PPO should not follow."""
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
        refuse_idle(
            job.parsed, {"allow_weak_reward_model": "for this reward model, which is above chance"}
        )
        assert accuracy is not None
        return [f"reward model {folder}: held-out accuracy {accuracy['accuracy']:.3f}"]
    if not job.config.allow_weak_reward_model:
        raise UserError(f"{weakness} Give --allow-weak-reward-model to go on with it.")
    return [f"reward model {folder}, allowed: {weakness}"]
