"""What a world gives the shared pipeline, and how one is opened.

A world is text, a language model to start from, prompts and a true reward. The decision to know:
everything that differs between worlds is behind `World`, and no stage asks for a world's name; what
a world has not (few-shot prompts, pretraining, a plain model to be held against) is None there, and
the arm or the measure that needs it is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from moe.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from experiments.lab.evaluation import Gold
    from experiments.lab.presets import Scale, Trials
    from sft.examples import Instruction
    from sft.rows import SupervisedRow
    from sft.settings import BalancePolicy
    from sft.text import TextPath

WorldName = Literal["tales", "stories"]
Target = Literal["positive", "negative"]
DENSE = "none"


@dataclass(frozen=True, kw_only=True)
class WorldOptions:
    """Which world; plain values that travel to worker processes. The last four are of stories."""

    name: WorldName
    scale: Literal["laptop", "debug"]
    model: Path | None = None
    upcycle: str = "8x2"
    target: Target = "positive"
    sft_data: Path | None = None


class World(Protocol):
    """Text, models, prompts and gold. `folder` is the seed's own, for what is made once a seed."""

    @property
    def name(self) -> str: ...

    @property
    def scale(self) -> "Scale": ...

    @property
    def experts_begin_equal(self) -> bool:
        """Whether the starting model's experts are copies, so that their coming apart is told."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the results should know of this world."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was given, for the summary and for refusing to go on with something else."""
        ...

    def check(self) -> None:
        """Raises UserError for what would fail later: absent files, packages, misfits."""
        ...

    def describe(self) -> str:
        """The starting model in a line."""
        ...

    def trials(self, *, lora: bool) -> "Trials":
        """What `--tune` tries."""
        ...

    def sentences(
        self, *, before: Sequence[float], after: Sequence[float], ended: Sequence[float]
    ) -> list[str]:
        """What SFT did, given its held-out loss before and after, and the share of its answers
        that end, seed by seed; asked where `facts` says that something was given.
        """
        ...

    # Text and models.

    def prepare(self, seed: int, folder: Path) -> list[str]:
        """Leave in `folder` what the methods below read there; notes. Does nothing twice."""
        ...

    def text_path(self, folder: Path) -> "TextPath": ...

    def new_model(self, text_path: "TextPath", *, seed: int) -> "PreTrainedModel":
        """The starting model: as it was given, or with fresh weights where it is pretrained."""
        ...

    def pretraining_rows(
        self, seed: int, text_path: "TextPath"
    ) -> "Sequence[SupervisedRow] | None":
        """Rows to pretrain on; None where the model is given."""
        ...

    def original(self) -> "nn.Module | None":
        """The given model before anything was done to it; None where there is none."""
        ...

    def balance(self, model: "nn.Module") -> "BalancePolicy":
        """How SFT and the reward model balance their routers."""
        ...

    # What the stages see.

    def sft_examples(self, seed: int) -> "Sequence[Instruction]": ...

    def sft_held_out(self, seed: int) -> "Sequence[Instruction] | None":
        """Examples of the same kind that SFT does not see; None if its loss is not told."""
        ...

    def training_prompts(self, seed: int, count: int) -> list[str]: ...

    def held_out_prompts(self, count: int) -> list[str]:
        """The evaluator's, the same for every seed; a shorter list begins a longer one."""
        ...

    def validation_prompts(self, count: int) -> list[str]:
        """For choosing settings: neither trained on nor the evaluator's."""
        ...

    def few_shot_prompts(self, prompts: Sequence[str], *, seed: int) -> list[str] | None:
        """The prompts behind worked examples; None where the world has no few-shot arm."""
        ...

    def missing_eos_penalty(self, ended_share: float) -> float:
        """PPO's price for not ending, given the share of SFT's answers that end."""
        ...

    # What arms are judged by.

    def gold(self) -> "Gold":
        """The true reward of a completion, `gold(text, ended=...)`; forbidden by `forbid()`."""
        ...

    def routing_rows(self, seed: int, folder: Path) -> "Sequence[SupervisedRow]":
        """Held-out texts whose routing is recorded at every stage."""
        ...

    def forgetting_rows(self, seed: int, folder: Path) -> "Sequence[SupervisedRow]":
        """Held-out text of the kind that the starting model knows."""
        ...


def open_world(options: WorldOptions) -> World:
    """The world that the options name."""
    if options.name == "tales":
        from experiments.lab.world_tales import tales_world

        return tales_world(options.scale)
    from experiments.lab.world_stories import stories_world

    if options.model is None:
        raise UserError(
            "--world stories needs a language model: give --model DIR, a folder with config.json, "
            "weights and a tokenizer."
        )
    return stories_world(
        options.scale,
        model=options.model,
        experts=parse_upcycle(options.upcycle),
        target=options.target,
        sft_data=options.sft_data,
    )


def parse_upcycle(text: str) -> tuple[int, int] | None:
    """(experts, experts per token) of `8x2`; None of `none`."""
    if text == DENSE:
        return None
    first, cross, second = text.partition("x")
    if not (cross and first.isdecimal() and second.isdecimal()):
        raise UserError(
            f"--upcycle {text}: give experts and experts per token, such as 8x2, or none."
        )
    num_experts, top_k = int(first), int(second)
    if not 2 <= top_k <= num_experts:
        raise UserError(
            f"--upcycle {text}: a token needs at least 2 of the experts, and no more than there "
            "are, so that equal experts stay the dense model and the router learns."
        )
    return num_experts, top_k
