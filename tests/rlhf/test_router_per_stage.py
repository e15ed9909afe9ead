"""How each stage treats its routers: frozen, balanced by a loss or by a bias, or left alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.router_modules import router_parameters
from rlhf.dpo import DPOTrainer
from rlhf.kl import FixedKL
from rlhf.kto import KTOTrainer
from rlhf.options import COMMAND, Config, Method
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenCopy
from rlhf.reward import RewardTrainer, scalar_model
from sft.adapt import LoraSpec, add_lora
from sft.command import parse_training
from sft.rows import PreferenceCollator
from sft.session import balance_policy
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import StageTrainer
from sft.unpaired import UnpairedCollator

SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS = TrainSettings(max_steps=2, batch_size=4, lr=1e-2, lr_schedule="constant", log_steps=1)


def ours(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZE, "moe_intermediate_size": 8, "num_experts": 4, "initializer_range": 0.2}
    return MoEForCausalLM(MoEConfig(**{**sizes, **changes}))


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4))


def dpo(folder: Path, model: Any, **options: Any) -> StageTrainer:
    rows = [
        {
            "prompt_ids": [3, i + 4],
            "chosen_ids": [5, 6 + i],
            "rejected_ids": [8, 9 + i % 3],
            "sample_id": i,
        }
        for i in range(8)
    ]
    return DPOTrainer(
        model, options.pop("settings", SETTINGS), reference=FrozenCopy(model), rows=rows,
        collator=PreferenceCollator(pad_id=0), folder=folder, **options,
    )  # fmt: skip


def kto(folder: Path, model: Any, **options: Any) -> StageTrainer:
    rows = [
        {
            "prompt_ids": [3, i + 4],
            "completion_ids": [5, 6 + i],
            "other_ids": [5, 6 + (i + 1) % 8],
            "is_good": i % 2 == 0,
            "sample_id": i,
        }
        for i in range(8)
    ]
    return KTOTrainer(
        model, options.pop("settings", SETTINGS), reference=FrozenCopy(model), rows=rows,
        collator=UnpairedCollator(pad_id=0), folder=folder, **options,
    )  # fmt: skip


def rm(folder: Path, model: Any, **options: Any) -> StageTrainer:
    rows = [
        {
            "prompt_ids": [3, i + 4],
            "chosen_ids": [5, 6 + i],
            "rejected_ids": [8, 9 + i % 3],
            "sample_id": i,
        }
        for i in range(8)
    ]
    return RewardTrainer(
        scalar_model(model), options.pop("settings", SETTINGS), rows=rows,
        collator=PreferenceCollator(pad_id=0), folder=folder, **options,
    )  # fmt: skip


def policy_gradient(folder: Path, model: Any, **options: Any) -> StageTrainer:
    rules = PPOSettings(updates=1, episodes=4, epochs=2, max_new_tokens=4, advantage="reinforce_pp")
    return PPOTrainer(
        model, options.pop("settings", SETTINGS), critic=None, reference=FrozenCopy(model),
        reward=lambda ids, mask: torch.where(mask.bool(), ids, 0).sum(dim=1).float(),
        rows=[{"prompt_ids": [3, 4 + i]} for i in range(4)], ppo=rules,
        kl_controller=FixedKL(0.1), pad_id=0, stop_ids=(2,), folder=folder, **options,
    )  # fmt: skip


STAGES: dict[str, Callable[..., StageTrainer]] = {
    "rm": rm, "dpo": dpo, "kto": kto, "ppo": policy_gradient,
}  # fmt: skip
every_stage = pytest.mark.parametrize("stage", STAGES)


@every_stage
@pytest.mark.parametrize("make", [ours, mixtral])
def test_a_frozen_router_keeps_its_bits_and_the_rest_learns(
    stage: str, make: Any, tmp_path: Path
) -> None:
    trainer = STAGES[stage](tmp_path, make(), freeze_router=True)
    routers = router_parameters(trainer.routed_part)
    everything = dict(trainer.routed_part.named_parameters())
    before = {name: p.detach().clone() for name, p in everything.items()}
    trainer.fit()
    assert len(routers) == 2
    for name, parameter in everything.items():
        same = torch.equal(before[name], parameter)
        if name in routers:
            assert same and parameter.grad is None
        elif "experts" in name or "q_proj" in name:
            assert not same, name
    held = trainer.optimizer.param_groups  # type: ignore[union-attr]
    trained = {id(p) for group in held for p in group["params"]}
    assert not trained & {id(p) for p in routers.values()}


def test_without_the_option_routers_learn(tmp_path: Path) -> None:
    model = ours()
    before = {name: p.detach().clone() for name, p in router_parameters(model).items()}
    policy_gradient(tmp_path, model).fit()
    assert all(not torch.equal(before[n], p) for n, p in router_parameters(model).items())


def test_freezing_is_refused_where_no_router_would_be_trained(tmp_path: Path) -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZE))
    for stage in STAGES.values():
        with pytest.raises(UserError, match="has no router to freeze"):
            stage(tmp_path, llama, freeze_router=True)
    adapted = add_lora(ours(), LoraSpec(rank=2, alpha=4, targets=("attention",)))
    with pytest.raises(UserError, match="freeze_router has no effect: no router's weights"):
        policy_gradient(tmp_path, adapted, freeze_router=True)


def test_a_router_that_an_adapter_would_train_is_frozen_with_it(tmp_path: Path) -> None:
    model: nn.Module = add_lora(ours(), LoraSpec(rank=2, alpha=4, targets=("attention", "router")))
    policy_gradient(tmp_path, model, freeze_router=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("self_attn" in name for name in trained)


def test_a_resumed_run_has_to_freeze_what_was_frozen(tmp_path: Path) -> None:
    settings = TrainSettings(max_steps=2, batch_size=4, lr=1e-2, save_steps=1)
    dpo(tmp_path, ours(), settings=settings, freeze_router=True).fit()
    with pytest.raises(UserError, match="freeze_router was True, is False"):
        dpo(tmp_path, ours(), settings=settings).fit(resume=True)


def test_every_method_has_the_flag() -> None:
    for method in ("rm", "dpo", "kto", "ppo", "gspo"):
        assert asked(method, "--freeze-router").freeze_router


@pytest.mark.parametrize("flags", [
    ("--replay", "rollout"), ("--rollout-numerics", "bf16"), ("--rollout-noise", "0.1"),
    ("--mismatch-correction", "token"), ("--mismatch-cap", "3"),
])  # fmt: skip
def test_what_belongs_to_a_sampled_policy_is_refused_elsewhere(flags: tuple[str, str]) -> None:
    for method in ("rm", "dpo", "kto"):
        with pytest.raises(UserError, match=f"{flags[0]} has no effect"):
            asked(method, *flags)


def asked(method: Method | str, *flags: str) -> Config:
    words = ["--method", method, "--model", "m", "--data", "d", *flags]
    words += ["--reward-model", "r"] if method not in ("rm", "dpo", "kto") else []
    return parse_training(Config, words, prog=COMMAND, description="").config


@pytest.mark.parametrize("method", ["rm", "dpo", "ppo", "gspo"])
def test_every_balance_of_a_stage_is_reached_by_flags(method: str) -> None:
    model = ours(load_balancing_coef=0.01, z_loss_coef=0.0)

    def policy(*flags: str, of: Any = model) -> BalancePolicy:
        return balance_policy(asked(method, *flags), of)[0]

    assert policy().on == (method == "rm")  # a policy is balanced only when asked
    assert not policy("--balance-scope", "off").on
    on = policy("--balance-scope", "optimizer_step")
    assert on.on and (on.load_balancing_coef, on.z_loss_coef) == (0.01, 0.0)
    scope = ("--balance-scope", "micro_batch")
    z_only = policy(*scope, "--load-balancing-coef", "0", "--z-loss-coef", "0.001")
    assert z_only.on and (z_only.load_balancing_coef, z_only.z_loss_coef) == (0.0, 0.001)
    biased = ours(router_selection_bias=True, scoring_func="sigmoid")
    bias = policy("--balance-scope", "off", "--bias-update-rate", "0.001", of=biased)
    assert not bias.on and bias.bias_update_rate == 0.001


@pytest.mark.parametrize("kind", ["z", "bias"])
def test_z_loss_alone_and_bias_alone_train_a_policy(kind: str, tmp_path: Path) -> None:
    model = ours(router_selection_bias=kind == "bias", scoring_func="sigmoid")
    balance = (
        BalancePolicy(scope="micro_batch", z_loss_coef=0.1)
        if kind == "z"
        else BalancePolicy(scope="off", bias_update_rate=0.01)
    )
    trainer = policy_gradient(tmp_path, model, balance=balance)
    trainer.fit()
    assert ("router/z_loss" in trainer.state.log_history[0]) == (kind == "z")
    biases = [b for name, b in model.named_buffers() if "correction_bias" in name]
    assert all(b.any() for b in biases) and bool(biases) == (kind == "bias")
