"""The options of `python -m sft.train`, and which of them have an effect together.

Apart from the command and from the work, so that both can import them and a mistyped flag is
answered before torch is imported.
"""

from dataclasses import dataclass
from typing import Literal

from moe.errors import UserError
from sft.command import TrainingConfig, option

COMMAND = "sft.train"
NEW = "new"
SIZES = ("hidden_size", "num_layers", "num_experts", "top_k", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Config(TrainingConfig):
    """The options of sft.train."""

    stage: Literal["sft", "pretrain"] = option("sft", "answers, or plain text")
    use: Literal["answers", "chosen"] = option("answers", "chosen: of a preference file")
    train_on_inputs: bool = option(False, "loss on prompts too")
    drop_long: bool = option(False, "rows over max-length are left out, not cut")
    hidden_size: int = option(96, "of --model new")
    num_layers: int = option(4, "of --model new")
    num_experts: int = option(8, "of --model new")
    top_k: int = option(2, "experts per token of --model new")
    vocab_size: int = option(1024, "of the tokenizer trained for --model new")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == NEW and self.lora_rank:
            raise UserError(
                f"--lora-rank {self.lora_rank} has no effect with --model new: a new model has no "
                "weights to keep; leave it out."
            )

    def idle(self) -> dict[str, str]:
        idle = super().idle()
        if self.stage == "pretrain":
            names = ("template", "use", "train_on_inputs", "drop_long")
            idle |= dict.fromkeys(names, "with --stage pretrain")
        if self.model != NEW:
            idle |= dict.fromkeys(SIZES, "with a model folder (it belongs to --model new)")
        elif self.tokenizer is not None:
            idle["vocab_size"] = "with --tokenizer"
        return idle
