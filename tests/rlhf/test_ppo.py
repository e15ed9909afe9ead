"""PPO as a trainer: what a rollout holds, what an update does, resuming in the middle of one."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.generation import sample
from rlhf.dpo import SelfCheckFailed
from rlhf.kl import AdaptiveKL, FixedKL
from rlhf.logprobs import token_logps
from rlhf.ppo import PPOSettings, PPOTrainer, RolloutBuffer
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import ModelReward, scalar_model, token_scores
from sft.adapt import LoraSpec, add_lora, copy_adapter
from sft.checkpoint import MANIFEST, live_tensors, read_checkpoint
from sft.loss import LossOutput
from sft.settings import BalancePolicy, TrainSettings
from sft.text import pad_batch

STOPS = (2, 5, 7, 9, 11)
SPEC = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "initializer_range": 0.2,
    }
    return MoEForCausalLM(MoEConfig(**{**sizes, **config}))


def critic_of(seed: int = 3, **config: Any) -> Any:
    lm = tiny_lm(seed, **config)
    torch.manual_seed(seed)
    return scalar_model(lm)


def prompts(count: int = 13) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"prompt_ids": [rng.randrange(3, 32) for _ in range(rng.randrange(2, 8))]}
        for _ in range(count)
    ]


def low_ids(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """A reward for low ids that spreads, so that advantages differ."""
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def places(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """A score that says which episode of the update it belongs to."""
    return torch.arange(len(input_ids_BS)).float()


def ppo_trainer(
    folder: Path,
    *,
    policy: nn.Module | None = None,
    critic: nn.Module | None = None,
    reference: Reference | None = None,
    reward: Any = low_ids,
    kind: type[PPOTrainer] = PPOTrainer,
    ppo: dict[str, Any] | None = None,
    kl: Any = None,
    pad_id: int = 0,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> PPOTrainer:
    policy = tiny_lm() if policy is None else policy
    chosen = {"updates": 2, "episodes": 8, "epochs": 2, "minibatches": 2, "max_new_tokens": 5}
    rules = PPOSettings(**{**chosen, **(ppo or {})})
    optimisation = {
        "max_steps": rules.steps,
        "batch_size": rules.minibatch_size,
        "lr": 1e-2,
        "lr_schedule": "constant",
        "log_steps": 1,
        **changes,
    }
    return kind(
        policy,
        TrainSettings(**optimisation),
        critic=critic_of() if critic is None else critic,
        reference=FrozenCopy(policy) if reference is None else reference,
        reward=reward,
        rows=prompts(),
        ppo=rules,
        kl_controller=FixedKL(0.1) if kl is None else kl,
        pad_id=pad_id,
        stop_ids=STOPS,
        folder=folder,
        **(options or {}),
    )


def buffer_of(trainer: PPOTrainer) -> RolloutBuffer:
    assert trainer.buffer is not None
    return trainer.buffer


def assert_same(one: nn.Module, other: nn.Module, *, tolerance: float) -> None:
    pairs = zip(live_tensors(one).items(), live_tensors(other).values(), strict=True)
    for (name, a), b in pairs:
        assert float((a - b).detach().abs().max()) <= tolerance, name


# --- how many steps, over what


def test_optimizer_steps_are_updates_times_epochs_times_minibatches(tmp_path: Path) -> None:
    calls = []
    handle = register_optimizer_step_post_hook(lambda *args: calls.append(1))
    try:
        trainer = ppo_trainer(
            tmp_path, ppo={"updates": 2, "epochs": 3, "minibatches": 2}, micro_batch_size=2
        )
        trainer.fit()
    finally:
        handle.remove()
    assert trainer.ppo.steps == len(calls) == trainer.optimizer_steps == 2 * 3 * 2
    assert [row["step"] for row in trainer.state.log_history] == list(range(1, 13))
    assert trainer.place(0) == (0, 0, 0)
    assert trainer.place(5) == (0, 2, 1)
    assert trainer.place(6) == (1, 0, 0)


class Watched(PPOTrainer):
    """Notes which episodes each optimizer step is made of; scores are their numbers."""

    def objective(self, model: nn.Module, batch: Any) -> LossOutput:
        seen: dict[int, list[int]] = self.__dict__.setdefault("seen", {})
        seen.setdefault(self.state.global_step, []).extend(batch["score_B"].int().tolist())
        return super().objective(model, batch)


def test_every_epoch_goes_over_every_episode_once_in_a_fresh_order(tmp_path: Path) -> None:
    trainer: Any = ppo_trainer(
        tmp_path, kind=Watched, reward=places, micro_batch_size=2,
        ppo={"updates": 2, "epochs": 3, "minibatches": 2},
    )  # fmt: skip
    trainer.fit()
    steps = [trainer.seen[step] for step in range(12)]
    assert all(len(step) == 4 for step in steps)
    epochs = [tuple(steps[i] + steps[i + 1]) for i in range(0, 12, 2)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert len(set(epochs)) == 6


def test_prompts_are_gone_through_once_before_any_is_repeated(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def reward(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        for ids, mask in zip(input_ids_BS[:, :7], attention_mask_BS[:, :7], strict=True):
            seen.append(tuple(ids[mask.bool()].tolist()))
        return torch.zeros(len(input_ids_BS))

    ppo_trainer(tmp_path, reward=reward, ppo={"updates": 4, "epochs": 1, "minibatches": 1}).fit()
    known = [tuple(row["prompt_ids"]) for row in prompts()]
    assert len(set(known)) == 13
    found = [next(k for k in known if text[: len(k)] == k) for text in seen]
    assert len(found) == 32
    assert set(found[:13]) == set(found[13:26]) == set(known)


# --- the first minibatch


def test_in_the_first_minibatch_of_every_update_the_ratio_is_one(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path, micro_batch_size=2)
    trainer.fit()
    first = [row for row in trainer.state.log_history if row["step"] in (1, 5)]
    assert len(first) == 2
    for row in first:
        assert row["policy/ratio_max_deviation"] == 0.0  # the same computation, bit for bit
        assert row["policy/ratio"] == 1.0
        assert row["policy/clip_fraction"] == 0.0
        assert row["rollout/logp_mismatch"] < 1e-5  # cached generation against one full pass
    later = [row for row in trainer.state.log_history if row["step"] in (4, 8)]
    assert all(row["policy/ratio_max_deviation"] > 1e-3 for row in later)
    assert all("rollout/length" not in row for row in later)


class MovesThePolicy(TrainerCallback):
    """Between rollout and update of the second update, someone changes the policy."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            with torch.no_grad():
                for parameter in kwargs["model"].policy.parameters():
                    parameter.mul_(1.5)


def test_a_policy_that_changed_between_rollout_and_update_stops_the_run(tmp_path: Path) -> None:
    trainer = ppo_trainer(tmp_path, ppo={"updates": 3})
    trainer.add_callback(MovesThePolicy())
    with pytest.raises(SelfCheckFailed) as caught:
        trainer.fit()
    assert str(caught.value).startswith(
        "PPO update 1: in the first minibatch the ratio is off 1 by "
    )
    assert str(caught.value).endswith("the old log-probabilities are not this policy's.")
    assert trainer.optimizer_steps == 4


# --- the numbers of a rollout


def test_what_the_buffer_holds_is_what_each_model_says_of_each_episode_alone(
    tmp_path: Path,
) -> None:
    policy, critic, reference = tiny_lm(), critic_of(), FrozenCopy(tiny_lm(1))
    trainer = ppo_trainer(
        tmp_path, policy=policy, critic=critic, reference=reference, micro_batch_size=2, lr=1e-12,
        ppo={"updates": 1, "epochs": 1, "minibatches": 2, "temperature": 0.7},
    )  # fmt: skip
    trainer.fit()  # the learning rate moves nothing that a float32 could show
    buffer = buffer_of(trainer)
    lengths = buffer.mask_BR.sum(dim=1).tolist()
    assert len(set(lengths)) > 1
    policy.eval(), critic.eval()
    with torch.no_grad():
        for row, length in enumerate(lengths):
            prompt = buffer.prompt_BP[row][buffer.prompt_mask_BP[row].bool()]
            response = buffer.response_BR[row, :length]
            ids = torch.cat([prompt, response])[None]
            value = token_scores(critic, ids, torch.ones_like(ids))[0, len(prompt) - 1 : -1]
            for held, expected in (
                (
                    buffer.old_logp_BR,
                    token_logps(policy(input_ids=ids).logits, ids, temperature=0.7),
                ),
                (
                    buffer.ref_logp_BR,
                    token_logps(reference.model(input_ids=ids).logits, ids, temperature=0.7),
                ),
            ):
                # Padded rows attend over masked keys: float32 addition order, no more.
                torch.testing.assert_close(
                    held[row, :length], expected[0, len(prompt) :], rtol=0, atol=1e-5
                )
                assert not held[row, length:].any()
            torch.testing.assert_close(buffer.value_BR[row, :length], value, rtol=0, atol=1e-5)
            assert not buffer.value_BR[row, length:].any()
            assert not buffer.advantage_BR[row, length:].any()
            assert not buffer.return_BR[row, length:].any()
    assert torch.equal(buffer.score_B, low_ids(*full(buffer)))


def full(buffer: RolloutBuffer) -> tuple[Tensor, Tensor]:
    ids = torch.cat([buffer.prompt_BP, buffer.response_BR], dim=1)
    return ids, torch.cat([buffer.prompt_mask_BP, buffer.mask_BR], dim=1)


def advantages_by_hand(
    buffer: RolloutBuffer, *, beta: float, penalty: float, clip: float, gamma: float, lam: float
) -> tuple[list[list[float]], list[list[float]]]:
    """Plain numbers, episode by episode, before whitening: advantages and returns."""
    advantages, returns = [], []
    for row in range(len(buffer.score_B)):
        length = int(buffer.mask_BR[row].sum())
        old, ref, value = (
            t[row, :length].double().tolist()
            for t in (buffer.old_logp_BR, buffer.ref_logp_BR, buffer.value_BR)
        )
        score = float(buffer.score_B[row])
        if int(buffer.response_BR[row, length - 1]) not in STOPS:
            score -= penalty
        score = max(-clip, min(clip, score))
        reward = [-beta * (old[t] - ref[t]) for t in range(length)]
        reward[-1] += score
        advantage, after = [0.0] * length, 0.0
        for t in reversed(range(length)):
            next_value = value[t + 1] if t + 1 < length else 0.0
            after = reward[t] + gamma * next_value - value[t] + gamma * lam * after
            advantage[t] = after
        advantages.append(advantage)
        returns.append([a + v for a, v in zip(advantage, value, strict=True)])
    return advantages, returns


@pytest.mark.parametrize("clip", [0.9, 100.0])
def test_penalties_and_clip_enter_the_advantages_of_two_episodes_as_by_hand(
    tmp_path: Path, clip: float
) -> None:
    trainer = ppo_trainer(
        tmp_path,
        reference=FrozenCopy(tiny_lm(1)),
        kl=FixedKL(0.3),
        seed=1,
        ppo={
            "updates": 1, "episodes": 2, "epochs": 1, "minibatches": 1, "max_new_tokens": 4,
            "gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 0.6, "score_clip": clip,
            "whiten_advantages": False,
        },
    )  # fmt: skip
    trainer.fit()
    buffer = buffer_of(trainer)
    last_B = buffer.mask_BR.sum(dim=1) - 1
    ended = [int(buffer.response_BR[i, last_B[i]]) in STOPS for i in range(2)]
    assert sorted(ended) == [False, True]  # one of each, or the case would not test the penalty
    advantages, returns = advantages_by_hand(
        buffer, beta=0.3, penalty=0.6, clip=clip, gamma=0.9, lam=0.8
    )
    for row in range(2):
        length = len(advantages[row])
        held = buffer.advantage_BR[row, :length].tolist(), buffer.return_BR[row, :length].tolist()
        assert held[0] == pytest.approx(advantages[row], abs=1e-5)
        assert held[1] == pytest.approx(returns[row], abs=1e-5)
    unclipped, _ = advantages_by_hand(buffer, beta=0.3, penalty=0.6, clip=1e9, gamma=0.9, lam=0.8)
    assert (unclipped != advantages) == (clip == 0.9)  # the clip bites in one case only
    row = trainer.state.log_history[0]
    assert row["reward/score"] == pytest.approx(float(buffer.score_B.mean()), rel=1e-6)
    kl_B = (buffer.old_logp_BR - buffer.ref_logp_BR).sum(dim=1)
    assert row["policy/kl_sequence"] == pytest.approx(float(kl_B.mean()), rel=1e-5)
    assert row["policy/kl_coef"] == pytest.approx(0.3)
    assert row["rollout/ended"] == 0.5
    assert row["rollout/length"] == float(buffer.mask_BR.sum()) / 2


def test_advantages_are_whitened_over_the_whole_update(tmp_path: Path) -> None:
    made = [
        ppo_trainer(
            tmp_path / str(white), micro_batch_size=1,
            ppo={"updates": 1, "epochs": 1, "minibatches": 4, "whiten_advantages": white},
        )
        for white in (True, False)
    ]  # fmt: skip
    for trainer in made:
        trainer.fit()
    white, plain = (buffer_of(trainer) for trainer in made)
    kept = white.advantage_BR[white.mask_BR].double().numpy()
    raw = plain.advantage_BR[plain.mask_BR].double().numpy()
    assert kept.mean() == pytest.approx(0.0, abs=1e-6)
    assert kept.std(ddof=1) == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(kept, (raw - raw.mean()) / raw.std(ddof=1), atol=1e-5)
    torch.testing.assert_close(white.return_BR, plain.return_BR)  # returns belong to the raw ones


def test_the_adaptive_controller_moves_by_the_measured_kl_and_is_in_the_checkpoint(
    tmp_path: Path,
) -> None:
    trainer = ppo_trainer(
        tmp_path, reference=FrozenCopy(tiny_lm(1)), kl=AdaptiveKL(0.2, target=0.5, horizon=100),
        save_steps=1, keep_checkpoints=9,
    )  # fmt: skip
    trainer.fit()
    coef = 0.2
    for update, row in enumerate(r for r in trainer.state.log_history if r["step"] in (1, 5)):
        assert row["policy/kl_coef"] == pytest.approx(coef, rel=1e-6)  # the one that was paid
        error = min(max(row["policy/kl_sequence"] / 0.5 - 1.0, -0.2), 0.2)
        assert error != 0.0
        coef *= 1.0 + error * 8 / 100
        saved = read_checkpoint(tmp_path / f"checkpoint-{4 * update + 1}").documents["extra"]
        assert isinstance(saved, dict)
        assert saved["kl"]["coef"] == pytest.approx(coef, rel=1e-6)
        assert saved["kl"]["kind"] == "adaptive"
    assert trainer.kl_controller.coef == pytest.approx(coef, rel=1e-6)


# --- splitting and padding


def test_splitting_a_minibatch_changes_nothing(tmp_path: Path) -> None:
    balance = BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5, z_loss_coef=0.1)
    whole, *parts = (
        ppo_trainer(
            tmp_path / str(micro), micro_batch_size=micro, adam_eps=1e-3, max_grad_norm=1e9,
            options={"balance": balance},
        )
        for micro in (4, 2, 1)
    )  # fmt: skip
    whole.fit()
    for part in parts:
        part.fit()
        # float32 addition order; the eps keeps Adam from magnifying it (see test_trainer).
        assert_same(whole.model, part.model, tolerance=1e-5)
        assert torch.equal(buffer_of(whole).response_BR, buffer_of(part).response_BR)


def test_neither_the_pad_id_nor_the_amount_of_padding_changes_the_result(tmp_path: Path) -> None:
    one, other = (ppo_trainer(tmp_path / str(p), pad_id=p, micro_batch_size=2) for p in (0, 9))
    one.fit()
    other.fit()
    assert_same(one.model, other.model, tolerance=0.0)

    model = tiny_lm().eval()
    texts = [row["prompt_ids"] for row in prompts(4)]
    for extra in ([], [[3] * 20]):
        prompt_BP, mask_BP = pad_batch([*texts, *extra], pad_id=0, side="left")
        drawn = sample(
            model, prompt_BP, prompt_mask_BP=mask_BP, max_new_tokens=4, stop_ids=STOPS, seed=0,
        )  # fmt: skip
        if not extra:
            expected = drawn
    assert torch.equal(drawn.response_BR[:4], expected.response_BR)
    torch.testing.assert_close(drawn.logp_BR[:4], expected.logp_BR, rtol=0, atol=1e-5)


# --- what moves and what does not


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_critic_move_and_reference_and_reward_stay_to_the_bit(
    tmp_path: Path, lora: bool
) -> None:
    judge = critic_of(4)
    policy: Any = tiny_lm()
    if lora:
        policy = add_lora(policy, SPEC, name="sft")
        copy_adapter(policy, "sft", name="policy")
        reference: Reference = FrozenAdapter(policy, "sft")
    else:
        reference = FrozenCopy(policy)
    ids = torch.randint(3, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), reference.lend() as lent:
        before = lent.eval()(input_ids=ids).logits
    held = {name: tensor.clone() for name, tensor in judge.state_dict().items()}
    trainable = {name for name, p in policy.named_parameters() if p.requires_grad}
    trainer = ppo_trainer(
        tmp_path, policy=policy, critic=add_lora(critic_of(), SPEC) if lora else None,
        reference=reference, reward=ModelReward(model=judge),
    )  # fmt: skip
    start = {name: tensor.detach().clone() for name, tensor in live_tensors(trainer.model).items()}
    trainer.fit()
    with torch.no_grad(), reference.lend() as lent:
        assert torch.equal(lent.eval()(input_ids=ids).logits, before)
    for name, tensor in judge.state_dict().items():
        assert torch.equal(tensor, held[name]), name
    moved = {
        name for name, t in live_tensors(trainer.model).items() if not torch.equal(t, start[name])
    }
    for part in ("policy.", "critic."):
        for piece in ("mlp.gate", "experts", "q_proj"):
            assert any(name.startswith(part) and piece in name for name in moved), (part, piece)
    assert {
        name.removeprefix("policy.") for name in moved if name.startswith("policy.")
    } <= trainable


def test_the_critic_has_its_own_learning_rate(tmp_path: Path) -> None:
    largest = []
    for scale in (1.0, 0.25):
        trainer = ppo_trainer(
            tmp_path / str(scale),
            ppo={"updates": 1, "epochs": 1, "minibatches": 1, "critic_lr_scale": scale},
        )
        start = {n: t.detach().clone() for n, t in live_tensors(trainer.model).items()}
        trainer.fit()
        moves = {"policy": 0.0, "critic": 0.0}
        for name, tensor in live_tensors(trainer.model).items():
            part = name.split(".")[0]
            moves[part] = max(moves[part], float((tensor - start[name]).detach().abs().max()))
        largest.append(moves)
    # The first step of Adam is the learning rate, whatever the gradient's size.
    assert largest[0] == pytest.approx({"policy": 1e-2, "critic": 1e-2}, rel=1e-2)
    assert largest[1] == pytest.approx({"policy": 1e-2, "critic": 2.5e-3}, rel=1e-2)


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"episodes": 6, "minibatches": 4}, "episodes 6 must be a multiple of minibatches 4."),
        ({"updates": 0}, "updates is 0: it must be at least 1."),
        ({"temperature": 0.0}, "temperature 0.0 must be above 0: PPO has to explore."),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        PPOSettings(**{"updates": 1, "episodes": 8, **changes})
    assert str(caught.value) == sentence


def test_optimisation_settings_of_another_size_are_refused(tmp_path: Path) -> None:
    mistakes: list[dict[str, Any]] = [{"max_steps": 7}, {"batch_size": 8}]
    for changes in mistakes:
        with pytest.raises(UserError, match="must be 8 .updates x epochs x minibatches. and 4"):
            ppo_trainer(tmp_path, **changes)


@pytest.mark.parametrize(
    ("part", "sentence"),
    [
        ("policy", "capacity_factor 1.0 cannot generate"),
        ("critic", "capacity_factor 1.0 makes a token's log-probability"),
        ("reward", "capacity_factor 1.0 makes a token's log-probability"),
    ],
)
def test_a_router_with_capacity_is_refused(tmp_path: Path, part: str, sentence: str) -> None:
    limited: dict[str, Any] = {"capacity_factor": 1.0}
    models: dict[str, Any] = {
        "policy": tiny_lm(**(limited if part == "policy" else {})),
        "critic": critic_of(**(limited if part == "critic" else {})),
    }
    if part == "reward":
        models["reward"] = ModelReward(model=critic_of(**limited))
    with pytest.raises(UserError, match=sentence):
        ppo_trainer(tmp_path, **models)


def test_asking_lets_noise_and_a_coupled_critic_in_but_no_policy_that_cannot_be_sampled(
    tmp_path: Path,
) -> None:
    asked: dict[str, Any] = {"allow_batch_dependent_routing": True}
    noisy: dict[str, Any] = {
        "policy": tiny_lm(router_logit_noise=0.5),
        "critic": critic_of(capacity_factor=1.0),
    }
    trainer = ppo_trainer(tmp_path / "asked", **noisy, options=asked)
    trainer.fit()  # without the check that the first ratio is 1
    assert trainer.own_settings()["allow_batch_dependent_routing"] is True
    with pytest.raises(UserError, match="capacity_factor 1.0 cannot generate"):
        ppo_trainer(tmp_path / "coupled", policy=tiny_lm(capacity_factor=1.0), options=asked)
    with pytest.raises(UserError, match="allow_batch_dependent_routing has no effect"):
        ppo_trainer(tmp_path / "idle", options=asked)


def test_dropout_is_off_in_policy_and_critic(tmp_path: Path) -> None:
    """With dropout the ratio would not be 1, and two passes would not agree."""
    noisy: dict[str, Any] = {"attention_dropout": 0.5}
    trainer = ppo_trainer(tmp_path, policy=tiny_lm(**noisy), critic=critic_of(**noisy))
    trainer.fit()
    assert trainer.state.log_history[0]["policy/ratio_max_deviation"] == 0.0


# --- resuming


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_ppo_is_the_uninterrupted_one_to_the_byte(tmp_path: Path, lora: bool) -> None:
    """Steps 1 and 3 are in the middle of the first buffer, 4 is its end, 6 is in the second."""
    judge = ModelReward(model=critic_of(4))

    def build(folder: Path, seed: int) -> PPOTrainer:
        policy: Any = tiny_lm(seed)
        critic: Any = critic_of(seed + 1)
        reference: Reference = FrozenCopy(tiny_lm(0))
        if lora:  # the frozen adapter is in the checkpoint, so that any seed may build the model
            policy, critic = add_lora(policy, SPEC, name="sft"), add_lora(critic, SPEC)
            copy_adapter(policy, "sft", name="policy")
            reference = FrozenAdapter(policy, "sft")
        return ppo_trainer(
            folder, policy=policy, critic=critic, reference=reference, reward=judge,
            kl=AdaptiveKL(0.2, target=0.5, horizon=100), micro_batch_size=2, save_steps=1,
            keep_checkpoints=9, log_steps=3, lr_schedule="linear",
            ppo={"missing_eos_penalty": 0.5, "critic_lr_scale": 0.5},
        )  # fmt: skip

    whole = build(tmp_path / "whole", 0)
    whole.fit()
    last = (tmp_path / "whole" / "checkpoint-8" / MANIFEST).read_text(encoding="utf-8")
    for step in (1, 3, 4, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = build(folder, 77)
        again.fit(resume=True)
        assert again.optimizer_steps == 8 - step
        assert again.tokens_generated == whole.tokens_generated
        found = (folder / "checkpoint-8" / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(found)["files"] == json.loads(last)["files"]
