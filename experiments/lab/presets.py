"""The sizes at which the experiments on the world `tales` run, and the methods' frozen settings.

`laptop` is what `make run` does; `debug` is the same program in seconds, for tests. The settings of
the methods were chosen by `python -m experiments.compare --tune` (the same number of trials each,
on a seed that is never reported, by learned reward alone) and frozen before the reported seeds ran.
"""

from dataclasses import dataclass
from typing import Any

from rlhf.ppo import PPOSettings
from sft.settings import TrainSettings


@dataclass(frozen=True, kw_only=True)
class DPOArm:
    """Settings of the DPO arm: passes over the pairs, pairs per step."""

    beta: float
    lr: float
    epochs: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class PPOArm:
    """Settings of the PPO arm; see `rlhf.ppo.PPOSettings`."""

    kl_coef: float
    lr: float
    updates: int
    episodes: int
    epochs: int
    minibatches: int


@dataclass(frozen=True, kw_only=True)
class BestOfNArm:
    """Settings of the best-of-n arm."""

    n: int


@dataclass(frozen=True, kw_only=True)
class LoraArms:
    """What differs under adapters: they start at zero, want other rates and more steps.

    With the epochs of full updates they stop half-way: results/compare/tuning-lora8-steps.
    """

    sft_lr: float
    sft_epochs: float
    rm_lr: float
    rm_epochs: float
    dpo: DPOArm
    ppo: PPOArm


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that follows from `--scale`. Sizes in tokens, rows, steps.

    block: tokens of a pretraining row. max_length: tokens of prompt and answer together.
    """

    model: dict[str, Any]
    vocab_size: int
    num_documents: int
    block: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    num_sft: int
    sft_batch: int
    sft_epochs: float
    sft_lr: float
    num_pair_prompts: int
    label_temperature: float
    rm_epochs: float
    rm_batch: int
    rm_lr: float
    rm_val_fraction: float
    max_length: int
    max_new_tokens: int
    few_shot: int
    num_eval_prompts: int
    num_frontier_prompts: int
    frontier_points: int
    num_routing_texts: int
    save_steps: int
    dpo: DPOArm
    ppo: PPOArm
    best_of_n: BestOfNArm
    lora: LoraArms

    def train(self, *, rows: int, batch: int, epochs: float, lr: float, seed: int) -> TrainSettings:
        """Settings of a supervised stage over so many rows."""
        return TrainSettings(
            max_steps=max(1, round(rows * epochs / batch)),
            batch_size=batch,
            lr=lr,
            warmup_steps=5,
            seed=seed,
            log_steps=5,
            save_steps=self.save_steps,
            keep_checkpoints=1,
        )

    def ppo_settings(self, arm: PPOArm) -> PPOSettings:
        return PPOSettings(
            updates=arm.updates,
            episodes=arm.episodes,
            epochs=arm.epochs,
            minibatches=arm.minibatches,
            max_new_tokens=self.max_new_tokens,
            missing_eos_penalty=1.0,
        )


LAPTOP = Scale(
    model={
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "intermediate_size": 192,
        "sliding_window": 32,
        "window_pattern": "SSSL",
        "max_position_embeddings": 512,
        "initializer_range": 0.06,
    },
    vocab_size=1024,
    num_documents=9000,
    block=128,
    pretrain_steps=420,
    pretrain_batch=16,
    pretrain_lr=3e-3,
    num_sft=2400,
    sft_batch=32,
    sft_epochs=3.0,
    sft_lr=2e-3,
    num_pair_prompts=2400,
    label_temperature=0.5,
    rm_epochs=2.0,
    rm_batch=32,
    rm_lr=1e-3,
    rm_val_fraction=0.15,
    max_length=96,
    max_new_tokens=56,
    few_shot=2,
    num_eval_prompts=256,
    num_frontier_prompts=64,
    frontier_points=6,
    num_routing_texts=96,
    save_steps=60,
    dpo=DPOArm(beta=0.3, lr=6e-4, epochs=1.0, batch_size=32),
    ppo=PPOArm(kl_coef=0.2, lr=5e-4, updates=40, episodes=64, epochs=2, minibatches=2),
    best_of_n=BestOfNArm(n=32),
    lora=LoraArms(
        sft_lr=8e-3,
        sft_epochs=6.0,
        rm_lr=2e-3,
        rm_epochs=6.0,
        dpo=DPOArm(beta=0.3, lr=1e-3, epochs=3.0, batch_size=32),
        ppo=PPOArm(kl_coef=0.1, lr=2e-3, updates=40, episodes=64, epochs=2, minibatches=2),
    ),
)

DEBUG = Scale(
    model={
        **LAPTOP.model,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "window_pattern": "SL",
    },
    vocab_size=320,
    num_documents=60,
    block=64,
    pretrain_steps=4,
    pretrain_batch=4,
    pretrain_lr=3e-3,
    num_sft=24,
    sft_batch=8,
    sft_epochs=1.0,
    sft_lr=1e-3,
    num_pair_prompts=24,
    label_temperature=0.5,
    rm_epochs=1.0,
    rm_batch=8,
    rm_lr=1e-3,
    rm_val_fraction=0.25,
    max_length=224,
    max_new_tokens=8,
    few_shot=1,
    num_eval_prompts=12,
    num_frontier_prompts=6,
    frontier_points=5,
    num_routing_texts=6,
    save_steps=2,
    dpo=DPOArm(beta=0.1, lr=3e-4, epochs=3.0, batch_size=8),
    ppo=PPOArm(kl_coef=0.05, lr=3e-4, updates=3, episodes=8, epochs=1, minibatches=2),
    best_of_n=BestOfNArm(n=2),
    lora=LoraArms(
        sft_lr=4e-3,
        sft_epochs=1.0,
        rm_lr=2e-3,
        rm_epochs=1.0,
        dpo=DPOArm(beta=0.1, lr=6e-4, epochs=3.0, batch_size=8),
        ppo=PPOArm(kl_coef=0.05, lr=6e-4, updates=3, episodes=8, epochs=1, minibatches=2),
    ),
)

SCALES = {"laptop": LAPTOP, "debug": DEBUG}
