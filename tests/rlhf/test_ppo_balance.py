"""PPO leaves a policy's selection bias where it was in every step that is not one of the policy."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from rlhf.kl import FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenCopy
from rlhf.reward import scalar_model
from sft.settings import BalancePolicy, TrainSettings


def lm(seed: int) -> Any:
    torch.manual_seed(seed)
    config = MoEConfig(
        vocab_size=32,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        initializer_range=0.2,
        router_selection_bias=True,
    )
    return MoEForCausalLM(config).eval()


def low_ids(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def biases(model: nn.Module) -> Tensor:
    """(L, E)"""
    held = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    return torch.stack(held).clone()


class EachStep(TrainerCallback):
    """The policy's and the critic's biases before the first step and after each."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.policy, self.critic = [biases(trainer.policy)], [biases(trainer.critic)]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.policy.append(biases(self.trainer.policy))
        self.critic.append(biases(self.trainer.critic))


def trained(folder: Path, **ppo: Any) -> tuple[PPOTrainer, EachStep]:
    rng = random.Random(0)
    policy, critic = lm(0), scalar_model(lm(3))
    sizes = {"updates": 2, "episodes": 8, "epochs": 2, "minibatches": 2, "max_new_tokens": 5}
    rules = PPOSettings(**{**sizes, **ppo})
    trainer = PPOTrainer(
        policy,
        TrainSettings(
            max_steps=rules.steps,
            batch_size=rules.minibatch_size,
            lr=1e-2,
            lr_schedule="constant",
            log_steps=1,
        ),
        critic=critic,
        reference=FrozenCopy(policy),
        reward=low_ids,
        rows=[{"prompt_ids": [rng.randrange(3, 32) for _ in range(4)]} for _ in range(13)],
        ppo=rules,
        kl_controller=FixedKL(0.1),
        pad_id=0,
        stop_ids=(2, 5, 7, 9, 11),
        balance=BalancePolicy(scope="off", bias_update_rate=0.01),
        folder=folder,
    )
    seen = EachStep(trainer)
    trainer.add_callback(seen)
    trainer.fit()
    return trainer, seen


def moved(held: list[Tensor]) -> list[bool]:
    return [not torch.equal(a, b) for a, b in zip(held, held[1:], strict=False)]


def test_every_step_of_the_policy_moves_its_bias_and_nobody_elses(tmp_path: Path) -> None:
    trainer, seen = trained(tmp_path)
    assert moved(seen.policy) == [True] * 8 and moved(seen.critic) == [False] * 8
    reference: Any = trainer.reference
    assert not biases(reference.model).any()


def test_a_step_that_the_brake_leaves_out_moves_no_bias(tmp_path: Path) -> None:
    trainer, seen = trained(tmp_path, target_kl=1e-6)
    skipped = [row["policy/skipped_steps"] for row in trainer.state.log_history]
    assert 0 < sum(skipped) < 8
    assert moved(seen.policy) == [not left_out for left_out in skipped]


def test_while_the_critic_warms_up_the_policys_bias_stays(tmp_path: Path) -> None:
    _, seen = trained(tmp_path, critic_warmup=1)
    assert moved(seen.policy) == [step >= 4 for step in range(8)]
