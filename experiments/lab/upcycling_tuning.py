"""The learning rates of the experiment `upcycling`: the same tries for every family, on one seed.

The decision to know: the dense start is chosen first, by its own loss, because what goes on from it
is tried from the start that the arms will have. A family is tried on one arm; its other arms take
what was best there.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.lab.grid import Job, run_grid
from experiments.lab.upcycling_arms import (
    START,
    arm_job,
    start_job,
    text_job,
)
from experiments.lab.upcycling_text import Lab
from sft.run import write_json_atomic

TUNING_SEED = 9001  # never reported
TRIED_ON = {
    "start": START,
    "dense": "dense_continued",
    "upcycled": "upcycled_copy",
    "scratch": "moe_scratch",
}


def tune(folder: Path, tried: Sequence[float], *, scale: str, processes: int) -> dict[str, Any]:
    """Try every family at every rate; leaves and returns `tuning.json`. Goes on where it was."""
    labs = {rate: _lab(folder, rate, scale=scale) for rate in tried}
    jobs = [Job(name="text", function=text_job, arguments=(labs[tried[0]], "text"), weight=0.2)]
    for rate, lab in labs.items():
        name = f"start {rate:g}"
        jobs.append(Job(name=name, function=start_job, arguments=(lab, name), after=("text",)))
    starts = tuple(f"start {rate:g}" for rate in tried)
    jobs.append(Job(name="choose", function=choose_start, arguments=(labs,), after=starts))
    for family, arm in TRIED_ON.items():
        for rate, lab in labs.items():
            name = f"{arm} {rate:g}"
            if family != "start":
                after = ("choose",) if family != "scratch" else ("text",)
                jobs.append(
                    Job(name=name, function=arm_job, arguments=(lab, name, arm), after=after)
                )
    run_grid(jobs, processes=processes)
    losses = {
        family: {f"{rate:g}": _loss(lab, arm) for rate, lab in labs.items()}
        for family, arm in TRIED_ON.items()
    }
    found = {
        "seed": TUNING_SEED,
        "scale": scale,
        "tried_on": TRIED_ON,
        "held_out_loss": losses,
        "chosen": {
            family: float(min(by_rate, key=by_rate.__getitem__))
            for family, by_rate in losses.items()
        },
    }
    write_json_atomic(folder / "tuning.json", found)
    return found


def choose_start(labs: dict[float, Lab]) -> None:
    """The dense start of the lowest held-out loss becomes that of all the others."""
    best = labs[min(labs, key=lambda rate: _loss(labs[rate], START))]
    target = best.trunk / START / "final"
    copy = target.with_name("copy")
    if not target.is_dir():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(best.stages / START / "final", copy)
        copy.rename(target)


def _lab(folder: Path, rate: float, *, scale: str) -> Lab:
    return Lab(
        seed=TUNING_SEED,
        scale=scale,
        folder=folder / f"rate-{rate:g}",
        rates=dict.fromkeys(TRIED_ON, rate),
        trunk_folder=folder / "stages",
    )


def _loss(lab: Lab, arm: str) -> float:
    loss: float = lab.judged(arm)["metrics"]["held_out_loss"]
    return loss
