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
`compare`; each stage a second time from the same start with another seed (SFT's examples, the
split and order of the pairs, PPO's prompts, samples and fresh heads are drawn anew).

Cost: an estimate, about 20 minutes on 2 cores for 5 seeds.

Verdict rule, fixed before the run: a stage MOVED the routing if its change from its start is above
the change between its two trainings (95 % interval of the paired seed differences above 0). Two
trainings that only jitter lie further from each other than from their start, so this asks for a
common direction. The verdict is MOVED if every stage moved, NOT DISTINGUISHED if none did, else
PARTLY.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments.lab.drift_summary import EXPERIMENT, MEASURED, QUESTION, RULE, STAGES, gather
from sft.flags import main_guard, parse
from sft.run import Run, write_json_atomic

STATE_KEYS = ("out", "resume", "overwrite", "processes", "mirror")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the experiment."""

    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "seeds, paired over arms"})
    scale: Literal["laptop", "debug"] = field(
        default="laptop", metadata={"help": "laptop: minutes; debug: seconds"}
    )
    processes: int = field(default=2, metadata={"help": "jobs at a time, one thread each"})
    mirror: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "wandb: mirror the metrics (offline without a key)"}
    )
    out: Path | None = field(default=None, metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "empty --out first"})
    resume: Path | None = field(default=None, metadata={"help": "continue this run's folder"})

    def __post_init__(self) -> None:
        from moe.errors import UserError

        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {list(self.seeds)}: give each seed once, at least one.")
        if self.processes < 1:
            raise UserError(f"--processes {self.processes} must be at least 1.")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise UserError("--resume names the run's folder: leave out --out and --overwrite.")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result."""
        return {key: value for key, value in asdict(self).items() if key not in STATE_KEYS}


# Jobs: each runs in a worker process and leaves its result on disk.


def _seed(config: Config, folder: Path, number: int, job: str) -> Any:
    from experiments.lab.grid import report
    from experiments.lab.seed import Seed
    from experiments.lab.worlds import WorldOptions, open_world

    return Seed(
        seed=number,
        world=open_world(WorldOptions(name="tales", scale=config.scale)),
        folder=folder / "stages" / f"s{number}",
        arms=folder,
        experiment=EXPERIMENT,
        mirror=config.mirror == "wandb",
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def stage_job(config: Config, folder: Path, number: int, stage: str) -> None:
    """Train a stage; the first also makes the base model."""
    from experiments.lab import stages

    seed = _seed(config, folder, number, f"s{number} {stage}")
    if stage == "sft" and not seed.is_done("base"):
        stages.make_base(seed)
    if stage == "rm":
        stages.collect_pairs(seed)
    _train(seed, stage)


def again_job(config: Config, folder: Path, number: int, stage: str) -> None:
    """The same stage from the same start with another seed."""
    from experiments.lab.reseeded import reseeded

    _train(reseeded(_seed(config, folder, number, f"s{number} {stage} again"), stage), stage)


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


def measure_job(config: Config, folder: Path, number: int) -> None:
    """What the trained stages did to the routing; leaves `<stage>-s<seed>/measured.json`."""
    from experiments.lab.drift_seed import measure_seed

    seed = _seed(config, folder, number, f"s{number} measure")
    if all((seed.arm_folder(stage) / MEASURED).is_file() for stage in STAGES):
        return
    for stage, found in measure_seed(seed, STAGES):
        write_json_atomic(seed.arm_folder(stage) / MEASURED, found)


def plan(config: Config, folder: Path) -> list[Any]:
    """The grid of a run, in the order in which it should start."""
    from experiments.lab.grid import Job

    jobs = []
    for seed in config.seeds:
        before = {"sft": (), "rm": ("sft",), "dpo": ("rm",), "ppo": ("rm",)}
        weights = {"sft": 1.2, "rm": 0.6, "dpo": 0.4, "ppo": 0.9}
        names = []
        for stage in STAGES:
            name = f"s{seed} {stage}"
            after = tuple(f"s{seed} {other}" for other in before[stage])
            arguments = (config, folder, seed, stage)
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
                    arguments=(config, folder, seed, stage),
                    after=(first,),
                    weight=min(weights[stage], 0.9),
                )
            )
            names.append(name)
        jobs.append(
            Job(
                name=f"s{seed} measure",
                function=measure_job,
                arguments=(config, folder, seed),
                after=tuple(names),
                weight=0.15,
            )
        )
    return jobs


# The command.


def run(config: Config) -> dict[str, Any]:
    """Run or resume the experiment; returns the summary."""
    from experiments.lab.finish import end_run
    from experiments.lab.grid import run_grid

    if config.resume is not None:
        state = Run.open(config.resume, config.identity, ignore=STATE_KEYS)
    else:
        state = Run.create(
            Path("results"), EXPERIMENT, config.identity, out=config.out, overwrite=config.overwrite
        )
    folder = state.folder
    if state.finished:
        print(f"{folder} is finished; nothing to resume.")
        held: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return held
    seeds = " ".join(map(str, config.seeds))
    print(f"{EXPERIMENT}  scale {config.scale}  seeds {seeds}  {folder}\n rule  {RULE}", flush=True)
    with state:
        try:
            run_grid(plan(config, folder), processes=config.processes)
        except KeyboardInterrupt:
            print(f"\nstopped; continue with: python -m experiments.{EXPERIMENT} --resume {folder}")
            raise
        summary = gather(folder, seeds=config.seeds, identity=config.identity)
        state.write_json("summary.json", summary)
        end_run(folder, summary, config=config.identity, mirror=config.mirror)
    return summary


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parsed = parse(Config, argv, prog=f"python -m experiments.{EXPERIMENT}", description=QUESTION)
    config = parsed.config
    if config.resume is not None:
        from experiments.lab.finish import as_stored

        given = {name for name, origin in parsed.origins.items() if origin != "built-in"}
        config = as_stored(config, config.resume, given=given, except_for=STATE_KEYS)
    run(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
