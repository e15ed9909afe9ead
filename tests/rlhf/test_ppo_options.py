"""PPO's options in real trainings: shared critic, critic warm-up, KL in the loss, brakes, texts."""

import json
import random
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.actor_critic import ActorCritic
from rlhf.kl import AdaptiveKL, FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import scalar_model
from sft.adapt import LORA_PARTS, LoraSpec, add_lora, trainable_by_part
from sft.checkpoint import MANIFEST, live_tensors, read_checkpoint
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings

STOPS = (2, 5, 7, 9, 11)
SIZE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def ours() -> nn.Module:
    config = MoEConfig(
        **SIZE, num_key_value_heads=1, moe_intermediate_size=8, num_experts=4, initializer_range=0.2
    )
    return MoEForCausalLM(config)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZE, num_key_value_heads=1))


def qwen2() -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SIZE, num_key_value_heads=1, tie_word_embeddings=True))


def gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZE, attention_dropout=0.1, hidden_dropout=0.1))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_key_value_heads=1, num_local_experts=4))


FAMILIES = (ours, llama, qwen2, gpt_neox, mixtral)
every_family = pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)


def made(make: Any = ours, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return make().eval()


def lora(model: nn.Module) -> nn.Module:
    parts = tuple(part for part in LORA_PARTS if part in trainable_by_part(model))
    torch.manual_seed(0)
    return add_lora(model, LoraSpec(rank=2, alpha=4, targets=parts))


def low_ids(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def prompts() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"prompt_ids": [rng.randrange(3, 32) for _ in range(rng.randrange(2, 8))]}
        for _ in range(13)
    ]


def texts() -> list[dict[str, Any]]:
    """Rows of unequal length, the second with an unlearned beginning."""
    rng = random.Random(1)
    rows = [[rng.randrange(3, 32) for _ in range(n)] for n in (6, 9, 4, 7, 5)]
    return [
        {"input_ids": ids, "labels": [-100] * (3 * (i == 1)) + ids[3 * (i == 1) :]}
        for i, ids in enumerate(rows)
    ]


def build(
    folder: Path,
    *,
    policy: Any = None,
    critic: Any = None,
    shared: bool = False,
    reference: Reference | None = None,
    reward: Any = low_ids,
    kind: type[PPOTrainer] = PPOTrainer,
    kl: Any = None,
    ptx_rows: Any = None,
    balance: BalancePolicy | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    changes: dict[str, Any] | None = None,
    **ppo: Any,
) -> PPOTrainer:
    policy = made() if policy is None else policy
    if critic is None and not shared:
        critic = scalar_model(made(seed=3))
    sizes = {"updates": 2, "episodes": 8, "epochs": 2, "minibatches": 2, "max_new_tokens": 5}
    rules = PPOSettings(**{**sizes, **ppo})
    optimisation = {
        "max_steps": rules.steps,
        "batch_size": rules.minibatch_size,
        "lr": 1e-2,
        "lr_schedule": "constant",
        "log_steps": 1,
        **(changes or {}),
    }
    trainer = kind(
        policy,
        TrainSettings(**optimisation),
        critic=critic,
        reference=FrozenCopy(policy) if reference is None else reference,
        reward=reward,
        rows=prompts(),
        ppo=rules,
        kl_controller=FixedKL(0.1) if kl is None else kl,
        pad_id=0,
        stop_ids=STOPS,
        ptx_rows=ptx_rows,
        balance=balance,
        folder=folder,
    )
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def held(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, t in live_tensors(model).items() if not torch.equal(t, before[name])}


def rows_with(trainer: PPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


# --- 12: the shared trunk


@every_family
def test_a_shared_critic_reads_what_the_language_model_head_reads(make: Any) -> None:
    policy = made(make)
    both = ActorCritic(policy, None)
    assert both.is_shared and not any(p.detach().any() for p in both.critic.parameters())
    torch.manual_seed(1)
    nn.init.normal_(both.critic.weight), nn.init.normal_(both.critic.bias)
    ids = torch.randint(3, 32, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    logits, value_BR = both(ids, mask, 3)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    plain = policy(
        input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True
    )
    torch.testing.assert_close(logits, plain.logits[:, -4:])
    expected = both.critic(plain.hidden_states[-1][:, 3:6])[..., 0]  # before each of the 3 tokens
    torch.testing.assert_close(value_BR, expected)
    value_BR.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters())
    policy.zero_grad()
    _, value_BR = both(ids, mask, 3, trunk_learns_values=False)
    value_BR.sum().backward()
    assert all(p.grad is None for p in policy.parameters())


@every_family
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_a_shared_critic_trains_and_is_in_the_checkpoint_and_not_in_the_policy(
    make: Any, with_lora: bool, tmp_path: Path
) -> None:
    policy = made(make)
    names = set(policy.state_dict())
    reference: Reference = FrozenCopy(policy)
    if with_lora:
        policy = lora(policy)
        names, reference = set(policy.state_dict()), FrozenAdapter(policy, None)
    trainer = build(
        tmp_path, policy=policy, shared=True, reference=reference, updates=1, episodes=4,
        minibatches=1, changes={"micro_batch_size": 2, "save_steps": 1},
    )  # fmt: skip
    before = held(trainer.model)
    trainer.fit()  # raises unless the first ratios are 1
    assert rows_with(trainer, "policy/ratio_max_deviation")[0] == 0.0
    assert set(policy.state_dict()) == names
    found = moved(trainer.model, before)
    assert {"critic.weight", "critic.bias"} <= found
    trainable = {f"policy.{n}" for n, p in policy.named_parameters() if p.requires_grad}
    assert found - {"critic.weight", "critic.bias"} <= trainable and len(found) > 2
    saved = read_checkpoint(tmp_path / "checkpoint-2")
    assert torch.equal(saved.tensors["model"]["critic.weight"], trainer.critic.weight)
    assert "critic.weight::exp_avg" in saved.tensors["optimizer"]


def test_values_of_a_shared_critic_start_at_0_and_train_the_trunk_with_it(tmp_path: Path) -> None:
    still = build(tmp_path / "1", shared=True, value_coef=0.0)
    learns = build(tmp_path / "2", shared=True, value_coef=1.0)
    for trainer in (still, learns):
        trainer.fit()
        assert rows_with(trainer, "value/loss")[0] > 0
    assert "critic.weight" in moved(learns.model, held(still.model))
    assert any(name.startswith("policy.") for name in moved(learns.model, held(still.model)))
    first = build(tmp_path / "3", shared=True, updates=1, epochs=1, minibatches=1)
    first.fit()
    assert first.buffer is not None and not first.buffer.value_BR.any()


# --- 14: KL in the loss


def test_with_the_kl_in_the_loss_the_reward_carries_none_and_the_controller_steers_on(
    tmp_path: Path,
) -> None:
    trainer = build(
        tmp_path, reference=FrozenCopy(made(seed=1)), kl_in="loss",
        kl=AdaptiveKL(5.0, target=0.5, horizon=100),
    )  # fmt: skip
    trainer.fit()
    assert all(x == 0.0 for x in rows_with(trainer, "reward/non_score"))
    assert rows_with(trainer, "reward/shaped") == rows_with(trainer, "reward/score")
    coefs = rows_with(trainer, "policy/kl_coef")
    assert coefs[0] == 5.0 and coefs[1] > 5.0
    names = ("train/loss", "policy/loss", "value/loss", "policy/kl_loss")
    for step, coef in ((0, coefs[0]), (3, coefs[0]), (4, coefs[1])):  # the update's own price
        total, policy, value, kl = (rows_with(trainer, name)[step] for name in names)
        assert total == pytest.approx(policy + 0.1 * value + coef * kl, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_in_the_loss_pulls_a_policy_without_rewards_towards_its_reference(
    tmp_path: Path, estimator: Any
) -> None:
    policy, reference = made(), made(seed=1)
    ids = torch.tensor([row["prompt_ids"][:2] for row in prompts()])

    def apart() -> float:
        """KL(policy, reference) of the next token, exactly, mean over prompts."""
        with torch.no_grad():
            one, two = (m.eval()(input_ids=ids).logits.log_softmax(-1) for m in (policy, reference))
        return float((one.exp() * (one - two)).sum(-1).mean())

    before = apart()
    build(
        tmp_path, policy=policy, shared=True, value_coef=0.0, reference=FrozenCopy(reference),
        reward=nothing, kl_in="loss", kl_estimator=estimator, kl=FixedKL(1.0), updates=12,
        episodes=32, epochs=1, minibatches=1, whiten_advantages=False,
    ).fit()  # fmt: skip
    assert apart() < 0.8 * before  # 12 steps; tests/rlhf/test_bandit.py says where they lead


# --- 22: whitening by the minibatch


class SeesAdvantages(PPOTrainer):
    def objective(self, model: nn.Module, batch: Any) -> LossOutput:
        seen: dict[int, list[float]] = self.__dict__.setdefault("seen", {})
        seen.setdefault(self.state.global_step, []).extend(
            batch["advantage_BR"][batch["mask_BR"]].tolist()
        )
        return super().objective(model, batch)


@pytest.mark.parametrize("variance", ["unbiased", "biased"])
def test_by_the_minibatch_each_has_mean_0_and_deviation_1_over_its_micro_batches(
    tmp_path: Path, variance: Any
) -> None:
    trainer: Any = build(
        tmp_path, kind=SeesAdvantages, whitening_scope="minibatch", whitening_variance=variance,
        changes={"micro_batch_size": 1},
    )  # fmt: skip
    trainer.fit()
    deviation = statistics.stdev if variance == "unbiased" else statistics.pstdev
    for advantages in trainer.seen.values():
        assert statistics.fmean(advantages) == pytest.approx(0.0, abs=1e-6)
        assert deviation(advantages) == pytest.approx(1.0, abs=1e-5)


# --- 31: steps that are left out


class Snapshots(TrainerCallback):
    """Weights and optimizer state after every step, and the learning rate of the next."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.rates: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        plain = getattr(optimizer, "optimizer", optimizer)
        self.weights.append(held(model))
        self.moments.append(
            {
                f"{i}.{key}": value.clone()
                for i, state_of in enumerate(plain.state.values())
                for key, value in state_of.items()
            }
        )
        self.rates.append(plain.param_groups[0]["lr"])


def assert_nothing_happened(seen: Snapshots, step: int) -> None:
    """Between the ends of step - 1 and step."""
    for before, after in ((seen.weights, seen.weights), (seen.moments, seen.moments)):
        assert before[step - 1].keys() == after[step].keys()
        for name, tensor in after[step].items():
            assert torch.equal(tensor, before[step - 1][name]), (step, name)


def test_above_its_target_kl_an_update_makes_no_further_step(tmp_path: Path) -> None:
    seen = Snapshots()
    trainer = build(
        tmp_path, target_kl=1e-6, epochs=3, callbacks=(seen,),
        changes={"weight_decay": 0.1, "lr_schedule": "linear", "micro_batch_size": 2},
    )  # fmt: skip
    trainer.fit()
    # The second minibatch of the first epoch has already moved: two epochs of two steps go.
    skipped = [2, 3, 4, 5, 8, 9, 10, 11]
    assert rows_with(trainer, "policy/skipped_steps") == [float(i in skipped) for i in range(12)]
    for step in range(1, 12):
        if step in skipped:
            assert_nothing_happened(seen, step)
        else:
            assert not torch.equal(seen.weights[step]["critic.score.weight"],
                                   seen.weights[step - 1]["critic.score.weight"])  # fmt: skip
    assert (trainer.optimizer_steps, trainer.brake.skipped_steps) == (4, 8)
    assert seen.rates == pytest.approx([1e-2 * (1 - (i + 1) / 12) for i in range(12)], abs=1e-9)
    assert trainer.state.global_step == 12
    assert rows_with(trainer, "policy/ratio_max_deviation")[::2] == [0.0, 0.0]


def test_below_its_target_kl_nothing_is_left_out_to_the_bit(tmp_path: Path) -> None:
    plain, braked = build(tmp_path / "1"), build(tmp_path / "2", target_kl=1e3, ratio_threshold=1e3)
    plain.fit(), braked.fit()
    assert braked.brake.skipped_steps == 0 and not moved(braked.model, held(plain.model))


def test_a_minibatch_whose_mean_ratio_is_above_the_threshold_makes_no_step(tmp_path: Path) -> None:
    seen = Snapshots()
    trainer = build(
        tmp_path, ratio_threshold=1.02, epochs=4, minibatches=1, callbacks=(seen,),
        changes={"lr": 3e-2, "weight_decay": 0.1, "micro_batch_size": 2},
    )  # fmt: skip
    trainer.fit()
    ratios = rows_with(trainer, "policy/ratio")
    skipped = rows_with(trainer, "policy/skipped_steps")
    assert skipped == [float(ratio > 1.02) for ratio in ratios]
    assert 0 < sum(skipped) == trainer.brake.skipped_steps < 8
    for step, is_skipped in enumerate(skipped):
        if is_skipped:
            assert_nothing_happened(seen, step)
    assert trainer.optimizer_steps + trainer.brake.skipped_steps == 8


# --- 32: critic first, texts


@pytest.mark.parametrize("shared", [False, True])
def test_while_the_critic_warms_up_the_policy_keeps_its_bits(tmp_path: Path, shared: bool) -> None:
    seen = Snapshots()
    trainer = build(
        tmp_path, shared=shared, critic_warmup=2, updates=3, callbacks=(seen,), entropy_coef=0.1,
        kl=AdaptiveKL(0.2, target=0.5, horizon=100), reference=FrozenCopy(made(seed=1)),
        balance=BalancePolicy(load_balancing_coef=1.0), changes={"weight_decay": 0.1},
    )  # fmt: skip
    start = held(trainer.model)
    trainer.fit()
    for step in range(8):
        changed = {n for n, t in seen.weights[step].items() if not torch.equal(t, start[n])}
        assert changed and all(name.startswith("critic.") for name in changed), step
    for part in ("mlp.gate", "experts", "q_proj"):
        assert any(n.startswith("policy.") and part in n for n in moved(trainer.model, start))
    assert rows_with(trainer, "policy/kl_coef")[:3] == pytest.approx([0.2] * 3, rel=1e-6)
    assert rows_with(trainer, "policy/ratio_max_deviation")[:8] == [0.0] * 8
    assert rows_with(trainer, "value/loss")[7] < rows_with(trainer, "value/loss")[0]
    # The moments of the policy begin with its first step: no step of zeros came before.
    steps = [t for n, t in seen.moments[-1].items() if n.endswith(".step")]
    assert sorted({int(t) for t in steps}) == [4, 12]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = {
            n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None
        }


def nothing(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return torch.zeros(len(input_ids_BS))


@pytest.mark.parametrize("micro", [4, 2, 1])
def test_texts_add_the_gradient_of_their_mean_loss_whatever_the_split(
    tmp_path: Path, micro: int
) -> None:
    """Without reward, KL and values nothing else pulls on the policy."""
    found = Gradients()
    policy = made()
    trainer = build(
        tmp_path, policy=policy, shared=True, reward=nothing, kl=FixedKL(0.0), ptx_coef=0.7,
        ptx_rows=texts(), updates=1, episodes=4, epochs=1, minibatches=1, callbacks=(found,),
        changes={"micro_batch_size": micro, "lr": 1e-9, "max_grad_norm": 1e9},
    )  # fmt: skip
    assert trainer.texts is not None
    order = [
        row["input_ids"]
        for batch in trainer.texts.micro_batches(0, trainer.plan)
        for row in [{"input_ids": batch["ptx_input_ids"]}]
    ]
    chosen = [ids[ids != 0].tolist() for batch in order for ids in batch]
    learned = {tuple(row["input_ids"]): row["labels"] for row in texts()}
    assert len({tuple(ids) for ids in chosen}) == 4  # each at most once in the first pass
    trainer.fit()
    total, count = torch.zeros(()), 0
    policy.zero_grad()
    for ids in chosen:
        labels = torch.tensor(learned[tuple(ids)])[1:]
        logits = policy(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (0.7 * total / count).backward()
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found.found[f"policy.{name}"], parameter.grad, rtol=0, atol=1e-6)
    mean = float(total.detach()) / count
    assert rows_with(trainer, "policy/ptx_loss") == [pytest.approx(mean, rel=1e-5)]
    assert rows_with(trainer, "train/loss") == [pytest.approx(0.7 * mean, rel=1e-4)]


def test_splitting_a_minibatch_with_texts_and_n_plus_changes_nothing(tmp_path: Path) -> None:
    balance = BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5, z_loss_coef=0.1)
    whole, part = (
        build(
            tmp_path / str(micro), ptx_rows=texts(), ptx_coef=0.5, compat="n_plus",
            whitening_scope="minibatch", balance=balance,
            changes={"micro_batch_size": micro, "adam_eps": 1e-3, "max_grad_norm": 1e9},
        )
        for micro in (4, 1)
    )  # fmt: skip
    whole.fit(), part.fit()
    for (name, a), b in zip(
        live_tensors(whole.model).items(), live_tensors(part.model).values(), strict=True
    ):
        # float32 addition order; the eps keeps Adam from magnifying it.
        assert float((a - b).detach().abs().max()) <= 1e-5, name


def test_texts_and_their_weight_belong_together(tmp_path: Path) -> None:
    for changes in ({"ptx_coef": 0.5}, {"ptx_rows": texts()}):
        with pytest.raises(UserError, match="ptx_rows and a ptx_coef above 0 go together"):
            build(tmp_path, **changes)
    with pytest.raises(UserError, match="ptx_rows is empty: there is no text to mix in."):
        build(tmp_path, ptx_rows=[], ptx_coef=0.5)


# --- rollouts in chunks


def test_rollouts_drawn_in_chunks_are_those_drawn_at_once(tmp_path: Path) -> None:
    """One policy, no step that a float32 could show; chunks of 4, 3 and 1 of the 12 episodes."""
    made_ = []
    for micro in (0, 4, 3, 1):
        trainer = build(
            tmp_path / str(micro), updates=1, episodes=12, epochs=1, minibatches=1,
            changes={"micro_batch_size": micro, "lr": 1e-12},
        )  # fmt: skip
        trainer.fit()
        assert trainer.plan.chunk == (micro or 12)
        made_.append(trainer.buffer)
    first, *others = made_
    assert first is not None
    for other in others:
        assert other is not None
        assert torch.equal(first.response_BR, other.response_BR)
        assert torch.equal(first.mask_BR, other.mask_BR)
        torch.testing.assert_close(first.old_logp_BR, other.old_logp_BR, rtol=0, atol=1e-5)
        torch.testing.assert_close(first.advantage_BR, other.advantage_BR, rtol=0, atol=1e-4)


# --- resuming


def test_a_resumed_training_with_every_option_is_the_uninterrupted_one_to_the_byte(
    tmp_path: Path,
) -> None:
    """Cut in the middle of a warm-up, in a minibatch epoch, and among steps that are left out."""

    def started(folder: Path) -> PPOTrainer:
        policy = lora(made())
        return build(
            folder, policy=policy, shared=True, reference=FrozenAdapter(policy, None), updates=4,
            kl=AdaptiveKL(0.2, target=0.01, horizon=100), kl_in="loss", score_scaling="running",
            critic_warmup=1,
            target_kl=1e-6, ptx_rows=texts(), ptx_coef=0.3, whitening_scope="minibatch",
            compat="n_plus", missing_eos_replace=-1.0, critic_lam=1.0,
            changes={"save_steps": 1, "keep_checkpoints": 99, "log_steps": 3,
                     "micro_batch_size": 2, "lr_schedule": "linear", "weight_decay": 0.1},
        )  # fmt: skip

    whole = started(tmp_path / "whole")
    whole.fit()
    assert whole.brake.skipped_steps == 6  # the second epoch of all updates but the first
    last = (tmp_path / "whole" / "checkpoint-16" / MANIFEST).read_text(encoding="utf-8")
    for step in (2, 7, 13):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = started(folder)
        again.fit(resume=True)
        assert again.brake.skipped_steps == 6
        found = (folder / "checkpoint-16" / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(found)["files"] == json.loads(last)["files"], step
