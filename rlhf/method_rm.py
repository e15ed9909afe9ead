"""`rlhf.train --method rm`: a reward model from pairs, measured before and after.

The decision to know: it is measured on its scores as trained, and only then normalised, because
sigma(margin) is a probability of the scores as trained.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import UserError
from rlhf.calibration import RewardReport, measure_reward, told
from rlhf.job import (
    Job,
    asked_spec,
    batches_of,
    pair_rows,
    save_trained,
)
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.reward import (
    RewardNormalization,
    RewardTrainer,
    batch_scores,
    normalize_reward,
    reward_accuracy,
    scalar_model,
)
from sft.adapt import merged
from sft.data import read_examples, use_chosen
from sft.examples import Examples
from sft.models import (
    adapted,
    check_fit,
    describe_size,
    fingerprint_files,
    load_causal_lm,
)
from sft.rows import Rows, SupervisedCollator, SupervisedRow, supervised_rows
from sft.session import (
    latest,
    whole_state,
)

CHANCE = 0.5


def train_reward_model(job: Job) -> None:
    """Bradley-Terry on pairs; the result is `model/`, adapters folded in."""
    config, text_path = job.config, job.text_path
    rows, val_rows, data = pair_rows(job)
    demonstrations = _demonstrations(job)
    language_model: Any = merged(load_causal_lm(job.found))
    check_fit(language_model, text_path, named=config.model)
    torch.manual_seed(config.seed)  # the fresh head
    model: nn.Module = scalar_model(language_model)
    size = describe_size(model)
    balance, idle = job.balance(model)
    settings = job.settings(len(rows), adam_eps=1e-5)
    if config.lora_rank:
        model = adapted(model, asked_spec(job, model), seed=config.seed)
    files = {}
    if config.normalize_data is not None:
        files = {"normalize_data": fingerprint_files([config.normalize_data])}
    with job.session(idle, **files) as session:
        trainer = RewardTrainer(
            model,
            settings,
            loss=BradleyTerryLoss(center_coef=config.center_coef),
            rows=rows,
            collator=job.collator,
            balance=balance,
            freeze_router=config.freeze_router,
            **session.trainer_options(),
        )
        job.header(session, trainer, size=size, data=[*data, *_told_rows(rows, demonstrations)])
        held_out = batches_of(job, val_rows)
        before = reward_accuracy(trainer.model, held_out) if held_out else None
        seconds = session.fit(trainer, resume=config.resume is not None)
        train_batches = batches_of(job, rows)
        report: RewardReport | None = None
        if held_out:
            report = measure_reward(trainer.model, held_out, train_batches=train_batches)
        normalization = _normalize(job, trainer.model, train_batches, demonstrations)
        train_loss = latest(trainer)["train/loss"]
        lines = [f"train loss {train_loss:.4f} (ln 2 is 0.6931)"]
        if before is not None and report is not None:
            session.log(held_out_metrics(report), step=settings.max_steps)
            after = report.accuracy
            pairs = f"{told(after)} on {after.num_pairs} pairs"
            lines += [f"held-out accuracy {before.accuracy:.3f} -> {pairs}", *report.lines()]
        if normalization is not None:
            lines.append(_told_normalization(normalization))
        if weak := weakness(None if report is None else asdict(report.accuracy)):
            lines.append(f"warning: {weak}")
        session.leave(
            {
                "method": "rm",
                "steps": settings.max_steps,
                "train_loss": train_loss,
                "accuracy_before": None if before is None else asdict(before),
                **({"accuracy": None} if report is None else asdict(report)),
                "normalization": None if normalization is None else asdict(normalization),
            },
            samples=[],
            seconds=seconds,
        )
        state = whole_state(trainer)
        save_trained(job, session, merged(trainer.model), lines, state=state)


def held_out_metrics(report: RewardReport) -> dict[str, tuple[float, float]]:
    """What of the report is logged: value and number of pairs."""
    pairs = report.accuracy.num_pairs
    return {
        "preference/accuracy": (report.accuracy.accuracy, pairs),
        "preference/margin": (report.accuracy.margin, pairs),
        "preference/calibration_error": (report.calibration.expected_error, pairs),
        "preference/log_loss": (report.calibration.log_loss, pairs),
    }


# Normalising.


def _demonstrations(job: Job) -> Rows[SupervisedRow] | None:
    """The rows of --normalize-data, read before anything is trained."""
    file = job.config.normalize_data
    if file is None:
        return None
    examples: Examples = read_examples(file)
    if examples.kind == "document":
        raise UserError(
            f"--normalize-data {file} holds plain text: give instructions with their answers, or "
            "preferences (their chosen answers are taken)."
        )
    if examples.kind == "preference":
        examples = use_chosen(examples)
    # One that is cut has no end, and the end is where a score is read.
    found = supervised_rows(examples, job.text_path, drop_long=True)
    return Rows(found, notes=(*examples.notes, *found.notes))


def _told_rows(
    rows: Sequence[Mapping[str, Any]], demonstrations: Rows[SupervisedRow] | None
) -> list[str]:
    lines = []
    if rows and "margin" in rows[0]:
        mean = sum(row["margin"] for row in rows) / len(rows)
        lines.append(f"margins: the chosen score is asked to be ahead by {mean:.3g} on average")
    if demonstrations is not None:
        lines += [f"normalised on {len(demonstrations):,} answers", *demonstrations.notes]
    return lines


def _normalize(
    job: Job,
    model: nn.Module,
    pair_batches: Sequence[Mapping[str, Tensor]],
    demonstrations: Sequence[SupervisedRow] | None,
) -> RewardNormalization | None:
    """Under both answers of the training pairs, or under demonstrations where they are given.

    All of them, in float64; papers draw some hundreds (256 in Ziegler et al. 2019).
    """
    config = job.config
    if config.normalize == "none":
        return None
    batches, source = pair_batches, "both answers of the training pairs"
    if demonstrations is not None:
        assert config.normalize_data is not None
        source = config.normalize_data.name
        collator = SupervisedCollator(job.text_path.pad_id)
        batches = batches_of(job, demonstrations, collator=collator)
    scores = torch.cat(batch_scores(model, batches))
    return normalize_reward(model, scores, mode=config.normalize, source=source)


def _told_normalization(done: RewardNormalization) -> str:
    scale = f" times {done.gain:.4g}" if done.mode == "std" else ""
    goal = "mean 0, deviation 1" if done.mode == "std" else "mean 0"
    return f"scores{scale} {done.shift:+.4g}: {goal} over {done.num_scores} of {done.source}"


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
