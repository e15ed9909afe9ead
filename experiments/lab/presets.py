"""The sizes at which the worlds of the lab run, and the methods' frozen settings.

`laptop` is what a person waits for; `debug` is the same program in seconds, for tests. The settings
of the methods were chosen by `python -m experiments.compare --tune` (the same number of trials
each, on a seed that is never reported, by learned reward alone) and frozen before the reported
seeds ran.
"""

from dataclasses import dataclass, replace
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


# What is tried: (beta, lr) and (KL coefficient, lr).
FULL_DPO = ((0.1, 1e-4), (0.1, 3e-4), (0.3, 3e-4), (0.3, 6e-4))
LORA_DPO = ((0.1, 1e-3), (0.1, 3e-3), (0.3, 1e-3), (0.3, 3e-3))
FULL_PPO = ((0.1, 2e-4), (0.2, 3e-4), (0.2, 5e-4), (0.3, 5e-4))
LORA_PPO = ((0.1, 1e-3), (0.2, 1e-3), (0.1, 2e-3), (0.2, 2e-3))


@dataclass(frozen=True, kw_only=True)
class Trials:
    """The settings that `--tune` tries; as many for each method."""

    dpo: tuple[DPOArm, ...]
    ppo: tuple[PPOArm, ...]
    best_of_n: tuple[BestOfNArm, ...]


def grid(dpo: DPOArm, ppo: PPOArm, *, lora: bool, best_of_n: tuple[int, ...]) -> Trials:
    """The trials of a world from its settings of the methods; adapters have rates of their own."""
    tried_dpo, tried_ppo = (LORA_DPO, LORA_PPO) if lora else (FULL_DPO, FULL_PPO)
    return Trials(
        dpo=tuple(replace(dpo, beta=beta, lr=lr) for beta, lr in tried_dpo),
        ppo=tuple(replace(ppo, kl_coef=coef, lr=lr) for coef, lr in tried_ppo),
        best_of_n=tuple(BestOfNArm(n=n) for n in best_of_n),
    )


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
class Pretraining:
    """How a language model is made from nothing: fields of MoEConfig, text, optimisation.

    block: tokens of a row.
    """

    model: dict[str, Any]
    vocab_size: int
    num_documents: int
    block: int
    steps: int
    batch: int
    lr: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything that follows from `--world` and `--scale`. Sizes in tokens, rows, steps.

    max_length: tokens of prompt and answer together. pretraining: None where the language model is
    given. few_shot: worked examples in a prompt, 0 where the world has none.
    """

    pretraining: Pretraining | None
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

    def ppo_settings(self, arm: PPOArm, *, missing_eos_penalty: float) -> PPOSettings:
        return PPOSettings(
            updates=arm.updates,
            episodes=arm.episodes,
            epochs=arm.epochs,
            minibatches=arm.minibatches,
            max_new_tokens=self.max_new_tokens,
            missing_eos_penalty=missing_eos_penalty,
        )


_TALES_MODEL = {
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
}

LAPTOP = Scale(
    pretraining=Pretraining(
        model=_TALES_MODEL,
        vocab_size=1024,
        num_documents=9000,
        block=128,
        steps=420,
        batch=16,
        lr=3e-3,
    ),
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
    pretraining=Pretraining(
        model={
            **_TALES_MODEL,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 16,
            "num_experts": 4,
            "window_pattern": "SL",
        },
        vocab_size=320,
        num_documents=60,
        block=64,
        steps=4,
        batch=4,
        lr=3e-3,
    ),
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

# The world `stories`. Completions are about as long as a tale; VADER's spread is half of tales'
# gold's, and so is the temperature of the labels.
STORIES_LAPTOP = Scale(
    pretraining=None,
    num_sft=1200,
    sft_batch=8,
    sft_epochs=1.0,
    sft_lr=1e-3,
    num_pair_prompts=1200,
    label_temperature=0.25,
    rm_epochs=1.5,
    rm_batch=16,
    rm_lr=1e-3,
    rm_val_fraction=0.15,
    max_length=160,
    max_new_tokens=64,
    few_shot=0,
    num_eval_prompts=256,
    num_frontier_prompts=64,
    frontier_points=6,
    num_routing_texts=64,
    save_steps=60,
    dpo=DPOArm(beta=0.1, lr=3e-4, epochs=1.0, batch_size=32),
    ppo=PPOArm(kl_coef=0.1, lr=2e-4, updates=16, episodes=64, epochs=2, minibatches=2),
    best_of_n=BestOfNArm(n=16),
    lora=LoraArms(
        sft_lr=4e-3,
        sft_epochs=2.0,
        rm_lr=3e-3,
        rm_epochs=2.0,
        dpo=DPOArm(beta=0.1, lr=1e-3, epochs=3.0, batch_size=32),
        ppo=PPOArm(kl_coef=0.1, lr=2e-3, updates=20, episodes=64, epochs=2, minibatches=2),
    ),
)

STORIES_DEBUG = replace(
    STORIES_LAPTOP,
    num_sft=24,
    sft_batch=8,
    sft_epochs=1.0,
    num_pair_prompts=24,
    rm_epochs=1.0,
    rm_batch=8,
    rm_val_fraction=0.25,
    max_new_tokens=8,
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

# Each target has a reward of its own, and the methods were tuned for it: what differs from above.
STORIES_NEGATIVE = replace(STORIES_LAPTOP, dpo=DPOArm(beta=0.3, lr=3e-4, epochs=1.0, batch_size=32))
STORIES_SCALES = {
    ("laptop", "positive"): STORIES_LAPTOP,
    ("laptop", "negative"): STORIES_NEGATIVE,
    ("debug", "positive"): STORIES_DEBUG,
    ("debug", "negative"): STORIES_DEBUG,
}
