"""The learning rates of the experiments in the world `knowledge`: the same tries for every family.

The decision to know: a family is tried on one of its arms, on a seed that is never reported; its
other arms take what was best there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.lab.knowledge_arms import Design, Lab, arm_job

TRIED = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
TUNING_SEED = 9001


def tune(
    folder: Path, designs: Mapping[str, Design], *, experiment: str, scale: str, processes: int
) -> dict[str, Any]:
    """Try each design, the one arm of its family, at every rate; leaves and returns `tuning.json`.

    designs: arm -> design, one a family. What an earlier start tried is not tried again.
    """
    from experiments.lab.grid import Job, run_grid
    from sft.run import write_json_atomic

    labs = {
        rate: Lab(
            experiment=experiment,
            seed=TUNING_SEED,
            scale=scale,
            folder=folder / f"rate-{rate:g}",
            rates={design.family: rate for design in designs.values()},
        )
        for rate in TRIED
    }
    jobs = [
        Job(name=(name := f"{arm} {rate:g}"), function=arm_job, arguments=(lab, name, arm, design))
        for arm, design in designs.items()
        for rate, lab in labs.items()
    ]
    run_grid(jobs, processes=processes)
    losses = {
        design.family: {f"{rate:g}": _loss(lab, arm) for rate, lab in labs.items()}
        for arm, design in designs.items()
    }
    found = {
        "seed": TUNING_SEED,
        "scale": scale,
        "tried_on": {design.family: arm for arm, design in designs.items()},
        "held_out_loss": losses,
        "chosen": {family: best_rate(tried) for family, tried in losses.items()},
        "at_an_edge": [family for family, tried in losses.items() if is_at_an_edge(tried)],
    }
    write_json_atomic(folder / "tuning.json", found)
    return found


def best_rate(losses: Mapping[str, float]) -> float:
    """The rate of the lowest loss, the smaller one at a tie. losses: in the order of the rates."""
    return float(min(losses, key=losses.__getitem__))


def is_at_an_edge(losses: Mapping[str, float]) -> bool:
    """Whether the best rate is the first or last that was tried: a better one may lie beyond."""
    return best_rate(losses) in (TRIED[0], TRIED[-1])


def _loss(lab: Lab, arm: str) -> float:
    loss: float = lab.judged(arm)["metrics"]["held_out_loss"]
    return loss
