"""Which routers preference and RL stages refuse, in which words, and what a permission changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moe import MoEConfig, MoEForCausalLM, MoEForValue
from moe.errors import UserError
from rlhf.dpo import DPOTrainer
from rlhf.reference import FrozenCopy
from rlhf.reward import RewardTrainer, scalar_model
from rlhf.routing_guard import has_noisy_router, refuse_batch_coupling
from sft.rows import PreferenceCollator, SupervisedCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import SFTTrainer

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "initializer_range": 0.2,
}
EXPERT_CHOICE: dict[str, Any] = {
    "router_kind": "expert_choice",
    "norm_topk_prob": False,
    "load_balancing_coef": 0.0,
    "z_loss_coef": 0.0,
}


def tiny_lm(**config: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(MoEConfig(**{**SIZES, **config}))


def pairs() -> list[Any]:
    return [
        {
            "prompt_ids": [3, i % 9 + 4],
            "chosen_ids": [5, 6 + i % 5, 7],
            "rejected_ids": [8, 9 + i % 3],
            "sample_id": i,
        }
        for i in range(8)
    ]


def trainer_of(model: nn.Module, folder: Path, **options: Any) -> DPOTrainer:
    return DPOTrainer(
        model,
        TrainSettings(max_steps=2, batch_size=4, lr=1e-2),
        reference=FrozenCopy(model),
        rows=pairs(),
        collator=PreferenceCollator(pad_id=0),
        folder=folder,
        **options,
    )


CASES: list[tuple[dict[str, Any], str]] = [
    (
        {"capacity_factor": 1.5, "capacity_scope": "sequence"},
        "capacity_factor 1.5 makes a token's log-probability depend on the tokens after it, so "
        "ratios and margins would not be the policy's: set capacity_factor to None (dropless) for "
        "preference and RL stages, or give allow_batch_dependent_routing.",
    ),
    (
        EXPERT_CHOICE,
        "router kind 'expert_choice' makes a token's log-probability depend on its batch "
        "neighbours, so ratios and margins would not be the policy's: take a dropless router of "
        "kind top_k or hash for preference and RL stages, or give allow_batch_dependent_routing.",
    ),
    (
        {"router_jitter_noise": 0.01},
        "jitter_noise 0.01 makes log-probabilities in training random, so ratios and margins would "
        "not be the policy's: set it to 0 for preference and RL stages, or give "
        "allow_batch_dependent_routing.",
    ),
]


@pytest.mark.parametrize(("fields", "sentence"), CASES, ids=lambda v: str(v)[:40])
def test_a_router_that_is_not_the_policys_alone_is_refused_unless_asked(
    fields: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        refuse_batch_coupling(tiny_lm(**fields))
    assert str(caught.value) == sentence
    refuse_batch_coupling(tiny_lm(**fields), allowed=True)


def test_a_router_with_nothing_to_allow_makes_the_permission_an_error() -> None:
    with pytest.raises(UserError, match="allow_batch_dependent_routing has no effect"):
        refuse_batch_coupling(tiny_lm(), allowed=True)


def test_one_of_several_models_is_enough_to_refuse() -> None:
    torch.manual_seed(0)
    critic = MoEForValue(MoEConfig(**SIZES, capacity_factor=1.0))
    refuse_batch_coupling(tiny_lm())
    with pytest.raises(UserError, match="capacity_factor 1.0"):
        refuse_batch_coupling(tiny_lm(), critic)


def test_hash_sigmoid_biased_routers_and_other_families_pass() -> None:
    refuse_batch_coupling(tiny_lm(router_kind="hash", load_balancing_coef=0.0))
    refuse_batch_coupling(tiny_lm(scoring_func="sigmoid", router_selection_bias=True))
    llama = LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    refuse_batch_coupling(LlamaForCausalLM(llama))


@pytest.mark.parametrize(
    "fields",
    [{"capacity_factor": 0.5}, {"router_jitter_noise": 0.2, "router_logit_noise": 0.5}],
    ids=["capacity", "noise"],
)
def test_dpo_trains_such_a_router_when_asked_and_records_that_it_was(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = tiny_lm(**fields)
    with pytest.raises(UserError, match="or give allow_batch_dependent_routing"):
        trainer_of(model, tmp_path)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = trainer_of(model, tmp_path, allow_batch_dependent_routing=True)
    assert trainer.own_settings()["allow_batch_dependent_routing"] is True
    assert trainer.is_noisy == has_noisy_router(model) == ("router_jitter_noise" in fields)
    trainer.fit()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "fields",
    [
        EXPERT_CHOICE,
        {"capacity_factor": 0.5, "capacity_scope": "sequence", "drop_order": "score"},
        {"router_jitter_noise": 0.1},
        {"router_kind": "hash", "load_balancing_coef": 0.0},
    ],
    ids=["expert choice", "capacity", "noise", "hash"],
)
def test_supervised_and_reward_training_take_every_router(
    tmp_path: Path, fields: dict[str, Any]
) -> None:
    settings = TrainSettings(max_steps=2, batch_size=4, lr=1e-2, log_steps=1)
    texts = [
        {"input_ids": [3, 4 + i, 5, 6], "labels": [-100, 4 + i, 5, 6], "sample_id": i}
        for i in range(8)
    ]
    supervised = SFTTrainer(
        tiny_lm(**fields), settings, rows=texts,
        collator=SupervisedCollator(pad_id=0), folder=tmp_path / "sft",
        balance=BalancePolicy.of_model(tiny_lm(**fields)),
    )  # fmt: skip
    reward = RewardTrainer(
        scalar_model(tiny_lm(**fields)), settings, rows=pairs(),
        collator=PreferenceCollator(pad_id=0), folder=tmp_path / "rm",
    )  # fmt: skip
    supervised.fit()
    reward.fit()
    assert supervised.state.global_step == reward.state.global_step == 2


def test_the_permission_leaves_no_mark_where_it_was_not_given(tmp_path: Path) -> None:
    assert set(trainer_of(tiny_lm(), tmp_path).own_settings()) == {"loss"}
