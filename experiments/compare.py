"""Do DPO, PPO and best-of-n improve on supervised fine-tuning, when all see the same preferences?

Question: starting from one SFT policy, one set of preference pairs and one reward model learned
from them, how much gold reward does each method gain, what does it cost in KL, in text quality and
in forgetting, and what does it do to the routing of the mixture of experts?

Published: RLHF policies are preferred over their SFT baselines (Ouyang et al. 2022: a win rate of
85 +- 3 % over GPT-3, 71 +- 4 % over few-shot GPT-3); DPO matches PPO on controlled sentiment
(Rafailov et al. 2023, figure 2). A popular handbook adds that DPO moves the model far and PPO
little.

Arms: base, few_shot, sft, dpo, ppo, best_of_n. DPO sees the pairs; PPO and best-of-n see the reward
model learned from them; gold belongs to the evaluator and, as the simulated annotators, to the
labels. Each method had the same number of tuning trials on a seed that is not reported, judged by
learned reward alone. Worlds (--world): `tales`, our own grammar and a model pretrained on it, gold
known exactly; `stories`, a given language model (--model DIR) made a mixture of experts
(--upcycle), continuations of story openings, gold VADER's sentiment of the continuation. Stories
has no few-shot arm: a continuation has no form that worked examples could show. The world `pairs`
asks another question of a given model, what a reward model and DPO learn from a file of preferences
(--data FILE), and is told in experiments.lab.pairs_world.

Cost: about 8 minutes on 2 cores for 3 seeds in tales, about 6 in stories on a model of 260,000
weights.

Verdict rule, fixed before the run: REPRODUCED if DPO, PPO and best-of-n are each BETTER than SFT in
gold reward (95 % interval of the paired seed differences above 0), NOT REPRODUCED if any is WORSE,
else INCONCLUSIVE; the same in both worlds. In stories a method whose gain comes with broken text is
called DEGENERATE beside its word (experiments.lab.degenerate). That DPO's reward at equal KL is at
least PPO's (Rafailov et al. 2023, figure 2) is not judged here: their frontier is 22 trainings at
several betas, and the points along one training of ours are no frontier.
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from experiments.lab.compare_terms import EXPERIMENT, QUESTION, RULE, STAGES, arms_of
from sft.flags import main_guard, parse
from sft.run import Run, write_json_atomic

STATE_KEYS = ("out", "resume", "overwrite", "processes", "mirror", "tune")
STORIES_KEYS = ("model", "upcycle", "target", "sft_data")
# The options that a world has of its own; those of the others have no effect in it.
WORLD_KEYS: Mapping[str, tuple[str, ...]] = {
    "tales": (),
    "stories": STORIES_KEYS,
    "pairs": ("data", "model", "upcycle", "sft", "max_length"),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the comparison."""

    world: Literal["tales", "stories", "pairs"] = field(
        default="tales",
        metadata={
            "help": "tales: our own grammar; stories: a given model's story continuations; pairs: "
            "a file of preferences"
        },
    )
    model: Path | None = field(
        default=None, metadata={"help": "stories, pairs: folder of a causal language model"}
    )
    upcycle: str = field(
        default="8x2",
        metadata={
            "help": "stories, pairs: experts x experts per token, or none to leave the model as is"
        },
    )
    target: Literal["positive", "negative"] = field(
        default="positive", metadata={"help": "stories: the sentiment that gold rewards"}
    )
    sft_data: Path | None = field(
        default=None, metadata={"help": "stories: what SFT learns; default our own tales"}
    )
    data: Path | None = field(default=None, metadata={"help": "pairs: file of preferences"})
    sft: bool = field(
        default=True, metadata={"help": "pairs: learn the chosen answers before all else"}
    )
    max_length: int = field(
        default=0, metadata={"help": "pairs: tokens of prompt and answer; 0 for the scale's own"}
    )
    seeds: tuple[int, ...] = field(default=(0, 1, 2), metadata={"help": "seeds, paired over arms"})
    scale: Literal["laptop", "debug"] = field(
        default="laptop", metadata={"help": "laptop: minutes; debug: seconds"}
    )
    peft: Literal["full", "lora"] = field(
        default="full", metadata={"help": "what SFT, reward model, DPO and PPO train"}
    )
    lora_rank: int = field(default=0, metadata={"help": "rank of the adapters, with --peft lora"})
    processes: int = field(default=2, metadata={"help": "jobs at a time, one thread each"})
    mirror: Literal["wandb", "none"] = field(
        default="wandb", metadata={"help": "wandb: mirror the metrics (offline without a key)"}
    )
    out: Path | None = field(default=None, metadata={"help": "folder of the run"})
    overwrite: bool = field(default=False, metadata={"help": "empty --out first"})
    resume: Path | None = field(default=None, metadata={"help": "continue this run's folder"})
    tune: bool = field(
        default=False, metadata={"help": "try each method's settings on the tuning seed instead"}
    )

    def __post_init__(self) -> None:
        from moe.errors import UserError

        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {list(self.seeds)}: give each seed once, at least one.")
        if (self.peft == "lora") != (self.lora_rank > 0):
            raise UserError(
                f"--peft {self.peft} with --lora-rank {self.lora_rank}: adapters need --peft lora "
                "and a rank of at least 1, such as --lora-rank 8; a full update takes neither."
            )
        if self.tune and (self.resume is not None or self.overwrite):
            raise UserError(
                "--tune takes neither --resume nor --overwrite: it continues by itself."
            )
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise UserError("--resume names the run's folder: leave out --out and --overwrite.")
        if self.processes < 1:
            raise UserError(f"--processes {self.processes} must be at least 1.")
        if self.resume is not None:  # the run's own world takes the place of this one
            return
        if self.world == "stories":
            _check_stories(self)
        if self.world == "pairs":
            pairs_config(self)
        changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        _refuse_options_of_other_worlds(self.world, changed)


def _check_stories(config: Config) -> None:
    from experiments.lab.worlds import parse_upcycle
    from moe.errors import UserError

    if config.model is None:
        raise UserError(
            "--world stories needs a language model: give --model DIR, a folder with config.json, "
            "weights and a tokenizer."
        )
    parse_upcycle(config.upcycle)


def _foreign_keys(world: str) -> tuple[str, ...]:
    """The options that other worlds have and this one has not."""
    every = dict.fromkeys(name for keys in WORLD_KEYS.values() for name in keys)
    return tuple(name for name in every if name not in WORLD_KEYS[world])


def _refuse_options_of_other_worlds(world: str, given: Collection[str]) -> None:
    from moe.errors import UserError

    for name in _foreign_keys(world):
        if name in given:
            flag = name.replace("_", "-")
            takers = " or ".join(f"--world {w}" for w, keys in WORLD_KEYS.items() if name in keys)
            why = ", which makes its own model and text" if world == "tales" else ""
            raise UserError(
                f"--{flag} has no effect in the world {world}{why}: leave it out, or give {takers}."
            )


def pairs_config(config: Config) -> Any:
    """The options as the world `pairs` takes them."""
    from experiments.lab.pairs_config import PairsConfig
    from moe.errors import UserError

    if config.data is None or config.model is None:
        raise UserError(
            "--world pairs needs preferences and a language model: give --data FILE and "
            "--model DIR."
        )
    if config.tune or config.peft == "lora":
        raise UserError(
            f"--{'tune' if config.tune else 'peft lora'} has no effect in the world pairs, which "
            "trains all weights with fixed settings: leave it out."
        )
    names = (*WORLD_KEYS["pairs"], "seeds", "scale", "processes", "mirror")
    folder = {name: getattr(config, name) for name in ("out", "overwrite", "resume")}
    return PairsConfig(**{name: getattr(config, name) for name in names}, **folder)


def world_options(config: Config) -> Any:
    """What the worker processes open the world by."""
    from experiments.lab.worlds import WorldOptions

    assert config.world != "pairs", "pairs has a grid of its own"
    own = {name: getattr(config, name) for name in STORIES_KEYS}
    return WorldOptions(name=config.world, scale=config.scale, **own)


def _world(config: Config) -> Any:
    from experiments.lab.worlds import open_world

    return open_world(world_options(config))


# Jobs: each runs in a worker process and leaves its result on disk.


def _seed(config: Config, folder: Path, seed: int, job: str) -> Any:
    from experiments.lab.grid import report
    from experiments.lab.seed import Seed

    return Seed(
        seed=seed,
        world=_world(config),
        folder=folder / "stages" / f"s{seed}",
        arms=folder,
        lora_rank=config.lora_rank,
        experiment=EXPERIMENT,
        mirror=config.mirror == "wandb",
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def trunk_job(config: Config, folder: Path, seed_number: int) -> None:
    """Base model, SFT, pairs, reward model: what all arms of a seed share."""
    from experiments.lab import stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} trunk")
    for stage, run_stage in (("base", stages.make_base), ("sft", stages.supervised_finetune)):
        if not seed.is_done(stage):
            run_stage(seed)
    stages.collect_pairs(seed)
    if not seed.is_done("rm"):
        stages.train_reward_model(seed)


def arm_job(config: Config, folder: Path, seed_number: int, arm: str) -> None:
    """Train an arm and judge it."""
    from experiments.lab import stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} {arm}")
    if arm == "dpo" and not seed.is_done(arm):
        stages.train_dpo(seed, seed.tuned.dpo)
    if arm == "ppo" and not seed.is_done(arm):
        stages.train_ppo(seed, seed.tuned.ppo)
    _judge(seed, arm)


def judge_job(config: Config, folder: Path, seed_number: int) -> None:
    """Judge what is not trained here, and record the routing of the trunk's stages."""
    seed = _seed(config, folder, seed_number, f"s{seed_number} judge")
    arms = [arm for arm in arms_of(seed.world) if arm not in ("dpo", "ppo")]
    for place, arm in enumerate(arms):
        seed.progress(f"judge {arm}", place, len(arms))
        _judge(seed, arm)
    _record_routing(seed, "rm")


def _judge(seed: Any, arm: str) -> None:
    """Leaves `<arm>-s<seed>/judged.json`; does nothing if it is there."""
    from experiments.lab.judging import judge_arm, judge_frontier

    path = seed.arm_folder(arm) / "judged.json"
    if path.is_file():
        return
    with seed.metered(f"judge-{arm}") as meter:
        found = judge_arm(seed, arm, best=seed.scale.best_of_n)
        if arm in STAGES:
            _record_routing(seed, arm)
    # What is not trained costs what its answers cost.
    facts = meter.facts() if arm in ("few_shot", "best_of_n") else seed.facts(arm)
    result = {
        "metrics": {
            **found["metrics"],
            "tokens_generated": facts.get("tokens_generated", found["drawn"]),
            "tokens_trained": facts.get("tokens_trained", 0),
        },
        "texts": found["texts"],
        "gold": found["gold"],
        "frontier": judge_frontier(seed, arm),
        "timings": {
            "seconds": facts["seconds"],
            "peak_mib": facts["peak_mib"],
            "judge": meter.facts(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, result)


def _record_routing(seed: Any, stage: str) -> None:
    from experiments.lab.judging import routing_of

    path = seed.arm_folder(stage) / "routing.json"
    if not path.is_file():
        found = routing_of(seed, stage)
        if found is not None:
            write_json_atomic(path, found)


def plan(config: Config, folder: Path) -> list[Any]:
    """The grid of a run, in the order in which it should start."""
    from experiments.lab.grid import Job

    jobs = []
    for seed in config.seeds:
        trunk = f"s{seed} trunk"
        jobs.append(
            Job(
                name=trunk,
                function=trunk_job,
                arguments=(config, folder, seed),
                weight=0.55,
                stages=(("pretrain", 0.5), ("sft", 0.2), ("pairs", 0.1), ("rm", 0.2)),
            )
        )
        for arm, weight in (("ppo", 0.25), ("dpo", 0.12)):
            jobs.append(
                Job(
                    name=f"s{seed} {arm}",
                    function=arm_job,
                    arguments=(config, folder, seed, arm),
                    after=(trunk,),
                    weight=weight,
                )
            )
        jobs.append(
            Job(
                name=f"s{seed} judge",
                function=judge_job,
                arguments=(config, folder, seed),
                after=(trunk,),
                weight=0.08,
            )
        )
    return jobs


def identity(config: Config) -> dict[str, Any]:
    """What decides the result: the configuration without where, how many processes, and logging.

    Options of another world have no effect, so they are no part of it.
    """
    idle = _foreign_keys(config.world)
    return {k: v for k, v in asdict(config).items() if k not in (*STATE_KEYS, *idle)}


# The command.


def run(config: Config) -> dict[str, Any]:
    """Run or resume the comparison; returns the summary."""
    from experiments.lab.compare_summary import gather, write_samples
    from experiments.lab.finish import end_run, show
    from experiments.lab.grid import run_grid

    if config.world == "pairs":
        from experiments.lab.pairs_world import run_pairs

        return run_pairs(pairs_config(config))
    if config.resume is None:  # before a folder is made
        _world(config).check()
    state = _open_run(config)
    folder = state.folder
    if state.finished:
        print(f"{folder} is finished; nothing to resume.")
        summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return summary
    if config.resume is not None:
        _world(config).check()
    _print_header(config, folder)
    jobs = plan(config, folder)
    done: set[str] = set()

    def gathered(seeds: Sequence[int], status: str) -> dict[str, Any]:
        return gather(_world(config), folder, seeds=seeds, status=status, identity=identity(config))

    def on_done(name: str) -> None:
        done.add(name)
        seed = name.split()[0]
        own = {job.name for job in jobs if job.name.split()[0] == seed}
        if own <= done and not any(s for s in shown):
            shown.append(seed)
            number = int(seed.removeprefix("s"))
            show(gathered((number,), "running"))

    shown: list[str] = []
    with state:
        try:
            run_grid(jobs, processes=config.processes, on_done=on_done)
        except KeyboardInterrupt:
            print(f"\nstopped; continue with: python -m experiments.compare --resume {folder}")
            raise
        summary = gathered(config.seeds, "done")
        write_samples(_world(config), folder, config.seeds)
        state.write_json("summary.json", summary)
        end_run(folder, summary, config=identity(config), mirror=config.mirror)
    return summary


def _open_run(config: Config) -> Run:
    if config.resume is not None:
        return Run.open(config.resume, identity(config), ignore=STATE_KEYS)
    return Run.create(
        Path("results"), EXPERIMENT, identity(config), out=config.out, overwrite=config.overwrite
    )


def _print_header(config: Config, folder: Path) -> None:
    world = _world(config)
    trained = f"lora rank {config.lora_rank}" if config.lora_rank else "full update"
    print(
        f"compare  world {config.world}, scale {config.scale}, {trained}   {folder}\n"
        f" model   {world.describe()}\n"
        f" seeds   {' '.join(map(str, config.seeds))}   {config.processes} processes, one thread "
        f"each\n arms    {', '.join(arms_of(world))}\n"
        f" rule    {RULE}",
        flush=True,
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = parse(Config, arguments, prog="python -m experiments.compare", description=QUESTION)
    config = parsed.config
    given = {k for k, v in parsed.origins.items() if v != "built-in"}
    if config.resume is not None:
        from experiments.lab.finish import as_stored

        config = as_stored(
            config,
            config.resume,
            given=given,
            except_for=STATE_KEYS,
            paths=("model", "sft_data", "data"),
        )
    _refuse_options_of_other_worlds(config.world, given)
    if config.tune:
        _refuse_idle_with_tune(given)
        from experiments.lab.tuning import tune

        own = f"-stories-{config.target}" if config.world == "stories" else ""
        folder = config.out or Path("results") / EXPERIMENT / f"tuning{own}-{config.peft}"
        tune(
            world_options(config),
            folder,
            lora_rank=config.lora_rank,
            processes=config.processes,
        )
    else:
        run(config)
    return 0


def _refuse_idle_with_tune(given: Collection[str]) -> None:
    from moe.errors import UserError

    for name in ("seeds", "mirror"):
        if name in given:
            raise UserError(
                f"--{name} has no effect with --tune, which runs its own seed and mirrors nothing: "
                "leave it out."
            )


if __name__ == "__main__":
    sys.exit(main())
