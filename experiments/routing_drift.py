"""How far do SFT, reward model, DPO and PPO move the routing of the same texts?

Question: from the model that a stage starts from, which share of the experts chosen for the tokens
of fixed held-out texts is replaced, layer by layer; is that more than two trainings of the stage
differ by the seed alone; how does it go with the KL that the stage spends; and which experts serve
preferred answers?

Published: nothing that compares the stages of alignment. Near it: after one gradient update of
reinforcement learning about 10 % of the activated experts of a 48-layer model are others (Zheng et
al. 2025, section 5.3), and up to 60 % of the top-8 experts are settled after 1 % of pretraining
(Muennighoff et al. 2024).

Arms: sft (from base), rm, dpo, ppo (each from sft) in the world tales, with the settings of
`compare`; each stage a second time from the same start with another seed: SFT with other examples
in another order, reward model and DPO with another split and order of the same pairs (the reward
model's head begins anew too), PPO with other prompts and samples under the same reward model.

Cost: an estimate, about 20 minutes on 2 cores for 5 seeds.

Verdict rule, fixed before the run: a stage MOVED the routing if its change from its start is above
the change between its two trainings (95 % interval of the paired seed differences above 0). Two
trainings that only jitter lie further from each other than from their start, so this asks for a
common direction. The verdict is MOVED if every stage moved, NOT DISTINGUISHED if none did, else
PARTLY.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.lab.drift_summary import ASKS, EXPERIMENT, MEASURED, RULE, STAGES, gather
from experiments.lab.question import Options, Question, answer, command, mirror_of
from sft.flags import main_guard
from sft.run import write_json_atomic

# Jobs: each runs in a worker process and leaves its result on disk.


def _seed(options: Options, folder: Path, number: int, job: str) -> Any:
    from experiments.lab.grid import report
    from experiments.lab.seed import Seed
    from experiments.lab.worlds import WorldOptions, open_world

    return Seed(
        seed=number,
        world=open_world(WorldOptions(name="tales", scale=options.scale)),
        folder=folder / "stages" / f"s{number}",
        arms=folder,
        experiment=EXPERIMENT,
        mirror=mirror_of(options) == "wandb",
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def stage_job(options: Options, folder: Path, number: int, stage: str) -> None:
    """Train a stage; the first also makes the base model."""
    from experiments.lab import stages

    seed = _seed(options, folder, number, f"s{number} {stage}")
    if stage == "sft" and not seed.is_done("base"):
        stages.make_base(seed)
    if stage == "rm":
        stages.collect_pairs(seed)
    _train(seed, stage)


def again_job(options: Options, folder: Path, number: int, stage: str) -> None:
    """The same stage from the same start with another seed."""
    from experiments.lab.reseeded import reseeded

    _train(reseeded(_seed(options, folder, number, f"s{number} {stage} again"), stage), stage)


def _train(seed: Any, stage: str) -> None:
    from experiments.lab import stages

    if seed.is_done(stage):
        return
    if stage == "sft":
        stages.supervised_finetune(seed)
    elif stage == "rm":
        stages.train_reward_model(seed)
    elif stage == "dpo":
        stages.train_dpo(seed, seed.tuned.dpo)
    else:
        stages.train_ppo(seed, seed.tuned.ppo)


def measure_job(options: Options, folder: Path, number: int) -> None:
    """What the trained stages did to the routing; leaves `<stage>-s<seed>/measured.json`."""
    from experiments.lab.drift_seed import measure_seed

    seed = _seed(options, folder, number, f"s{number} measure")
    if all((seed.arm_folder(stage) / MEASURED).is_file() for stage in STAGES):
        return
    for stage, found in measure_seed(seed, STAGES):
        write_json_atomic(seed.arm_folder(stage) / MEASURED, found)


def plan(options: Options, folder: Path) -> list[Any]:
    """The grid of a run, in the order in which it should start."""
    from experiments.lab.grid import Job

    jobs = []
    for seed in options.seeds:
        before = {"sft": (), "rm": ("sft",), "dpo": ("rm",), "ppo": ("rm",)}
        weights = {"sft": 1.2, "rm": 0.6, "dpo": 0.4, "ppo": 0.9}
        names = []
        for stage in STAGES:
            name = f"s{seed} {stage}"
            after = tuple(f"s{seed} {other}" for other in before[stage])
            arguments = (options, folder, seed, stage)
            weight = weights[stage]
            jobs.append(
                Job(name=name, function=stage_job, arguments=arguments, after=after, weight=weight)
            )
            names.append(name)
        for stage in STAGES:
            first = f"s{seed} {'rm' if stage in ('dpo', 'ppo') else stage}"
            name = f"s{seed} {stage} again"
            jobs.append(
                Job(
                    name=name,
                    function=again_job,
                    arguments=(options, folder, seed, stage),
                    after=(first,),
                    weight=min(weights[stage], 0.9),
                )
            )
            names.append(name)
        jobs.append(
            Job(
                name=f"s{seed} measure",
                function=measure_job,
                arguments=(options, folder, seed),
                after=tuple(names),
                weight=0.15,
            )
        )
    return jobs


# The command.


QUESTION = Question(name=EXPERIMENT, asks=ASKS, rule=RULE, plan=plan, gather=gather, mirrored=True)


def run(options: Options) -> dict[str, Any]:
    """Run or resume the experiment; returns the summary."""
    return answer(QUESTION, options)


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return command(QUESTION, argv)


if __name__ == "__main__":
    sys.exit(main())
