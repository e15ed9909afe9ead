"""A reference and a reward model are made anew when a run is resumed: another one is noticed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenAdapter, FrozenCopy, beside_the_policy
from rlhf.reward import ModelReward, scalar_model
from sft.adapt import LoraSpec, add_lora, copy_adapter
from sft.checkpoint import read_checkpoint
from sft.rows import PreferenceCollator
from sft.settings import TrainSettings
from sft.trainer import StageTrainer

SPEC = LoraSpec(rank=2, alpha=4, targets=("attention", "experts"))


def tiny_lm(seed: int = 0) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, initializer_range=0.2,
        )
    )  # fmt: skip


def scalar(seed: int) -> Any:
    lm = tiny_lm(seed)
    torch.manual_seed(seed)
    return scalar_model(lm)


def settings(**changes: Any) -> TrainSettings:
    chosen = {"max_steps": 2, "batch_size": 4, "lr": 1e-2, "log_steps": 1, "save_steps": 1}
    return TrainSettings(**{**chosen, **changes})


def dpo(folder: Path, *, reference: int = 0, judge: int = 0, **options: Any) -> StageTrainer:
    rows = [
        {"prompt_ids": [4, 5 + i], "chosen_ids": [6, 2], "rejected_ids": [7, 8, 2], "sample_id": i}
        for i in range(8)
    ]
    return DPOTrainer(
        tiny_lm(),
        settings(),
        reference=FrozenCopy(tiny_lm(reference)),
        rows=rows,
        collator=PreferenceCollator(0),
        folder=folder,
        **options,
    )


def ppo(folder: Path, *, reference: int = 0, judge: int = 4, **options: Any) -> StageTrainer:
    return PPOTrainer(
        tiny_lm(),
        settings(adam_eps=1e-5),
        critic=scalar(3),
        reference=FrozenCopy(tiny_lm(reference)),
        reward=ModelReward(model=scalar(judge)),
        rows=[{"prompt_ids": [4, 5 + i]} for i in range(8)],
        ppo=PPOSettings(updates=1, episodes=4, epochs=2, max_new_tokens=3),
        kl_controller=FixedKL(0.1),
        pad_id=0,
        stop_ids=(2,),
        folder=folder,
        **options,
    )


@pytest.mark.parametrize(
    ("build", "change", "what"),
    [
        (dpo, {"reference": 1}, "reference"),
        (ppo, {"reference": 1}, "reference"),
        (ppo, {"judge": 5}, "reward"),
    ],
)
def test_another_frozen_model_is_refused_unless_it_is_allowed(
    tmp_path: Path, build: Callable[..., StageTrainer], change: dict[str, int], what: str
) -> None:
    build(tmp_path).fit()
    prints: Any = read_checkpoint(tmp_path / "checkpoint-2").manifest["fingerprints"]
    assert set(prints) == ({"reference"} if build is dpo else {"reference", "reward"})
    with pytest.raises(UserError) as caught:
        build(tmp_path, **change).fit(resume=True)
    assert f"cannot be resumed: fingerprint of {what} was {prints[what]}, is " in str(caught.value)
    assert str(caught.value).endswith(" --allow-changed model goes on all the same.")
    build(tmp_path, **change, allow_changed=("model",)).fit(resume=True)
    build(tmp_path).fit(resume=True)


def test_an_adapter_is_in_the_checkpoint_and_needs_no_fingerprint() -> None:
    model: Any = add_lora(tiny_lm(), SPEC, name="sft")
    copy_adapter(model, "sft", name="policy")
    assert beside_the_policy(FrozenAdapter(model, "sft")) == {}
    assert beside_the_policy(FrozenAdapter(model, None)) == {}
    copied = FrozenCopy(model)
    assert beside_the_policy(copied) == {"reference": copied.model}


def test_a_reward_that_is_no_model_has_no_fingerprint(tmp_path: Path) -> None:
    def rule(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        return input_ids_BS.float().mean(dim=1)

    trainer: Any = ppo(tmp_path)
    trainer.reward = rule
    found: dict[str, nn.Module] = trainer.frozen_models()
    assert set(found) == {"reference"}
