"""What the methods of `python -m rlhf.train` start from: options, rows, a policy and its reference.

The decision to know: the reference follows from the model folder. A LoRA run's policy is a copy of
its adapter and the adapter itself, frozen, is the reference; with --lora-rank on a plain model it
is the base with adapters off; a full update is measured from a frozen copy.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from rlhf.options import COMMAND, Config
from rlhf.reference import FrozenAdapter, FrozenCopy, NoReference, Reference
from sft.adapt import LoraSpec, adapter_spec, copy_adapter, describe_trainable
from sft.command import in_force, refuse_idle
from sft.examples import Examples
from sft.flags import Parsed
from sft.models import (
    POLICY_ADAPTER,
    SFT_ADAPTER,
    ModelFolder,
    adapted,
    check_fit,
    describe_size,
    fingerprint_files,
    fingerprint_tokenizer,
    load_causal_lm,
    lora_spec,
    save_policy,
)
from sft.rows import (
    PreferenceCollator,
    PreferenceRow,
    PromptRow,
    Rows,
    preference_rows,
    prompt_rows,
)
from sft.session import (
    Session,
    answers,
    balance_policy,
    describe_balance,
    describe_device,
    describe_log,
    first_prompts,
    open_session,
    train_settings,
)
from sft.settings import BalancePolicy, TrainSettings
from sft.text import TextPath
from sft.trainer import StageTrainer

EVALUATION_ROWS = 64  # of a forward pass without gradients


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


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A policy at its start, what it is measured from, and how it is balanced."""

    model: nn.Module
    reference: Reference
    size: str
    spec: LoraSpec | None
    balance: BalancePolicy
    idle: dict[str, str]


def make_policy(job: Job, *, measured: bool = True) -> Policy:
    """The policy at its start; without `measured` no frozen copy is kept to measure from."""
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
        spec = asked_spec(job, model)
        model = adapted(model, spec, seed=config.seed)
        reference = FrozenAdapter(model, None)
    elif not measured:
        reference = NoReference()
    else:
        frozen = FrozenCopy(model)
        frozen.model.to(job.device)
        reference = frozen
    return Policy(
        model=model, reference=reference, size=size, spec=spec, balance=balance, idle=idle
    )


def asked_spec(job: Job, model: nn.Module) -> LoraSpec:
    config = job.config
    return lora_spec(
        model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_targets
    )


def pair_rows(job: Job) -> tuple[Rows[PreferenceRow], Rows[PreferenceRow], list[str]]:
    """(training, held-out) rows, and the lines that tell of them."""
    train = preference_rows(job.train, job.text_path)
    val = preference_rows(job.val, job.text_path) if len(job.val) else Rows[PreferenceRow]([])
    head = (
        f"{job.train.name} ({job.train.format}): {len(job.train) + len(job.val):,} pairs, split "
        f"{len(train):,} / {len(val):,} by prompt"
    )
    return train, val, [head, *dict.fromkeys((*job.train.notes, *train.notes))]


def batches_of(
    job: Job,
    rows: Sequence[Any],
    *,
    collator: Callable[[Sequence[Any]], dict[str, Tensor]] | None = None,
) -> list[dict[str, Tensor]]:
    """Rows (pairs, or what the collator takes) as batches on the device, without gradients."""
    size, collate = job.micro_batch, collator or job.collator
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    return [{name: x.to(job.device) for name, x in batch.items()} for batch in batches]


def save_trained(
    job: Job, session: Session, policy: nn.Module, lines: Sequence[str], *, state: Any = None
) -> None:
    """Write the policy and say how it went and where it is."""
    where = session.run.folder
    if session.first:
        where = save_policy(policy, job.text_path, where, base=job.found.base, state=state)
    session.conclude(lines, where=where)


def sample_prompts(job: Job) -> tuple[Sequence[PromptRow], str]:
    chosen, origin = first_prompts(job.val, job.train, count=job.config.num_samples)
    if not len(chosen):
        return [], origin
    room = max(1, job.config.max_length - job.config.max_new_tokens)
    return prompt_rows(chosen, job.text_path, max_prompt_length=room), origin


def answer_prompts(job: Job, model: nn.Module, prompts: Sequence[PromptRow]) -> list[str]:
    return answers(
        model,
        prompts,
        job.text_path,
        max_new_tokens=job.config.max_new_tokens,
        device=job.device,
    )
