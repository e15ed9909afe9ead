"""`rlhf.train --method kto`: a policy from answers judged one by one, or from both of each pair."""

from dataclasses import asdict

from moe.errors import UserError
from rlhf.job import (
    Job,
    answer_prompts,
    batches_of,
    make_policy,
    sample_prompts,
    save_trained,
)
from rlhf.kto import KTOTrainer
from rlhf.losses.kto import KTOLoss
from rlhf.options import Config
from rlhf.scores import AnswerScores, score_answers
from sft.data import rows_of_type
from sft.examples import Preference
from sft.rows import Rows
from sft.session import (
    before_and_after,
    latest,
    whole_state,
)
from sft.unpaired import UnpairedCollator, UnpairedRow, unpaired_rows


def judged_loss(config: Config) -> KTOLoss:
    """KTO with the command's options; without --beta, the loss's own."""
    beta = {} if config.beta is None else {"beta": config.beta}
    return KTOLoss(
        **beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )


def judged_rows(job: Job) -> tuple[Rows[UnpairedRow], Rows[UnpairedRow], list[str]]:
    """(training, held-out) rows, and the lines that tell of them."""
    train = unpaired_rows(job.train, job.text_path)
    val = Rows[UnpairedRow]([])
    notes = [*job.train.notes, *train.notes]
    if len(job.val):
        try:
            val = unpaired_rows(job.val, job.text_path)
        except UserError as error:
            notes.append(
                f"{len(job.val)} held-out examples are not measured ({error} Or give a larger "
                "--val-set-size, or 0)"
            )
    if job.train.kind == "preference" and any(
        pair.margin is not None for pair in rows_of_type(Preference, job.train)
    ):
        notes.append("the margins are not used: KTO's loss has none")
    good = sum(row["is_good"] for row in train)
    head = (
        f"{job.train.name} ({job.train.format}): {len(train) + len(val):,} judged answers, split "
        f"{len(train):,} / {len(val):,} by prompt; {good:,} good, {len(train) - good:,} bad"
    )
    return train, val, [head, *dict.fromkeys(notes)]


def train_kto(job: Job) -> None:
    """Kahneman-Tversky optimisation of a policy on judged answers."""
    config = job.config
    loss = judged_loss(config)
    rows, val_rows, data = judged_rows(job)
    collator = UnpairedCollator(job.text_path.pad_id)
    policy = make_policy(job)
    settings = job.settings(len(rows))
    with job.session(policy.idle) as session:
        trainer = KTOTrainer(
            policy.model,
            settings,
            reference=policy.reference,
            loss=loss,
            rows=rows,
            collator=collator,
            allow_batch_dependent_routing=config.allow_batch_dependent_routing,
            balance=policy.balance,
            freeze_router=config.freeze_router,
            **session.trainer_options(),
        )
        job.header(session, trainer, size=policy.size, data=data)
        prompts, origin = sample_prompts(job)
        held_out = batches_of(job, val_rows, collator=collator)

        def look() -> tuple[AnswerScores | None, list[str]]:
            scores = None
            if held_out:
                scores = score_answers(policy.model, policy.reference, loss, batches=held_out)
            return scores, answer_prompts(job, policy.model, prompts)

        before, texts_before = look()
        seconds = session.fit(trainer, resume=config.resume is not None)
        after, texts_after = look()
        last = latest(trainer)
        good = sum(row["is_good"] for row in rows)
        at_start = loss.value_at_reference(good, len(rows) - good)
        lines = [f"train loss {last['train/loss']:.4f} ({at_start:.4f} at the reference)"]
        if before is not None and after is not None:
            lines += held_out_lines(before, after)
            num_pairs = sum(row["is_good"] for row in val_rows)
            num_pairs *= len(val_rows) - num_pairs
            if after.margin is not None and after.accuracy is not None:
                session.log(
                    {
                        "preference/margin": (after.margin, num_pairs),
                        "preference/accuracy": (after.accuracy, num_pairs),
                    },
                    step=settings.max_steps,
                )
        session.leave(
            {
                "method": "kto",
                "loss": repr(loss),
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


def held_out_lines(before: AnswerScores, after: AnswerScores) -> list[str]:
    """How the held-out answers fare: by loss and, where there are both kinds, by order."""
    lines = [
        f"held-out loss {before.loss:.4f} -> {after.loss:.4f} on {after.num_answers} answers, "
        f"point of reference {after.reference_point:.3f} nats"
    ]
    if before.margin is not None and after.margin is not None:
        lines.append(
            f"good over bad answers: margin {before.margin:+.4f} -> {after.margin:+.4f}, accuracy "
            f"{before.accuracy:.3f} -> {after.accuracy:.3f} (ties count half)"
        )
    return lines
