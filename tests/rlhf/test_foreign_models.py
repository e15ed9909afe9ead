"""Every trainer takes a real step of an unmodified Hugging Face model of four families."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import ModelReward, RewardTrainer, scalar_head, scalar_model
from sft.adapt import LORA_PARTS, LoraSpec, add_lora, trainable_by_part
from sft.rows import PreferenceCollator, SupervisedCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import SFTTrainer, StageTrainer

VOCABULARY = 40
PAD, EOS = 0, 1
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": EOS,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=2))


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=2, tie_word_embeddings=True))


def gpt_neox() -> PreTrainedModel:
    """With dropout, which every trainer but SFT has to switch off."""
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, attention_dropout=0.1, hidden_dropout=0.1))


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        **SIZE, num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.02
    )
    return MixtralForCausalLM(config)


FAMILIES = (llama, qwen2, gpt_neox, mixtral)
Make = Callable[[], PreTrainedModel]
every_family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
full_and_lora = pytest.mark.parametrize("rank", [0, 2], ids=["full", "lora"])


def made(make: Make) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


def with_adapter(model: nn.Module, rank: int) -> nn.Module:
    """The model itself for rank 0, else under an adapter on every part that it has."""
    if not rank:
        return model
    parts = tuple(part for part in LORA_PARTS if part in trainable_by_part(model))
    return add_lora(model, LoraSpec(rank=rank, alpha=8.0, targets=parts))


def settings(**changed: Any) -> TrainSettings:
    values = {"max_steps": 1, "batch_size": 4, "micro_batch_size": 2, "lr": 1e-2, "log_steps": 1}
    return TrainSettings(**{**values, **changed})


def ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def pair_rows() -> list[dict[str, Any]]:
    prompts, chosen, rejected = ids(3, 5, 4, 6), ids(4, 2, 5, 3, seed=1), ids(2, 6, 3, 4, seed=2)
    return [
        {"prompt_ids": p, "chosen_ids": [*c, EOS], "rejected_ids": r, "sample_id": i}
        for i, (p, c, r) in enumerate(zip(prompts, chosen, rejected, strict=True))
    ]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_only_trainable_moved(
    model: nn.Module, before: dict[str, torch.Tensor], *, still: Collection[str] = ()
) -> None:
    """Each trainable tensor changed, but those in `still`; each frozen one has the same bits."""
    for name, parameter in model.named_parameters():
        if name in still:
            continue
        same = torch.equal(parameter, before[name])
        # At the start B is 0, so A has no gradient in the first step.
        if parameter.requires_grad and "lora_A" not in name:
            assert not same, f"{name} did not move"
        elif not parameter.requires_grad:
            assert same, f"{name} is frozen and moved"


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def logged(trainer: StageTrainer) -> dict[str, float]:
    return dict(trainer.state.log_history[-1])


def assert_router_seen(trainer: StageTrainer, make: Make, *, balanced: bool) -> None:
    names = set(logged(trainer))
    assert ("router/load_entropy/layer_01" in names) == (make is mixtral)
    assert ("router/balance_loss" in names) == (make is mixtral and balanced)


@every_family
@full_and_lora
def test_sft_step_moves_what_is_trained(make: Make, rank: int, tmp_path: Path) -> None:
    base = made(make)
    balance = BalancePolicy.of_model(base)
    model = with_adapter(base, rank)
    before = snapshot(model)
    rows = [
        {"input_ids": row, "labels": [-100, *row[1:]], "sample_id": i}
        for i, row in enumerate(ids(7, 9, 5, 8))
    ]
    trainer = SFTTrainer(
        model,
        settings(),
        rows=rows,
        collator=SupervisedCollator(PAD),
        folder=tmp_path,
        balance=balance,
    )
    trainer.fit()
    assert_only_trainable_moved(model, before)
    assert_router_seen(trainer, make, balanced=True)
    if make is mixtral:
        assert balance.load_balancing_coef == 0.02
        # 1 at uniform routing; 2 = experts / top-k when all tokens choose the same.
        assert 0.9 < logged(trainer)["router/balance_loss"] < 2.0


@every_family
@full_and_lora
def test_reward_step_moves_head_and_what_is_trained(make: Make, rank: int, tmp_path: Path) -> None:
    scalar = scalar_model(made(make))
    balance = BalancePolicy.of_model(scalar)
    model = with_adapter(scalar, rank)
    before = snapshot(model)
    trainer = RewardTrainer(
        model,
        settings(),
        rows=pair_rows(),
        collator=PreferenceCollator(PAD),
        folder=tmp_path,
        balance=balance,
    )
    trainer.fit()
    # Bradley-Terry sees differences only, so the head's bias has no gradient.
    bias = scalar_head(model).bias
    still = {name for name, parameter in model.named_parameters() if parameter is bias}
    assert_only_trainable_moved(model, before, still=still)
    assert_router_seen(trainer, make, balanced=True)


def reference_of(model: nn.Module, rank: int) -> Reference:
    return FrozenAdapter(model, None) if rank else FrozenCopy(model)


@every_family
@full_and_lora
def test_dpo_starts_at_ln_2_and_moves_the_policy_only(
    make: Make, rank: int, tmp_path: Path
) -> None:
    model = with_adapter(made(make), rank)
    reference = reference_of(model, rank)
    frozen = snapshot(reference.model) if isinstance(reference, FrozenCopy) else {}
    before = snapshot(model)
    trainer = DPOTrainer(
        model,
        settings(),
        reference=reference,
        rows=pair_rows(),
        collator=PreferenceCollator(PAD),
        folder=tmp_path,
    )
    trainer.fit()  # raises unless the loss of the first step is ln 2
    assert logged(trainer)["train/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert_only_trainable_moved(model, before)
    if isinstance(reference, FrozenCopy):
        assert_same_bits(reference.model, frozen)
    assert_router_seen(trainer, make, balanced=False)


@every_family
@full_and_lora
def test_ppo_step_moves_policy_and_critic_only(make: Make, rank: int, tmp_path: Path) -> None:
    base = made(make)
    reward_model = scalar_model(base).eval().requires_grad_(False)
    critic = with_adapter(scalar_model(base), rank)
    policy = with_adapter(base, rank)
    reference = reference_of(policy, rank)
    frozen = snapshot(reference.model) if isinstance(reference, FrozenCopy) else {}
    befores = [snapshot(model) for model in (policy, critic, reward_model)]
    ppo = PPOSettings(updates=1, episodes=4, epochs=1, minibatches=1, max_new_tokens=5)
    trainer = PPOTrainer(
        policy,
        settings(max_steps=ppo.steps, batch_size=ppo.minibatch_size),
        critic=critic,
        reference=reference,
        reward=ModelReward(model=reward_model),
        rows=[{"prompt_ids": row} for row in ids(3, 6, 4, 5)],
        ppo=ppo,
        kl_controller=FixedKL(0.05),
        pad_id=PAD,
        stop_ids=(EOS,),
        folder=tmp_path,
    )
    trainer.fit()  # raises unless the first ratios are 1
    assert_only_trainable_moved(policy, befores[0])
    assert_only_trainable_moved(critic, befores[1])
    assert_same_bits(reward_model, befores[2])
    if isinstance(reference, FrozenCopy):
        assert_same_bits(reference.model, frozen)
    last = logged(trainer)
    assert last["policy/ratio_max_deviation"] < 1e-4
    assert last["policy/kl_sequence"] == pytest.approx(0.0, abs=1e-4)
    assert_router_seen(trainer, make, balanced=False)
