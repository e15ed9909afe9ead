"""The trainings of the experiments in the world `enumerable`: the trainers as they are.

The decision to know: every method starts from the same policy, which is its reference, and is
measured by listing all answers, never by sampling; what differs between methods is the method.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from experiments.lab.enumerable import World
    from experiments.lab.meter import Meter
    from moe import MoEForCausalLM
    from sft.settings import TrainSettings
    from sft.tracking import Tracker

TRIED = (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2)
TUNING_SEED = 9001
DISTANCES = (1, 3)  # between the two answers of an exact pair


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What follows from `--scale`. episodes: answers of an update; longest: letters of an answer.

    pair_steps: optimizer steps on pairs.
    """

    longest: int
    width: int
    updates: int
    episodes: int
    pair_steps: int
    pair_batch: int
    looks: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """pairs: DPO on `exact` or `drawn` pairs. ppo: fields of PPOSettings; a critic if it has one.

    Exactly one of the two is given.
    """

    pairs: Literal["exact", "drawn"] | None = None
    ppo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One seed of a run: sizes, learning rates, and where it works."""

    experiment: str
    seed: int
    scale: str
    folder: Path
    rates: Mapping[str, float]
    methods: Mapping[str, Method]
    scales: Mapping[str, Scale]

    @property
    def sizes(self) -> Scale:
        return self.scales[self.scale]

    def stage(self, arm: str) -> Path:
        return self.folder / "stages" / f"s{self.seed}" / arm

    def arm_folder(self, arm: str) -> Path:
        return self.folder / f"{arm}-s{self.seed}"

    def is_judged(self, arm: str) -> bool:
        return (self.arm_folder(arm) / "judged.json").is_file()

    def judged(self, arm: str) -> dict[str, Any]:
        """What the judge left of an arm."""
        text = (self.arm_folder(arm) / "judged.json").read_text(encoding="utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def leave(self, arm: str, found: Mapping[str, Any]) -> None:
        from sft.run import write_json_atomic

        self.arm_folder(arm).mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.arm_folder(arm) / "judged.json", dict(found))


def beginning(lab: Lab) -> "tuple[World, MoEForCausalLM, Tensor]":
    """(world, policy, the policy's log-probabilities of all answers: the reference's)."""
    from experiments.lab.enumerable import answer_logps, build_world, new_policy

    world = build_world(lab.seed, longest=lab.sizes.longest)
    policy = new_policy(lab.seed, width=lab.sizes.width)
    return world, policy, answer_logps(policy, world)


def reference_job(lab: Lab, job: str, best_of_n: Sequence[int]) -> None:
    """The reference, its optimum, and the best of n of its answers: nothing is trained."""
    from experiments.lab.enumerable import best_of, exact
    from experiments.lab.grid import report

    report(job, "listing", 0, 1)
    world, _, reference_PA = beginning(lab)
    policies = {"reference": reference_PA, "optimum": world.optimum(reference_PA)}
    policies |= {best_name(n): best_of(reference_PA, world, n=n) for n in best_of_n}
    for arm, policy_PA in policies.items():
        lab.leave(
            arm,
            {
                "metrics": exact(policy_PA, reference_PA, world),
                "timings": {"seconds": None, "peak_mib": None},
            },
        )


def best_name(n: int) -> str:
    return f"best_of_{n:02d}"


def train_job(lab: Lab, job: str, arm: str) -> None:
    """Train a method and list its answers; done work is not done again."""
    from experiments.lab.enumerable import answer_logps, exact
    from experiments.lab.grid import report
    from experiments.lab.meter import metered
    from sft.checkpoint import newest_checkpoint
    from sft.tracking import Tracker

    if lab.is_judged(arm):
        return
    world, policy, reference_PA = beginning(lab)
    method, folder = lab.methods[arm], lab.stage(arm)
    newest, _ = newest_checkpoint(folder)
    done = int(newest.name.rpartition("-")[2]) if newest else 0
    with (
        metered(folder / "meter.json") as meter,
        Tracker(
            lab.arm_folder(arm),
            group=lab.experiment,
            job_type="train",
            name=f"{arm}-s{lab.seed}",
            config={},
            mirror="none",
            resume_step={"train": done, "exact": done if newest else -1},
            console=None,
        ) as tracker,
    ):

        def look(step: int) -> None:
            found = exact(answer_logps(policy, world), reference_PA, world)
            tracker.log(
                {"eval/kl_to_optimum": found["kl_to_optimum"]},
                step=step,
                stage="exact",
                split="exact",
            )

        def tell(step: int, total: int) -> None:
            meter.tick()
            report(job, arm, step, total)
            if step % max(1, total // lab.sizes.looks) == 0 or step == total:
                look(step)

        if newest is None:
            look(0)
        trainer: Any = (_pairs_trainer if method.pairs else _ppo_trainer)(
            lab, policy, world=world, reference_PA=reference_PA, arm=arm, tracker=tracker, tell=tell
        )
        trainer.fit(resume=True)
    metrics = exact(answer_logps(policy, world), reference_PA, world)
    lab.leave(arm, {"metrics": metrics, "learning_rate": lab.rates[arm], "timings": _facts(meter)})


def _facts(meter: "Meter") -> dict[str, Any]:
    return meter.facts()


def _settings(lab: Lab, arm: str, *, steps: int, batch: int) -> "TrainSettings":
    from sft.settings import TrainSettings

    return TrainSettings(
        max_steps=steps,
        batch_size=batch,
        lr=lab.rates[arm],
        lr_schedule="linear",
        seed=lab.seed,
        log_steps=max(1, steps // 20),
        save_steps=max(1, steps // 3),
        keep_checkpoints=1,
    )


def _fingerprint(lab: Lab) -> dict[str, str]:
    from dataclasses import asdict

    from sft.run import config_hash

    return {"world": config_hash({"seed": lab.seed, **asdict(lab.sizes)})}


def _pairs_trainer(
    lab: Lab,
    policy: "MoEForCausalLM",
    *,
    world: "World",
    reference_PA: "Tensor",
    arm: str,
    tracker: "Tracker",
    tell: Any,
) -> Any:
    from experiments.lab.enumerable import BETA, PAD_ID, drawn_pairs, exact_pairs
    from rlhf.dpo import DPOTrainer
    from rlhf.losses.dpo import DPOLoss
    from rlhf.reference import FrozenCopy
    from sft.rows import PreferenceCollator

    sizes = lab.sizes
    if lab.methods[arm].pairs == "exact":
        rows = exact_pairs(world, distances=DISTANCES)
        settings = _settings(lab, arm, steps=sizes.pair_steps, batch=sizes.pair_batch)
    else:
        # As many answers as the others sample, each labelled in one pair, each pair seen once.
        count = sizes.updates * sizes.episodes // 2
        rows = drawn_pairs(world, reference_PA, count=count, seed=lab.seed)
        batch = sizes.episodes // 2
        settings = _settings(lab, arm, steps=count // batch, batch=batch)
    return DPOTrainer(
        policy,
        settings,
        reference=FrozenCopy(policy),
        loss=DPOLoss(beta=BETA),
        rows=rows,
        collator=PreferenceCollator(pad_id=PAD_ID),
        folder=lab.stage(arm),
        tracker=tracker,
        fingerprints=_fingerprint(lab),
        on_progress=tell,
    )


def _ppo_trainer(
    lab: Lab,
    policy: "MoEForCausalLM",
    *,
    world: "World",
    reference_PA: "Tensor",
    arm: str,
    tracker: "Tracker",
    tell: Any,
) -> Any:
    import torch

    from experiments.lab.enumerable import BETA, EOS, PAD_ID, PROMPTS
    from rlhf.kl import FixedKL
    from rlhf.ppo import PPOSettings, PPOTrainer
    from rlhf.reference import FrozenCopy
    from rlhf.reward import scalar_model

    sizes = lab.sizes
    ppo = PPOSettings(
        updates=sizes.updates,
        episodes=sizes.episodes,
        max_new_tokens=sizes.longest,
        **{"epochs": 2, **lab.methods[arm].ppo},
    )
    torch.manual_seed(lab.seed)
    return PPOTrainer(
        policy,
        _settings(lab, arm, steps=ppo.steps, batch=ppo.minibatch_size),
        critic=scalar_model(policy) if ppo.has_critic else None,
        reference=FrozenCopy(policy),
        reward=world.score,
        rows=[{"prompt_ids": list(prompt)} for prompt in PROMPTS] * sizes.episodes,
        ppo=ppo,
        kl_controller=FixedKL(BETA),
        pad_id=PAD_ID,
        stop_ids=(EOS,),
        folder=lab.stage(arm),
        tracker=tracker,
        fingerprints=_fingerprint(lab),
        on_progress=tell,
    )


# --- the learning rates --------------------------------------------------------------------------


def tune(
    folder: Path,
    methods: Mapping[str, Method],
    *,
    experiment: str,
    scale: str,
    scales: Mapping[str, Scale],
    processes: int,
) -> dict[str, Any]:
    """Try every method at every rate by its distance from the optimum; leaves `tuning.json`."""
    from experiments.lab.grid import Job, run_grid
    from sft.run import write_json_atomic

    labs = {
        rate: Lab(
            experiment=experiment,
            seed=TUNING_SEED,
            scale=scale,
            folder=folder / f"rate-{rate:g}",
            rates=dict.fromkeys(methods, rate),
            methods=methods,
            scales=scales,
        )
        for rate in TRIED
    }
    jobs = [
        Job(name=(name := f"{arm} {rate:g}"), function=train_job, arguments=(lab, name, arm))
        for arm in methods
        for rate, lab in labs.items()
    ]
    run_grid(jobs, processes=processes)
    distances = {
        arm: {f"{r:g}": lab.judged(arm)["metrics"]["kl_to_optimum"] for r, lab in labs.items()}
        for arm in methods
    }
    chosen = {arm: float(min(tried, key=tried.__getitem__)) for arm, tried in distances.items()}
    found = {
        "seed": TUNING_SEED,
        "scale": scale,
        "kl_to_optimum": distances,
        "chosen": chosen,
        "at_an_edge": [arm for arm, rate in chosen.items() if rate in (TRIED[0], TRIED[-1])],
    }
    write_json_atomic(folder / "tuning.json", found)
    return found
