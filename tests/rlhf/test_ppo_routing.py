"""What each pass of PPO routes: flips between passes, and the use of experts by each model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.generation import sample
from moe.record import record_routing
from moe.stats import RouterStats
from rlhf.kl import FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenCopy
from rlhf.reward import ModelReward, scalar_model
from rlhf.routing_watch import NO_PASS, Watch, choices, flip_metrics, rollout_choices, watched
from sft.settings import TrainSettings

SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def ours(seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {**SIZE, "moe_intermediate_size": 8, "num_experts": 4, "initializer_range": 0.2}
    return MoEForCausalLM(MoEConfig(**{**sizes, **changes})).eval()


def mixtral(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return MixtralForCausalLM(
        MixtralConfig(**SIZE, num_local_experts=4, initializer_range=0.2)
    ).eval()


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()


def some_reward(input_ids_BS: Any, attention_mask_BS: Any) -> Any:
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def ppo_trainer(
    folder: Path,
    policy: Any,
    *,
    critic: Any,
    reference: nn.Module,
    reward: Any = some_reward,
    micro: int = 0,
    **ppo: Any,
) -> PPOTrainer:
    sizes = {"updates": 2, "episodes": 8, "epochs": 2, "max_new_tokens": 5}
    rules = PPOSettings(**{**sizes, **ppo})
    prompts = [{"prompt_ids": list(range(3, 5 + i))} for i in range(5)]
    return PPOTrainer(
        policy,
        TrainSettings(
            max_steps=rules.steps, batch_size=rules.minibatch_size, micro_batch_size=micro,
            lr=3e-2, lr_schedule="constant", log_steps=1,
        ),
        critic=critic,
        reference=FrozenCopy(reference),
        reward=reward,
        rows=prompts,
        ppo=rules,
        kl_controller=FixedKL(0.1),
        pad_id=0,
        stop_ids=(2, 5, 7),
        folder=folder,
    )  # fmt: skip


# --- the pieces


def test_flips_count_other_sets_of_experts_by_layer_over_real_tokens_by_hand() -> None:
    old = torch.tensor([[[[0, 1], [0, 2]], [[1, 3], [1, 2]], [[0, 1], [0, 1]]]])  # (1, 3, 2, 2)
    new = torch.tensor([[[[0, 1], [0, 3]], [[2, 3], [1, 2]], [[2, 3], [2, 3]]]])
    mask = torch.tensor([[1, 1, 0]])  # the last, where all differ, is padding
    found = flip_metrics("new", new, old, mask_BS=mask)
    assert {name: (float(a), int(n)) for name, (a, n) in found.items()} == {
        "router/flip_rate_new": (1.0, 2),
        "router/flip_rate_new/layer_00": (1.0, 2),
        "router/flip_rate_new/layer_01": (1.0, 2),
    }
    no_pass = torch.where(torch.tensor([True, False, False])[None, :, None, None], new, NO_PASS)
    rollout = flip_metrics("rollout", no_pass, old, mask_BS=mask)
    assert {name: (float(a), int(n)) for name, (a, n) in rollout.items()} == {
        "router/flip_rate_rollout": (0.5, 1),
        "router/flip_rate_rollout/layer_00": (0.0, 1),
        "router/flip_rate_rollout/layer_01": (1.0, 1),
    }
    assert flip_metrics("new", None, old, mask_BS=mask) == {}
    assert flip_metrics("reference", new[:, :, :1], old, mask_BS=mask) == {}


def test_the_order_of_a_tokens_experts_is_no_flip() -> None:
    model = ours()
    with record_routing(model) as trace:
        model(input_ids=torch.arange(3, 9)[None])
    (forward,) = trace.forwards
    swapped = tuple(replace(r, expert_TK=r.expert_TK.flip(1)) for r in forward.routings)
    assert torch.equal(choices(forward), choices(replace(forward, routings=swapped)))


@pytest.mark.parametrize("make", [ours, mixtral])
def test_the_sampler_routes_each_token_as_one_pass_over_the_text_does(make: Any) -> None:
    model = make()
    prompt_BP = torch.tensor([[0, 3, 4], [5, 6, 7], [8, 9, 10]])
    mask_BP = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    ids = [40, 7, 12]
    rollout = sample(
        model, prompt_BP, prompt_mask_BP=mask_BP, max_new_tokens=6, stop_ids=(2, 5, 7, 9), seed=3,
        sample_ids=ids, record_routing=True,
    )  # fmt: skip
    assert len(set(rollout.mask_BR.sum(dim=1).tolist())) > 1
    found = rollout_choices(rollout, ids)
    mask_BS = torch.cat([mask_BP.bool(), rollout.mask_BR], dim=1)
    watch = Watch()
    with watched(model, watch), torch.no_grad():
        model(
            input_ids=torch.cat([prompt_BP, rollout.response_BR], dim=1),
            attention_mask=mask_BS.long(),
            position_ids=(mask_BS.long().cumsum(1) - 1).clamp(min=0),
        )
    assert watch.choice_BSLK is not None
    had_pass_BS = (found != NO_PASS).all(-1).all(-1)
    for row in range(3):  # every real token but the last one drawn
        real = mask_BS[row].nonzero().squeeze(1).tolist()
        assert not had_pass_BS[row, real[-1]] and had_pass_BS[row, real[:-1]].all()
        assert torch.equal(found[row, real[:-1]], watch.choice_BSLK[row, real[:-1]])


def test_a_watch_folds_pass_by_pass_into_the_sums_of_a_whole_recording() -> None:
    model = ours()
    passes = [torch.arange(3, 9).view(2, 3), torch.arange(9, 17).view(2, 4)]
    watch = Watch()
    with record_routing(model) as trace, watched(model, watch), torch.no_grad():
        for ids in passes:
            model(input_ids=ids)
    whole = RouterStats.from_trace(trace)
    assert watch.stats is not None and torch.equal(watch.stats.count_LE, whole.count_LE)
    assert watch.choice_BSLK is not None and watch.choice_BSLK.shape == (2, 4, 2, 2)
    with watched(llama(), Watch()) as nothing:
        pass
    assert nothing.stats is None and nothing.choice_BSLK is None
    assert not model.model.routing_sinks and not model._forward_hooks


# --- in a training


@pytest.mark.parametrize("make", [ours, mixtral])
def test_in_the_first_epoch_no_token_is_flipped_and_after_a_step_some_are(
    make: Any, tmp_path: Path
) -> None:
    policy = make()
    trainer = ppo_trainer(
        tmp_path, policy, critic=scalar_model(make(3)), reference=policy, epochs=3, micro=4
    )
    trainer.fit()
    log = trainer.state.log_history
    for update in (0, 3):
        assert log[update]["router/flip_rate_new"] == 0.0
        assert log[update]["router/flip_rate_rollout"] < 0.05  # rounding may decide a tie
        assert log[update + 2]["router/flip_rate_new"] > 0.0
        assert "router/flip_rate_rollout" not in log[update + 1]
        layers = [log[update + 2][f"router/flip_rate_new/layer_{i:02d}"] for i in range(2)]
        assert sum(layers) / 2 == pytest.approx(log[update + 2]["router/flip_rate_new"])
    assert log[0]["router/flip_rate_reference"] == 0.0  # the policy is its reference
    assert log[3]["router/flip_rate_reference"] > 0.0


def test_each_models_routers_are_told_apart(tmp_path: Path) -> None:
    policy, dense = ours(), ours(mlp_layer_types=["dense", "dense"])
    owners = {"policy": "router/load_entropy", **{
        name: f"router/{name}_load_entropy" for name in ("critic", "reference", "reward")
    }}  # fmt: skip
    for sparse in ("policy", "critic", "reference", "reward", "none"):
        trainer = ppo_trainer(
            tmp_path / sparse,
            ours() if sparse == "policy" else ours(mlp_layer_types=["dense", "dense"]),
            critic=scalar_model(policy if sparse == "critic" else dense),
            reference=policy if sparse == "reference" else dense,
            reward=ModelReward(model=scalar_model(policy if sparse == "reward" else dense)),
            updates=1,
            epochs=1,
        )
        trainer.fit()
        row = trainer.state.log_history[0]
        assert [name for name, key in owners.items() if key in row] == [
            name for name in owners if name == sparse
        ]
        assert any("flip_rate" in name for name in row) == (sparse == "policy")


def test_use_of_experts_is_that_of_all_episodes_whatever_the_micro_batch(tmp_path: Path) -> None:
    reward = ModelReward(model=scalar_model(ours(4)), batch_size=3)
    policy = ours()
    logs = []
    for micro in (0, 2):
        trainer = ppo_trainer(
            tmp_path / str(micro), ours(), critic=scalar_model(ours(3)), reference=ours(1),
            reward=reward, micro=micro, updates=1, epochs=1,
        )  # fmt: skip
        trainer.fit()
        logs.append(trainer.state.log_history[0])
    names = [
        f"router/{model}_{measure}"
        for model in ("critic", "reference", "reward")
        for measure in ("load_entropy", "max_vio")
    ]
    names += ["router/flip_rate_reference", "router/flip_rate_rollout"]
    assert [logs[0][n] for n in names] == pytest.approx([logs[1][n] for n in names], abs=1e-9)
    buffer = trainer.buffer
    assert buffer is not None and buffer.expert_BSLK is not None
    with record_routing(reward.model) as trace, torch.no_grad():
        ids = torch.cat([buffer.prompt_BP, buffer.response_BR], dim=1)
        reward(ids, buffer.attention_mask_BS)
    stats = RouterStats.from_trace(trace)
    assert logs[0]["router/reward_load_entropy"] == pytest.approx(
        float(stats.load_entropy_L.mean())
    )
    assert logs[0]["router/reward_max_vio"] == pytest.approx(float(stats.max_vio_L.mean()))
    # And the buffer's experts are those of the old policy's pass, row by row alone.
    for row in range(3):
        kept = buffer.attention_mask_BS[row].bool()
        watch = Watch()
        with watched(policy, watch), torch.no_grad():
            policy(input_ids=ids[row][kept][None])
        assert watch.choice_BSLK is not None
        assert torch.equal(watch.choice_BSLK[0], buffer.expert_BSLK[row][kept])
