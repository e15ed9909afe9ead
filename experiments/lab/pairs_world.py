"""The world `pairs`: what reward models and DPO learn from a file of human (or other) preferences.

Per seed: another split by prompt, SFT on the chosen answers of the training side, a reward model
and DPO from there; all measured on the held-out side beside length and words, and the routing of
every stage recorded. There is no gold here: the file's own preferences on unseen prompts judge.

The decision to know: jobs talk through files alone, as in the other worlds, so that a killed run
goes on with `--resume` and ends in the same summary.
"""

import json
from pathlib import Path
from typing import Any

from experiments.lab.finish import end_run
from experiments.lab.grid import Job, report, run_grid
from experiments.lab.pairs_config import STATE_KEYS, PairsConfig
from experiments.lab.pairs_summary import QUESTION, RULE, gather
from sft.run import Run

__all__ = ["EXPERIMENT", "QUESTION", "PairsConfig", "plan", "run_pairs"]

EXPERIMENT = "compare"


def _seed(config: PairsConfig, folder: Path, seed: int, job: str) -> Any:
    from experiments.lab.pairs_seed import PairsSeed

    return PairsSeed(
        seed=seed,
        config=config,
        folder=folder / "stages" / f"s{seed}",
        arms=folder,
        experiment=EXPERIMENT,
        mirror=config.mirror == "wandb",
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def trunk_job(config: PairsConfig, folder: Path, seed_number: int) -> None:
    """The split, the rules without a model, SFT: what reward model and DPO share."""
    from experiments.lab import pairs_stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} trunk")
    pairs_stages.describe_pairs(seed)
    pairs_stages.judge_baselines(seed)
    if config.sft and not seed.is_done("sft"):
        pairs_stages.train_sft(seed)
    start = "sft" if config.sft else "base"
    for stage in dict.fromkeys(("base", start)):
        pairs_stages.record_stage(seed, stage, start=start)


def stage_job(config: PairsConfig, folder: Path, seed_number: int, stage: str) -> None:
    """Train the reward model or DPO, and record what became of the routing."""
    from experiments.lab import pairs_stages

    seed = _seed(config, folder, seed_number, f"s{seed_number} {stage}")
    pairs_stages.describe_pairs(seed)  # refuses a file that changed since the trunk
    train = {"rm": pairs_stages.train_reward_model, "dpo": pairs_stages.train_dpo}[stage]
    if not seed.is_done(stage):
        train(seed)
    start = "sft" if config.sft else "base"
    pairs_stages.record_stage(seed, stage, start=start)
    if stage == "dpo":
        pairs_stages.answer_prompts(seed, stage, against=start)


def plan(config: PairsConfig, folder: Path) -> list[Job]:
    """The grid of a run, in the order in which it should start."""
    jobs = []
    for seed in config.seeds:
        trunk = f"s{seed} trunk"
        jobs.append(
            Job(name=trunk, function=trunk_job, arguments=(config, folder, seed), weight=0.25)
        )
        for stage, weight in (("rm", 0.4), ("dpo", 0.35)):
            jobs.append(
                Job(
                    name=f"s{seed} {stage}",
                    function=stage_job,
                    arguments=(config, folder, seed, stage),
                    after=(trunk,),
                    weight=weight,
                )
            )
    return jobs


def run_pairs(config: PairsConfig) -> dict[str, Any]:
    """Run or resume the world; returns the summary.

    Raises:
        UserError: before a folder is made, for a file, model or size that would fail later; for a
            resumed run, naming what differs from it.
    """
    identity = config.identity()
    if config.resume is not None:
        state = Run.open(config.resume, identity, ignore=STATE_KEYS)
        if state.finished:
            print(f"{state.folder} is finished; nothing to resume.")
            text = (state.folder / "summary.json").read_text(encoding="utf-8")
            finished: dict[str, Any] = json.loads(text)
            return finished
        lines = _header(config)
    else:
        lines = _header(config)
        state = Run.create(
            Path("results"), EXPERIMENT, identity, out=config.out, overwrite=config.overwrite
        )
    folder = state.folder
    print("\n".join([f"compare  world pairs, scale {config.scale}   {folder}", *lines]), flush=True)
    with state:
        try:
            run_grid(plan(config, folder), processes=config.processes)
        except KeyboardInterrupt:
            print(f"\nstopped; continue with: python -m experiments.compare --resume {folder}")
            raise
        summary = gather(config, folder, seeds=config.seeds, status="done")
        state.write_json("summary.json", summary)
        end_run(folder, summary, config=identity, mirror=config.mirror)
    return summary


def _header(config: PairsConfig) -> list[str]:
    """What is about to run, in lines; everything given is opened once before a folder is made."""
    from experiments.lab.pairs_seed import check_given

    size, examples = check_given(config)
    sft = "SFT on the chosen answers, then " if config.sft else ""
    return [
        f" model   {config.model}: {size}",
        f" data    {config.data} ({examples.format}): {len(examples):,} pairs",
        *(f"         {note}" for note in examples.notes),
        f" stages  {sft}reward model and DPO, at most {config.sizes.max_length} tokens",
        f" seeds   {' '.join(map(str, config.seeds))}   {config.processes} processes, one thread "
        "each",
        f" rule    {RULE}",
    ]
