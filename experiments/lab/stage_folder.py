"""Where the stages of one seed leave their weights, facts, metrics and costs, and how they resume.

Weights are kept in our checkpoint format under `<folder>/<stage>/final`; a model is rebuilt by code
and filled strictly, so that a file of another shape is refused rather than half loaded.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from experiments.lab.meter import Meter, metered
from sft.checkpoint import (
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    write_checkpoint,
)
from sft.tracking import Tracker

Progress = Callable[[str, int, int], None]
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """One seed on disk. folder: private files; arms: parent of the `<arm>-s<seed>` folders."""

    seed: int
    folder: Path
    arms: Path
    experiment: str
    mirror: bool = True
    progress: Progress = lambda stage, step, total: None

    def arm_folder(self, arm: str) -> Path:
        return self.arms / f"{arm}-s{self.seed}"

    def is_done(self, stage: str) -> bool:
        return (self.folder / stage / "final" / "MANIFEST.json").is_file()

    def save(self, stage: str, model: nn.Module, facts: Mapping[str, Any]) -> None:
        write_checkpoint(
            self.folder / stage / "final",
            tensors={"model": live_tensors(model)},
            documents={"facts": dict(facts)},
            facts={"stage": stage, "seed": self.seed},
        )

    def facts(self, stage: str) -> dict[str, Any]:
        path = self.folder / stage / "final" / "facts.json"
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return facts

    def load(self, stage: str, model: ModelT) -> ModelT:
        checkpoint = read_checkpoint(self.folder / stage / "final")
        load_strictly(model, checkpoint.tensors["model"], source=str(checkpoint.folder))
        return model

    @property
    def fingerprints(self) -> dict[str, str]:
        """What a stage's checkpoints rest on; a resumed stage must agree with it."""
        return {}

    @property
    def told(self) -> dict[str, Any]:
        """What the mirror is told of a stage beside its seed and arm."""
        return {}

    @contextmanager
    def tracked(self, stage: str, *, arm: str | None = None) -> Iterator[Tracker]:
        """A tracker whose metrics go on from the stage's newest checkpoint.

        arm: the folder that the stage writes into, by default its own.
        """
        arm = stage if arm is None else arm
        newest, _ = newest_checkpoint(self.folder / stage)
        step = int(newest.name.rpartition("-")[2]) if newest else 0
        with Tracker(
            self.arm_folder(arm),
            group=self.experiment,
            job_type=stage,
            name=f"{arm}-s{self.seed}",
            config={"seed": self.seed, "arm": arm, **self.told},
            mirror="wandb" if self.mirror else "none",
            resume_step={stage: step},
            console=None,
        ) as tracker:
            yield tracker

    def metered(self, stage: str) -> AbstractContextManager[Meter]:
        """Seconds and memory of a stage, over all its starts."""
        return metered(self.folder / stage / "meter.json")

    def trainer_options(self, stage: str, tracker: Tracker, meter: Meter) -> dict[str, Any]:
        """What every trainer of a stage is given beside model, settings, rows and collator."""

        def tell(step: int, total: int) -> None:
            meter.tick()
            self.progress(stage, step, total)

        return {
            "folder": self.folder / stage,
            "stage": stage,
            "tracker": tracker,
            "fingerprints": self.fingerprints,
            "on_progress": tell,
        }
