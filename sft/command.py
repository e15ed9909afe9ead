"""What the training commands share before torch is imported: their options and their manners.

The decision to know: an option that has no effect in the configuration at hand is an error when it
was given, and is left out of the run's config.yaml, so that `--config RUN/config.yaml` repeats it.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from moe.errors import UserError
from sft.alarms import OnAlarm
from sft.flags import SHARED_ALIASES, Parsed, parse

ALIASES = {**SHARED_ALIASES, "log": "mirror"}
# Where a run goes, how it speaks and whether it stops early is no part of what it is.
PLACES = ("out", "resume", "allow_changed", "overwrite", "quiet", "on_alarm")
# What a resumed run may be told to find changed, and the options that belong to each but the last.
Changeable = Literal["data", "tokenizer", "model", "settings", "machine"]
_KIND_OF_OPTION: dict[str, Changeable] = {
    **dict.fromkeys(("data", "columns", "normalize_data", "ptx_data"), "data"),
    **dict.fromkeys(("tokenizer", "template"), "tokenizer"),
    **dict.fromkeys(("model", "reward_model"), "model"),
}

BalanceScope = Literal["off", "micro_batch", "sequence", "optimizer_step", "running"]
LoraTarget = Literal["auto", "all", "attention", "experts", "router", "ffn"]


def option(default: Any, text: str) -> Any:
    """A field of a command's configuration, with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The options that every training command has, with the same meaning in each."""

    model: str = field(metadata={"help": "model folder, or a run of sft.train"})
    data: Path = field(metadata={"help": ".json, .jsonl or .txt file, plain or .gz"})
    tokenizer: Path | None = option(None, "its folder, if not the model's own")
    columns: tuple[str, ...] = option((), "our=theirs pairs, such as instruction=question")
    template: str | None = option(None, "plain, alpaca, chatml, continuation or tokenizer")
    max_length: int = option(512, "tokens of a row")
    val_set_size: float = option(0.1, "share of the rows held out, by prompt")
    epochs: float = option(1.0, "passes over the data")
    max_steps: int | None = option(None, "optimizer steps, instead of epochs")
    batch_size: int = option(16, "rows of a step, over all processes")
    batch_size_per_device: int = option(0, "rows of one forward pass; 0: as many as there are")
    lr: float = option(2e-4, "peak learning rate")
    lr_schedule: Literal["cosine", "linear", "constant"] = option("cosine", "")
    warmup_steps: int = option(0, "steps of rising lr")
    weight_decay: float = option(0.0, "AdamW's")
    lora_rank: int = option(0, "0: a full update")
    lora_alpha: float | None = option(None, "none: twice the rank")
    lora_targets: tuple[LoraTarget, ...] = option(("auto",), "parts; auto: all but the router")
    load_balancing_coef: float | None = option(None, "none: the model's own")
    z_loss_coef: float | None = option(None, "none: the model's own")
    balance_scope: Literal[
        "auto", "off", "micro_batch", "sequence", "optimizer_step", "running"
    ] = option("auto", "what f counts; auto: optimizer_step, dpo and ppo off")
    running_decay: float = option(0.9, "what a step back weighs in --balance-scope running")
    bias_update_rate: float = option(0.0, "step of the routers' selection bias; 0: left as it is")
    activation_checkpointing: bool = option(False, "less memory, more time")
    seed: int = option(0, "order, adapters, draws")
    save_steps: int = option(100, "steps between checkpoints; 0: none")
    keep_checkpoints: int = option(2, "the newest so many")
    log_steps: int = option(10, "steps between metrics")
    num_samples: int = option(3, "held-out prompts answered before and after")
    max_new_tokens: int = option(64, "tokens of an answer")
    mirror: Literal["wandb", "none"] = option("wandb", "copy of metrics.jsonl")
    out: Path | None = option(None, "the run's folder, if not a new one under results/")
    resume: Path | None = option(None, "go on with this run")
    allow_changed: tuple[Changeable, ...] = option((), "what may differ from the run resumed")
    overwrite: bool = option(False, "empty an earlier run in --out")
    quiet: bool = option(False, "print the result only")
    on_alarm: OnAlarm = option("tell", "stop: end the run when one rings")

    def __post_init__(self) -> None:
        for name in ("max_length", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}: it must be at least 1.")
        for name in (
            "batch_size_per_device",
            "warmup_steps",
            "lora_rank",
            "save_steps",
            "log_steps",
            "num_samples",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}: it must be at least 0.")
        if not 0.0 <= self.val_set_size < 1.0:
            raise UserError(
                f"--val-set-size {self.val_set_size:g} is a share: give 0 or more, below 1."
            )
        if not self.epochs > 0:
            raise UserError(f"--epochs is {self.epochs:g}: it must be above 0.")

    @property
    def scope(self) -> BalanceScope:
        """What the experts' shares f of the balance loss are counted over."""
        return "optimizer_step" if self.balance_scope == "auto" else self.balance_scope

    def idle(self) -> dict[str, str]:
        """Options without effect in this configuration, and why ("with --lora-rank 0")."""
        idle: dict[str, str] = {}
        if not self.lora_rank:
            reason = "with --lora-rank 0, a full update"
            idle |= {"lora_alpha": reason, "lora_targets": reason}
        if not self.save_steps:
            idle["keep_checkpoints"] = "with --save-steps 0"
        if self.max_steps is not None:
            idle["epochs"] = "beside --max-steps"
        if self.lr_schedule == "constant":
            idle["warmup_steps"] = "with --lr-schedule constant"
        if self.scope == "off":
            reason = "with --balance-scope off" + " (auto)" * (self.balance_scope == "auto")
            idle |= {"load_balancing_coef": reason, "z_loss_coef": reason}
        if self.scope != "running":
            idle["running_decay"] = "without --balance-scope running"
        if not self.num_samples:
            idle["max_new_tokens"] = "with --num-samples 0"
        if self.resume is not None:
            idle |= {"out": "beside --resume", "overwrite": "beside --resume"}
        else:
            idle["allow_changed"] = "without --resume"
            if self.out is None:
                idle["overwrite"] = "without --out"
        return idle

    @property
    def column_names(self) -> dict[str, str]:
        """--columns as our field name -> the file's."""
        names = {}
        for pair in self.columns:
            ours, equals, theirs = pair.partition("=")
            if not (ours and equals and theirs):
                raise UserError(f"--columns {pair}: write our=theirs, as in instruction=question.")
            names[ours] = theirs
        return names


C = TypeVar("C", bound=TrainingConfig)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_training(
    config_class: type[C], argv: Sequence[str] | None, *, prog: str, description: str
) -> Parsed[C]:
    """Flags as a configuration; `--resume RUN` alone takes everything else from that run.

    Raises UserError for an option that was given and has no effect.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if (run := _value_of("--resume", words)) and not _value_of("--config", words):
        stored = Path(run).expanduser() / "config.yaml"
        if not stored.is_file():
            raise UserError(f"{run} is not a run: it has no config.yaml. Give a run's folder.")
        words = ["--config", str(stored), *words]
    parsed = parse(config_class, words, prog=prog, description=description, aliases=ALIASES)
    refuse_idle(parsed, parsed.config.idle())
    return parsed


def kind_of_option(name: str) -> Changeable:
    """What --allow-changed has to name for a resumed run to have another value of this option."""
    return _KIND_OF_OPTION.get(name, "settings")


def _value_of(flag: str, words: Sequence[str]) -> str | None:
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == flag:
            return value if equals else next(iter(words[index + 1 :]), None)
    return None


def refuse_idle(parsed: Parsed[C], idle: Mapping[str, str]) -> None:
    """Raises UserError for the first of these options that was given; built-in values pass."""
    for name, reason in idle.items():
        if parsed.origins.get(name, "built-in") != "built-in":
            raise UserError(f"{_flag(name)} has no effect {reason}: leave it out.")


def in_force(config: TrainingConfig, idle: Mapping[str, str]) -> dict[str, Any]:
    """The options with an effect, as config.yaml holds them; one that is none is left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    return {
        name: value
        for name, value in values.items()
        if name not in idle and name not in PLACES and value is not None
    }


def is_first_process() -> bool:
    """Whether this process prints and writes: the only one, or rank 0 of a launcher's."""
    return os.environ.get("RANK", "0") == "0"


def first_process_speaks(function: Callable[..., int]) -> Callable[..., int]:
    """Decorates a command: under a launcher the other processes print nothing.

    They end with code 2 for a user's mistake, which the first one tells.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> int:
        if is_first_process():
            return function(*args, **kwargs)
        with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
            with contextlib.redirect_stdout(nowhere):
                try:
                    return function(*args, **kwargs)
                except UserError as error:
                    raise SystemExit(getattr(error, "exit_code", 2)) from None

    return guarded
