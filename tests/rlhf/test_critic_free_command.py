"""`rlhf.train --method grpo|gspo|rloo|reinforce_pp`: presets of PPO's options, and real runs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe.errors import UserError
from rlhf.options import COMMAND, POLICY_GRADIENT, PRESETS, Config
from rlhf.ppo_settings import PPOSettings
from rlhf.train import main
from sft.command import parse_training
from sft.train import main as sft_main

GIVEN = ("--model", "m", "--data", "d", "--reward-model", "r")
WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
COMMON = ("--max-length", "40", "--mirror", "none", "--quiet", "--save-steps", "0")


def config(method: str, *flags: str) -> Config:
    words = ["--method", method, *GIVEN, *flags]
    return parse_training(Config, words, prog=COMMAND, description="").config


def test_a_method_is_a_preset_of_ppos_options_and_an_option_comes_before_it() -> None:
    def said(method: str, *flags: str) -> PPOSettings:
        return config(method, *flags).ppo_settings()

    common: dict[str, Any] = {"updates": 50, "episodes": 64}
    assert said("ppo") == PPOSettings(**common)
    assert said("grpo") == PPOSettings(
        **common, advantage="grpo", group_size=8, loss_mean="sequence"
    )
    assert said("rloo") == PPOSettings(**common, advantage="rloo", group_size=4)
    assert said("reinforce_pp") == PPOSettings(**common, advantage="reinforce_pp")
    gspo = said("gspo")
    assert (gspo.ratio_level, gspo.clip, gspo.clip_high) == ("sequence", 3e-4, 0.0)
    assert said("gspo", "--clip", "0.1", "--clip-high", "0.2").clip == 0.1
    dr_grpo = said("grpo", "--no-scale-by-std", "--loss-mean", "constant", "--group-size", "16")
    assert (dr_grpo.scale_by_std, dr_grpo.loss_mean, dr_grpo.group_size) == (False, "constant", 16)
    assert said("reinforce_pp", "--group-size", "4", "--gamma", "0.9").num_prompts == 16


@pytest.mark.parametrize(
    ("method", "flags", "sentence"),
    [
        ("rloo", ("--lam", "0.9"), "--lam has no effect with --method rloo (it belongs to ppo)"),
        ("grpo", ("--critic", "shared"), "--critic has no effect with --method grpo (it belongs"),
        ("grpo", ("--value-clip", "0.1"), "--value-clip has no effect with --method grpo"),
        ("gspo", ("--critic-warmup", "1"), "--critic-warmup has no effect with --method gspo"),
        ("grpo", ("--whiten-advantages",), "--whiten-advantages has no effect with --method grpo"),
        ("rloo", ("--gamma", "1.0"), "--gamma has no effect with --method rloo (it belongs to ppo"),
        ("rloo", ("--scale-by-std",), "--scale-by-std has no effect with --method rloo"),
        ("ppo", ("--no-scale-by-std",), "belongs to grpo and gspo"),
        ("rloo", ("--group-size", "1"), "advantage rloo with group_size 1: an answer is measured"),
        ("grpo", ("--episodes", "60"), "episodes 60 must be a multiple of group_size 8"),
        ("gspo", ("--clip-high", "3e-4"), "--clip-high has no effect where it equals --clip"),
        ("grpo", ("--beta", "0.1"), "--beta has no effect with --method grpo"),
        ("grpo", ("--mismatch-correction", "token"), "has no effect with rollout_numerics same"),
        (
            "grpo",
            ("--rollout-numerics", "bf16", "--mismatch-cap", "2.0"),
            "--mismatch-cap has no effect with --mismatch-correction none",
        ),
        ("ppo", ("--rollout-noise", "0.0"), "no effect without --rollout-numerics router_noise"),
    ],
)
def test_an_option_without_effect_or_sense_is_one_sentence(
    method: str, flags: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        config(method, *flags)
    assert sentence in str(caught.value)


def test_every_method_needs_a_reward_model() -> None:
    for method in POLICY_GRADIENT:
        flags = ["--method", method, "--model", "m", "--data", "d"]
        with pytest.raises(UserError, match=f"--method {method} needs --reward-model"):
            parse_training(Config, flags, prog=COMMAND, description="")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a reward model on it and pairs."""
    folder = tmp_path_factory.mktemp("critic-free")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows: list[dict[str, Any]] = [{"instruction": words(4), "output": words(5)} for _ in range(8)]
    pairs = [{"prompt": words(4), "chosen": words(6), "rejected": words(3)} for _ in range(8)]
    for name, held in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in held)
        (folder / name).write_text(text, encoding="utf-8")
    small = ("--hidden-size", "16", "--num-layers", "1", "--num-experts", "4", "--vocab-size")
    one = ("--max-steps", "1", "--batch-size", "4", *COMMON)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sft_main(["--model", "new", "--data", "rows.jsonl", *one, *small, "300",
                         "--num-samples", "0", "--out", "base"]) == 0  # fmt: skip
        assert main(["--method", "rm", "--model", "base", "--data", "pairs.jsonl", *one, "--out",
                     "rm"]) == 0  # fmt: skip
    return folder


@pytest.mark.parametrize("method", ["gspo", "reinforce_pp"])
def test_a_run_leaves_a_policy_its_metrics_and_what_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.chdir(place)
    assert main([
        "--method", method, "--model", "base", "--data", "pairs.jsonl", "--reward-model", "rm",
        "--allow-weak-reward-model", "--updates", "2", "--episodes", "8", "--ppo-epochs", "2",
        "--max-new-tokens", "4", "--num-samples", "1", "--lr", "1e-3", "--log-steps", "1", *COMMON,
        "--out", method,
    ]) == 0  # fmt: skip
    lines = (place / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["stage"] for row in rows} == {method}
    names = {row["name"] for row in rows}
    assert "policy/loss" in names and not any(name.startswith("value/") for name in names)
    assert ("reward/equal_groups" in names) == ("group_size" in PRESETS[method])  # type: ignore[index]
    summary = json.loads((place / method / "summary.json").read_text(encoding="utf-8"))
    assert (summary["method"], summary["steps"]) == (method, 4)
    weights = load_file(place / method / "model" / "model.safetensors")
    assert weights.keys() == load_file(place / "base" / "model" / "model.safetensors").keys()


def test_a_run_with_replay_and_frozen_routers_leaves_them_as_they_were(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main([
        "--method", "rloo", "--model", "base", "--data", "pairs.jsonl", "--reward-model", "rm",
        "--allow-weak-reward-model", "--updates", "1", "--episodes", "8", "--ppo-epochs", "2",
        "--max-new-tokens", "4", "--num-samples", "0", "--lr", "1e-2", "--log-steps", "1", *COMMON,
        "--replay", "rollout", "--rollout-numerics", "router_noise", "--rollout-noise", "1.0",
        "--mismatch-correction", "token", "--freeze-router", "--out", "replayed",
    ]) == 0  # fmt: skip
    lines = (place / "replayed" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    told = {row["name"]: row["value"] for row in rows if row["step"] == 1}
    assert told["router/flip_rate_rollout"] == told["router/flip_rate_new"] == 0.0
    assert told["router/free_flip_rate_rollout"] > 0.0 and told["rollout/logp_gap"] > 0.0
    assert "rollout/correction" in told
    before = load_file(place / "base" / "model" / "model.safetensors")
    after = load_file(place / "replayed" / "model" / "model.safetensors")
    routers = [name for name in before if name.endswith("gate.weight")]
    assert routers and all(torch.equal(before[name], after[name]) for name in routers)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    written = (place / "replayed" / "config.yaml").read_text(encoding="utf-8")
    assert "freeze_router: true" in written and "replay: rollout" in written
