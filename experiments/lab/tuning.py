"""The same number of tries for every method, on a seed that is never reported.

Selection sees what a user would have: the learned reward, and whether the text is still text
(perplexity under the SFT policy at most 1.5 times SFT's own). Gold plays no part.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.lab.begun import claim_trials
from experiments.lab.grid import Job, report, run_grid
from experiments.lab.judging import measure_arm
from experiments.lab.presets import BestOfNArm, DPOArm, PPOArm
from experiments.lab.seed import Seed
from experiments.lab.stages import (
    collect_pairs,
    make_base,
    supervised_finetune,
    train_dpo,
    train_ppo,
    train_reward_model,
)
from experiments.lab.worlds import World, WorldOptions, open_world
from sft.run import plain, write_json_atomic

TUNING_SEED = 9001
MAX_PERPLEXITY_RATIO = 1.5
NUM_PROMPTS = 128

Arm = DPOArm | PPOArm | BestOfNArm


def trials(world: World, *, lora: bool = False) -> dict[str, tuple[Arm, ...]]:
    """The settings that are tried; as many for each method."""
    tried = world.trials(lora=lora)
    return {"dpo": tried.dpo, "ppo": tried.ppo, "best_of_n": tried.best_of_n}


def _seed(options: WorldOptions, folder: Path, lora_rank: int, job: str) -> Seed:
    return Seed(
        seed=TUNING_SEED,
        world=open_world(options),
        folder=folder / "stages",
        arms=folder / "arms",
        lora_rank=lora_rank,
        experiment="compare-tuning",
        mirror=False,
        progress=lambda stage, step, total: report(job, stage, step, total),
    )


def trunk(options: WorldOptions, folder: Path, lora_rank: int) -> None:
    seed = _seed(options, folder, lora_rank, "trunk")
    for stage, function in (("base", make_base), ("sft", supervised_finetune)):
        if not seed.is_done(stage):
            function(seed)
    collect_pairs(seed)
    if not seed.is_done("rm"):
        train_reward_model(seed)


def trial(options: WorldOptions, folder: Path, lora_rank: int, method: str, place: int) -> None:
    """Train one setting and write what selection may see."""
    name = f"{method}-{place}"
    seed = _seed(options, folder, lora_rank, name)
    arm = trials(seed.world, lora=lora_rank > 0)[method][place]
    if isinstance(arm, DPOArm) and not seed.is_done(name):
        train_dpo(seed, arm, name=name)
    elif isinstance(arm, PPOArm) and not seed.is_done(name):
        train_ppo(seed, arm, name=name)
    best = arm if isinstance(arm, BestOfNArm) else None
    prompts = seed.world.validation_prompts(NUM_PROMPTS)
    measured, _ = measure_arm(seed, "best_of_n" if best else name, prompts, best=best)
    write_json_atomic(folder / f"{name}.json", {"arm": asdict(arm), **measured.metrics})


def measure_sft(options: WorldOptions, folder: Path, lora_rank: int) -> None:
    seed = _seed(options, folder, lora_rank, "sft")
    measured, _ = measure_arm(seed, "sft", seed.world.validation_prompts(NUM_PROMPTS))
    write_json_atomic(folder / "sft.json", measured.metrics)


def choose(rows: Sequence[Mapping[str, Any]], *, sft_perplexity: float) -> int:
    """Place of the highest learned reward among the rows whose text stays near SFT's.

    If none does, the one whose perplexity is lowest.
    """
    limit = MAX_PERPLEXITY_RATIO * sft_perplexity
    allowed = [i for i, row in enumerate(rows) if row["reference_perplexity"] <= limit]
    if not allowed:
        return min(range(len(rows)), key=lambda i: rows[i]["reference_perplexity"])
    return max(allowed, key=lambda i: rows[i]["proxy_reward"])


def tune(options: WorldOptions, folder: Path, *, lora_rank: int, processes: int) -> dict[str, Any]:
    """Run all trials and print and write which setting of each method is chosen.

    Continues what lies in the folder; raises UserError if that was begun with other options.
    """
    world = open_world(options)
    world.check()
    base = (options, folder, lora_rank)
    claim_trials(folder, {**plain(options), "lora_rank": lora_rank})
    jobs = [
        Job(name="trunk", function=trunk, arguments=base, weight=4),
        Job(name="sft", function=measure_sft, arguments=base, after=("trunk",), weight=0.1),
    ]
    settings = trials(world, lora=lora_rank > 0)
    for method, weight in (("ppo", 3.0), ("dpo", 1.0), ("best_of_n", 0.5)):
        jobs += [
            Job(
                name=f"{method}-{place}",
                function=trial,
                arguments=(*base, method, place),
                after=("trunk",),
                weight=weight,
            )
            for place in range(len(settings[method]))
        ]
    run_grid(jobs, processes=processes)
    sft = json.loads((folder / "sft.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {
        "seed": TUNING_SEED,
        "rule": "highest learned reward among trials with perplexity under SFT at most "
        f"{MAX_PERPLEXITY_RATIO} times SFT's own",
        "sft": sft,
        "methods": {},
    }
    for method in settings:
        rows = [
            json.loads((folder / f"{method}-{i}.json").read_text(encoding="utf-8"))
            for i in range(len(settings[method]))
        ]
        place = choose(rows, sft_perplexity=sft["reference_perplexity"])
        found["methods"][method] = {"trials": rows, "chosen": place}
        for i, row in enumerate(rows):
            mark = "*" if i == place else " "
            print(
                f"{mark} {method} {row['arm']}  proxy {row['proxy_reward']:+.3f}  "
                f"kl {row['kl_sequence']:.2f}  perplexity {row['reference_perplexity']:.2f}  "
                f"length {row['length']:.1f}"
            )
    write_json_atomic(folder / "tuning.json", found)
    return found
