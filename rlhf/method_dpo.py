"""`rlhf.train --method dpo`: a policy from pairs, without a reward model, by any loss of pairs."""

from dataclasses import asdict

from rlhf.dpo import DPOTrainer
from rlhf.job import (
    Job,
    answer_prompts,
    batches_of,
    make_policy,
    pair_rows,
    sample_prompts,
    save_trained,
)
from rlhf.losses import PreferenceLoss
from rlhf.losses.table import PAIR_LOSSES
from rlhf.options import LOSSES_OF, Config
from rlhf.scores import PairScores, score_pairs
from sft.session import (
    before_and_after,
    latest,
    whole_state,
)


def pair_loss(config: Config) -> PreferenceLoss:
    """The loss that --loss names, with its options; where one is none, the loss's own default."""
    given = {
        name: value
        for name, losses in LOSSES_OF.items()
        if config.loss in losses and (value := getattr(config, name)) is not None
    }
    return PAIR_LOSSES[config.loss](**given)


def train_dpo(job: Job) -> None:
    """Direct preference optimisation of a policy on pairs."""
    config = job.config
    rows, val_rows, data = pair_rows(job)
    loss = pair_loss(config)
    name = type(loss).__name__.removesuffix("Loss")
    if rows and "margin" in rows[0]:
        data.append(f"the margins are not used: {name}'s loss has none")
    policy = make_policy(job, measured=loss.needs_reference)
    settings = job.settings(len(rows))
    with job.session(policy.idle) as session:
        trainer = DPOTrainer(
            policy.model,
            settings,
            reference=policy.reference,
            loss=loss,
            rows=rows,
            collator=job.collator,
            allow_batch_dependent_routing=config.allow_batch_dependent_routing,
            balance=policy.balance,
            freeze_router=config.freeze_router,
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
        lines = [f"train loss {last['train/loss']:.4f}{at_the_reference(loss)}"]
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


def at_the_reference(loss: PreferenceLoss) -> str:
    """What a train loss is to be read beside: its value where the policy has not moved, if any."""
    value = loss.value_at_reference
    return "" if value is None else f" ({value:.4f} at the reference)"
