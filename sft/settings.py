"""What a stage's optimisation is made of, and how its routers are balanced: plain data.

Sizes are given for the whole optimizer step over all processes; what one process does follows.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn
from transformers import TrainingArguments

from moe.errors import UserError
from sft.adapt import base_of

BalanceScope = Literal["off", "micro_batch", "sequence", "optimizer_step", "running"]


@dataclass(frozen=True, kw_only=True)
class BalancePolicy:
    """How a stage balances its routers: by losses, by a selection bias, by both or by neither.

    scope: what the expert fractions f of the load-balancing loss are counted over. `micro_batch` is
    what most frameworks do, and alone depends on how a batch is split. `sequence`: each row of the
    batch by itself (DeepSeek-V3). `optimizer_step`: the whole step, all micro-batches and processes
    (Qiu et al. 2025, arXiv 2501.11873, exactly); with accumulation it costs one more forward pass
    without gradients. `running`: the steps before this one, the n-th last weighing
    running_decay ** n, at no cost; in the first step f is even, which pulls nowhere.
    bias_update_rate: gamma of `moe.balance.update_selection_bias`, whatever the scope; 0 leaves
    the bias as it is.
    """

    scope: BalanceScope = "micro_batch"
    load_balancing_coef: float = 0.0
    z_loss_coef: float = 0.0
    running_decay: float = 0.9
    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.scope not in get_args(BalanceScope):
            raise UserError(
                f"scope {self.scope!r} is unknown: give one of {', '.join(get_args(BalanceScope))}."
            )
        for name in ("load_balancing_coef", "z_loss_coef", "bias_update_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} {getattr(self, name)} must be at least 0 and finite.")
        if not 0 <= self.running_decay < 1:
            raise UserError(
                f"running_decay {self.running_decay} must be at least 0 (the last step alone) and "
                "below 1."
            )

    @classmethod
    def of_model(cls, model: nn.Module, *, scope: BalanceScope = "micro_batch") -> "BalancePolicy":
        """The coefficients that the model's own configuration names."""
        config = getattr(base_of(model), "config", None)
        # Another family has its own name for the coefficient; the loss is ours, per layer.
        theirs = getattr(config, "router_aux_loss_coef", 0.0)
        return cls(
            scope=scope,
            load_balancing_coef=float(getattr(config, "load_balancing_coef", theirs)),
            z_loss_coef=float(getattr(config, "z_loss_coef", 0.0)),
        )

    @property
    def on(self) -> bool:
        """Whether there is a loss to add."""
        return self.scope != "off" and (self.load_balancing_coef > 0 or self.z_loss_coef > 0)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a stage's optimisation is made of.

    batch_size: rows of one optimizer step over all processes; micro_batch_size: rows of one forward
    pass on one process (0: as many as there are). max_steps: optimizer steps.
    """

    max_steps: int
    batch_size: int
    micro_batch_size: int = 0
    lr: float = 1e-3
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    seed: int = 0
    log_steps: int = 10
    save_steps: int = 0
    keep_checkpoints: int = 2
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_steps", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        if self.micro_batch_size < 0:
            raise UserError(f"micro_batch_size is {self.micro_batch_size}: it must be at least 0.")
        if not self.lr > 0:
            raise UserError(f"lr {self.lr} must be above 0.")

    def per_process(self, num_processes: int) -> tuple[int, int]:
        """(micro-batch size, accumulation steps). Raises UserError if the batch does not divide."""
        if self.batch_size % num_processes:
            raise UserError(
                f"batch_size {self.batch_size} does not divide over {num_processes} processes."
            )
        share = self.batch_size // num_processes
        micro = self.micro_batch_size or share
        if share % micro:
            allowed = [m for m in range(1, share + 1) if share % m == 0]
            raise UserError(
                f"batch_size {self.batch_size} over {num_processes} processes is {share} rows "
                f"each, not a multiple of micro_batch_size {micro}: try one of {allowed}."
            )
        return micro, share // micro


def training_arguments(settings: TrainSettings, folder: Path) -> TrainingArguments:
    """Our settings in Hugging Face's words. The process count comes from the launcher."""
    from accelerate import PartialState

    cpu = not torch.cuda.is_available()
    processes = PartialState(cpu=cpu).num_processes
    micro, accumulation = settings.per_process(processes)
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.max_steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_eps,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch_fused",
        seed=settings.seed,
        logging_steps=settings.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 1,
        report_to="none",
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
        disable_tqdm=True,
        use_cpu=cpu,
        bf16=False,
        eval_strategy="no",
        activation_checkpointing=settings.activation_checkpointing,
        ddp_find_unused_parameters=False,
    )
