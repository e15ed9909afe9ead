"""What a run on a preference file is asked, and the sizes that follow from it.

The sizes were set before a reported seed ran: those of the world `stories`, and as many tokens of a
pair as let a seed with a model of 260 thousand parameters take some minutes on one core.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from experiments.lab.worlds import parse_upcycle
from moe.errors import UserError

STATE_KEYS = ("out", "resume", "overwrite", "processes", "mirror")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Passes over the training pairs, pairs per optimizer step, learning rate."""

    epochs: float
    batch_size: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class PairsScale:
    """Sizes in pairs, tokens, steps.

    max_pairs: of the file, whole prompts. max_length: tokens of prompt and answer together.
    held_out: share of the pairs that no stage sees. num_routing_pairs, num_samples: held-out pairs
    whose routing is recorded, and whose prompts are answered before and after.
    """

    max_pairs: int
    max_length: int
    held_out: float
    sft: Stage
    rm: Stage
    dpo: Stage
    beta: float
    num_routing_pairs: int
    num_samples: int
    max_new_tokens: int
    save_steps: int


LAPTOP = PairsScale(
    max_pairs=2400,
    max_length=128,
    held_out=0.2,
    sft=Stage(epochs=1.0, batch_size=32, lr=2e-3),
    rm=Stage(epochs=1.0, batch_size=32, lr=1e-3),
    dpo=Stage(epochs=1.0, batch_size=32, lr=3e-4),
    beta=0.1,
    num_routing_pairs=64,
    num_samples=12,
    max_new_tokens=48,
    save_steps=20,
)
DEBUG = replace(
    LAPTOP,
    max_pairs=64,
    max_length=64,
    held_out=0.25,
    sft=Stage(epochs=1.0, batch_size=8, lr=2e-3),
    rm=Stage(epochs=1.0, batch_size=8, lr=1e-3),
    dpo=Stage(epochs=1.0, batch_size=8, lr=3e-4),
    num_routing_pairs=6,
    num_samples=3,
    max_new_tokens=6,
    save_steps=2,
)
SCALES: Mapping[str, PairsScale] = {"laptop": LAPTOP, "debug": DEBUG}


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """A run: which pairs, which model, how often.

    upcycle: experts x experts per token that the model is made of, or `none` to take it as it is.
    max_length: 0 for the scale's. sft: whether the chosen answers are learned first.
    """

    data: Path
    model: Path
    upcycle: str = "8x2"
    sft: bool = True
    max_length: int = 0
    seeds: tuple[int, ...] = (0, 1, 2)
    scale: Literal["laptop", "debug"] = "laptop"
    processes: int = 2
    mirror: Literal["wandb", "none"] = "wandb"
    out: Path | None = None
    overwrite: bool = False
    resume: Path | None = None

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise UserError(f"--seeds {list(self.seeds)}: give each seed once, at least one.")
        if self.max_length < 0:
            raise UserError(
                f"--max-length {self.max_length}: give the tokens of prompt and answer together, "
                "or 0 for the scale's own."
            )
        if self.processes < 1:
            raise UserError(f"--processes {self.processes} must be at least 1.")
        if self.resume is not None and (self.out is not None or self.overwrite):
            raise UserError("--resume names the run's folder: leave out --out and --overwrite.")
        parse_upcycle(self.upcycle)

    @property
    def experts(self) -> tuple[int, int] | None:
        """(how many, how many per token) to make; None where the model is taken as it is."""
        return parse_upcycle(self.upcycle)

    @property
    def sizes(self) -> PairsScale:
        sizes = SCALES[self.scale]
        return replace(sizes, max_length=self.max_length) if self.max_length else sizes

    def identity(self) -> dict[str, Any]:
        """What decides the result: no folder, no count of processes, no logging."""
        own = {key: value for key, value in asdict(self).items() if key not in STATE_KEYS}
        return {"world": "pairs", **own}
