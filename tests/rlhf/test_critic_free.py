"""GRPO, GSPO, RLOO and REINFORCE++ as a trainer: PPO's, with groups and without a critic."""

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.dpo import SelfCheckFailed
from rlhf.kl import AdaptiveKL, FixedKL
from rlhf.ppo import PPOSettings, PPOTrainer, RolloutBuffer
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.reward import ModelReward, scalar_model
from sft.adapt import LoraSpec, add_lora
from sft.checkpoint import MANIFEST, live_tensors, read_checkpoint
from sft.settings import TrainSettings

STOPS = (2, 5, 7, 9, 11)
SPEC = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {"advantage": "grpo", "group_size": 4, "loss_mean": "sequence"},
    "dr_grpo": {
        "advantage": "grpo",
        "group_size": 4,
        "scale_by_std": False,
        "loss_mean": "constant",
    },
    "gspo": {
        "advantage": "grpo",
        "group_size": 2,
        "ratio_level": "sequence",
        "loss_mean": "sequence",
        "clip": 0.01,
    },
    "rloo": {"advantage": "rloo", "group_size": 2},
    "reinforce_pp": {"advantage": "reinforce_pp", "whitening_scope": "minibatch"},
    "reinforce_pp_baseline": {"advantage": "reinforce_pp_baseline", "group_size": 2},
}
every_method = pytest.mark.parametrize("method", METHODS)
# Replay of a sampler that routes otherwise, and weights for it: rows, places and sums of their own.
R3: dict[str, Any] = {
    **{"replay": "rollout", "rollout_numerics": "router_noise", "rollout_noise": 0.5},
    "mismatch_correction": "token",
}
WITH_R3 = {**METHODS, "rloo_r3": {**METHODS["rloo"], **R3}}


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


def prompts(count: int = 5) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"prompt_ids": [rng.randrange(3, 32) for _ in range(rng.randrange(2, 8))]}
        for _ in range(count)
    ]


def low_ids(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """A reward for low ids that spreads, so that advantages differ."""
    return torch.where(attention_mask_BS.bool(), 1.0 - input_ids_BS / 16, 0.0).sum(dim=1)


def build(
    folder: Path,
    method: str = "grpo",
    *,
    policy: Any = None,
    critic: nn.Module | None = None,
    reference: Reference | None = None,
    reward: Any = low_ids,
    kl: Any = None,
    pad_id: int = 0,
    ppo: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> PPOTrainer:
    policy = tiny_lm() if policy is None else policy
    sizes = {"updates": 2, "episodes": 8, "epochs": 2, "minibatches": 2, "max_new_tokens": 5}
    rules = PPOSettings(**{**sizes, **WITH_R3[method], **(ppo or {})})
    optimisation = {
        "max_steps": rules.steps,
        "batch_size": rules.minibatch_size,
        "lr": 1e-2,
        "lr_schedule": "constant",
        "log_steps": 1,
        **changes,
    }
    return PPOTrainer(
        policy,
        TrainSettings(**optimisation),
        critic=critic,
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


def moved_by(one: nn.Module, other: nn.Module) -> float:
    """The largest difference of a weight."""
    pairs = zip(live_tensors(one).values(), live_tensors(other).values(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# --- groups


def prompt_texts(buffer: RolloutBuffer) -> list[list[int]]:
    kept = zip(buffer.prompt_BP, buffer.prompt_mask_BP.bool(), strict=True)
    return [ids[mask].tolist() for ids, mask in kept]


def test_an_update_has_episodes_over_group_size_prompts_and_answers_of_one_that_follow(
    tmp_path: Path,
) -> None:
    known = [row["prompt_ids"] for row in prompts()]
    order = []
    for updates in (1, 2, 3):
        trainer = build(tmp_path / str(updates), ppo={"updates": updates})
        trainer.fit()
        texts = prompt_texts(buffer_of(trainer))
        assert texts[:4] == [texts[0]] * 4 and texts[4:] == [texts[4]] * 4
        order += [known.index(texts[0]), known.index(texts[4])]
        answers = {tuple(row.tolist()) for row in buffer_of(trainer).response_BR[:4]}
        assert len(answers) > 1  # each answer is drawn by its own number
    assert sorted(order[:5]) == list(range(5))  # all prompts once before any again


def test_advantages_are_those_of_each_group_less_the_kl_by_hand(tmp_path: Path) -> None:
    trainer = build(
        tmp_path, "rloo", reference=FrozenCopy(tiny_lm(1)),
        ppo={"updates": 1, "epochs": 1, "minibatches": 1},
    )  # fmt: skip
    trainer.fit()
    buffer = buffer_of(trainer)
    for i in range(8):
        kl_B = (buffer.old_logp_BR - buffer.ref_logp_BR).sum(dim=1)
        mine, other = (float(buffer.score_B[j] - 0.1 * kl_B[j]) for j in (i, i ^ 1))
        length = int(buffer.mask_BR[i].sum())
        held = buffer.advantage_BR[i]
        assert held[:length].tolist() == pytest.approx([mine - other] * length, abs=1e-5)
        assert not held[length:].any()


def test_how_far_the_scores_of_a_group_differ_is_logged(tmp_path: Path) -> None:
    def first_group_alike(ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 6.0, 2.0])

    trainer = build(tmp_path, reward=first_group_alike, ppo={"updates": 1})
    trainer.fit()
    row = trainer.state.log_history[0]
    assert row["reward/group_deviation"] == pytest.approx((0.0 + 2.0) / 2)
    assert row["reward/equal_groups"] == 0.5
    plain = build(tmp_path / "one", "reinforce_pp", ppo={"updates": 1})
    plain.fit()
    assert "reward/equal_groups" not in plain.state.log_history[0]


# --- no critic


@every_method
def test_there_is_no_critic_in_the_model_the_optimizer_the_metrics_or_the_checkpoint(
    tmp_path: Path, method: str
) -> None:
    trainer = build(tmp_path, method, save_steps=8)
    before = {name: t.detach().clone() for name, t in live_tensors(trainer.model).items()}
    trainer.fit()
    assert trainer.optimizer_steps == 8
    assert all(name.startswith("policy.") for name, _ in trainer.model.named_parameters())
    moved = [n for n, t in live_tensors(trainer.model).items() if not torch.equal(t, before[n])]
    assert any("q_proj" in name for name in moved) and any("experts" in name for name in moved)
    saved = read_checkpoint(tmp_path / "checkpoint-8")
    assert all(name.startswith("policy.") for name in saved.tensors["model"])
    for row in trainer.state.log_history:
        assert not any(name.startswith(("value/", "router/critic")) for name in row)
        assert "policy/loss" in row
    assert trainer.own_settings()["critic"] == "none"
    with pytest.raises(UserError, match="asks no critic: there is none."):
        _ = trainer.critic


def test_a_critic_that_nobody_asks_is_refused(tmp_path: Path) -> None:
    critic = scalar_model(tiny_lm())
    with pytest.raises(UserError) as caught:
        build(tmp_path, "rloo", critic=critic)
    assert str(caught.value) == "advantage rloo asks no critic: leave it out."


def test_with_a_critic_its_loss_stays_a_mean_over_tokens_whatever_the_policys_is(
    tmp_path: Path,
) -> None:
    """Lengths differ, or the two means would be the same."""
    made = {}
    for mean in ("token", "sequence", "constant"):
        gae: dict[str, Any] = {"advantage": "gae", "group_size": 1, "loss_mean": mean}
        trainer = build(
            tmp_path / mean, critic=scalar_model(tiny_lm(3)), adam_eps=1e-3, max_grad_norm=1e9,
            ppo={**gae, "updates": 1, "epochs": 1},
        )  # fmt: skip
        trainer.fit()
        made[mean] = trainer
    for mean in ("sequence", "constant"):
        assert moved_by(made[mean].critic, made["token"].critic) < 1e-6
        assert moved_by(made[mean].policy, made["token"].policy) > 1e-5


# --- PPO's checks go on


@every_method
def test_in_the_first_minibatch_the_ratio_is_1_and_later_it_is_not(
    tmp_path: Path, method: str
) -> None:
    trainer = build(tmp_path, method, micro_batch_size=2)
    trainer.fit()
    history = trainer.state.log_history
    for step in (0, 4):
        assert history[step]["policy/ratio_max_deviation"] == 0.0
        assert history[step]["policy/clip_fraction"] == 0.0
    assert history[3]["policy/ratio_max_deviation"] > 1e-4
    if method == "gspo":
        assert any(row["policy/clip_fraction"] > 0 for row in history)


class MovesThePolicy(TrainerCallback):
    """Between rollout and update of the second update, someone changes the policy."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            with torch.no_grad():
                for parameter in kwargs["model"].policy.parameters():
                    parameter.mul_(1.5)


def test_a_policy_that_changed_between_rollout_and_update_stops_gspo_too(tmp_path: Path) -> None:
    trainer = build(tmp_path, "gspo")
    trainer.add_callback(MovesThePolicy())
    with pytest.raises(SelfCheckFailed, match="PPO update 1: in the first minibatch the ratio"):
        trainer.fit()


def test_a_brake_leaves_steps_out_and_all_are_counted(tmp_path: Path) -> None:
    trainer = build(tmp_path, "gspo", ppo={"target_kl": 1e-9})
    trainer.fit()
    assert (trainer.optimizer_steps, trainer.brake.skipped_steps) == (4, 4)


# --- resuming


@pytest.mark.parametrize("method", ["grpo", "gspo", "reinforce_pp"])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_byte(
    tmp_path: Path, method: str
) -> None:
    """Steps 1 and 3 are in the middle of the first buffer, 4 is its end, 6 is in the second."""

    def made(folder: Path, seed: int) -> PPOTrainer:
        policy: Any = tiny_lm(0)
        lora = method == "gspo"
        if lora:
            torch.manual_seed(seed)
            policy = add_lora(policy, SPEC)
        return build(
            folder, method, policy=policy,
            reference=FrozenAdapter(policy, None) if lora else FrozenCopy(tiny_lm(5)),
            kl=AdaptiveKL(0.2, target=0.5, horizon=100), micro_batch_size=2, save_steps=1,
            keep_checkpoints=9, log_steps=3, lr_schedule="linear",
            ppo={"missing_eos_penalty": 0.5, "score_scaling": "running"},
        )  # fmt: skip

    whole = made(tmp_path / "whole", 0)
    whole.fit()
    last = json.loads((tmp_path / "whole" / "checkpoint-8" / MANIFEST).read_text(encoding="utf-8"))
    for step in (1, 3, 4, 6):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = made(folder, 0 if method != "gspo" else 77)
        again.fit(resume=True)
        assert again.optimizer_steps == 8 - step
        found = json.loads((folder / "checkpoint-8" / MANIFEST).read_text(encoding="utf-8"))
        assert found["files"] == last["files"]


def test_a_checkpoint_of_another_method_is_not_gone_on_with(tmp_path: Path) -> None:
    build(tmp_path, "rloo", save_steps=1, keep_checkpoints=9).fit()
    shutil.rmtree(tmp_path / "checkpoint-8")
    other = build(tmp_path, "rloo", save_steps=1, ppo={"advantage": "grpo", "scale_by_std": False})
    with pytest.raises(UserError, match="ppo.advantage was rloo, is grpo"):
        other.fit(resume=True)


def test_a_checkpoint_from_before_these_options_was_trained_with_their_defaults(
    tmp_path: Path,
) -> None:
    gae: dict[str, Any] = {"advantage": "gae", "group_size": 1, "loss_mean": "token"}
    critic = scalar_model(tiny_lm(3))
    trainer = build(tmp_path, critic=critic, ppo=gae, save_steps=8)
    trainer.fit()
    checkpoint = read_checkpoint(tmp_path / "checkpoint-8")
    held: Any = checkpoint.documents["settings"]
    for name in ("advantage", "group_size", "scale_by_std", "ratio_level", "loss_mean"):
        del held["ppo"][name]
    trainer._check_same_settings(checkpoint)
    del held["ppo"]["clip"], held["ppo"]["episodes"]
    with pytest.raises(UserError, match="ppo.episodes was None, is 8"):
        trainer._check_same_settings(checkpoint)


# --- splitting, padding and processes


def unequal(trainer: PPOTrainer) -> bool:
    return len(set(buffer_of(trainer).mask_BR.sum(dim=1).tolist())) > 1


@pytest.mark.parametrize("method", WITH_R3)
def test_8_times_1_is_4_times_2_is_1_times_8_in_float64(tmp_path: Path, method: str) -> None:
    """Adam's eps keeps it from magnifying what rounding leaves of a gradient (see test_trainer)."""
    options: dict[str, Any] = {"ppo": {"minibatches": 1}, "adam_eps": 1e-3, "max_grad_norm": 1e9}
    whole, *parts = (
        build(
            tmp_path / str(micro), method, policy=tiny_lm().double(), micro_batch_size=micro,
            **options,
        )
        for micro in (8, 2, 1)
    )  # fmt: skip
    whole.fit()
    assert unequal(whole)
    for part in parts:
        part.fit()
        assert torch.equal(buffer_of(whole).response_BR, buffer_of(part).response_BR)
        assert moved_by(whole.model, part.model) < 1e-6


@pytest.mark.parametrize("method", WITH_R3)
def test_the_pad_id_changes_nothing_to_the_bit(tmp_path: Path, method: str) -> None:
    one, other = (build(tmp_path / str(pad), method, pad_id=pad) for pad in (0, 9))
    one.fit()
    other.fit()
    assert unequal(one) and moved_by(one.model, other.model) == 0.0


def train_one_of_two(rank: int, folder: str, method: str) -> None:
    """One process of a training over two; the first one writes what came of it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    trainer = build(
        Path(folder) / "two", method, policy=tiny_lm().double(), adam_eps=1e-3, max_grad_norm=1e9
    )
    assert trainer.accelerator.num_processes == 2
    trainer.fit()
    if rank == 0:
        tensors = live_tensors(trainer.model)
        found = {name: tensor.detach().tolist() for name, tensor in tensors.items()}
        document = {"weights": found, "history": trainer.state.log_history}
        (Path(folder) / "found.json").write_text(json.dumps(document), encoding="utf-8")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", ["gspo", "rloo_r3"])
def test_two_processes_that_share_every_group_give_the_result_of_one(
    tmp_path: Path, method: str
) -> None:
    """Answers go round between the processes; baselines are of the whole group all the same."""
    torch.multiprocessing.spawn(train_one_of_two, args=(str(tmp_path), method), nprocs=2)
    document = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    one = build(
        tmp_path / "one", method, policy=tiny_lm().double(), adam_eps=1e-3, max_grad_norm=1e9
    )
    assert one.plan.own_episodes == list(range(8))
    one.fit()
    assert unequal(one)
    for name, tensor in live_tensors(one.model).items():
        found = torch.tensor(document["weights"][name], dtype=torch.float64)
        assert float((found - tensor.detach()).abs().max()) < 1e-6, name
    for ours, theirs in zip(one.state.log_history, document["history"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, number in ours.items():
            assert theirs[name] == pytest.approx(number, rel=1e-5, abs=1e-6), name


@every_method
def test_a_router_whose_log_probabilities_are_not_the_policys_is_refused_here_too(
    method: str, tmp_path: Path
) -> None:
    noisy: dict[str, Any] = {"router_jitter_noise": 0.1}
    with pytest.raises(UserError, match="jitter_noise 0.1 makes log-probabilities in training"):
        build(tmp_path, method, policy=tiny_lm(**noisy))
    asked = {"allow_batch_dependent_routing": True}
    assert build(tmp_path, method, policy=tiny_lm(**noisy), options=asked).is_noisy
    with pytest.raises(UserError, match="capacity_factor 1.0 cannot generate"):
        build(tmp_path, method, policy=tiny_lm(capacity_factor=1.0), options=asked)
    judge = ModelReward(model=scalar_model(tiny_lm(capacity_factor=1.0)))
    with pytest.raises(UserError, match="capacity_factor 1.0 makes a token's log-probability"):
        build(tmp_path, method, reward=judge)
    with pytest.raises(UserError, match="allow_batch_dependent_routing has no effect"):
        build(tmp_path, method, options=asked)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"advantage": "grppo", "group_size": 4}, "advantage is 'grppo': it is one of gae, grpo"),
        ({"ratio_level": "tokn"}, "ratio_level is 'tokn': it is one of token, sequence"),
        ({"loss_mean": "x"}, "loss_mean is 'x': it is one of token, sequence, constant"),
        ({"mismatch_correction": "tok"}, "mismatch_correction is 'tok': it is one of"),
        ({"temperature": float("inf")}, "temperature is inf: give a finite number"),
        ({"entropy_coef": float("nan")}, "entropy_coef is nan: give a finite number"),
    ],
)
def test_a_mistyped_choice_and_a_number_that_is_none_are_refused_by_name(
    wrong: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        PPOSettings(updates=1, episodes=8, **wrong)
    assert sentence in str(caught.value)
