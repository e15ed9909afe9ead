"""`rlhf.train --method rm`: a reward model from pairs, measured before and after."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from rlhf.job import (
    Job,
    asked_spec,
    batches_of,
    pair_rows,
    save_trained,
)
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.reward import (
    RewardAccuracy,
    RewardTrainer,
    center_reward,
    reward_accuracy,
    scalar_model,
    sequence_scores,
)
from sft.adapt import merged
from sft.models import (
    adapted,
    check_fit,
    describe_size,
    load_causal_lm,
)
from sft.rows import PreferenceRow
from sft.session import (
    latest,
    whole_state,
)

CHANCE = 0.5


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
        if weak := weakness(None if after is None else asdict(after)):
            lines.append(f"warning: {weak}")
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


def weakness(accuracy: Mapping[str, Any] | None) -> str | None:
    """A sentence about a reward model that PPO should not be given; None for a good one."""
    if accuracy is None:
        return "the reward model's held-out accuracy was never measured: PPO may chase noise."
    if accuracy["low"] > CHANCE:
        return None
    return (
        f"RM accuracy {accuracy['accuracy']:.2f} [{accuracy['low']:.2f}, {accuracy['high']:.2f}] "
        "is not above chance: PPO would chase noise."
    )
