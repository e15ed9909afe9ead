import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moe.heads import MoEForReward
from rlhf.reward import ModelReward, sequence_scores
from rlhf.train import main
from sft.models import find_model, load_causal_lm, load_scalar_model
from sft.text import CONTINUATION, Message, TextPath, load_tokenizer, pad_batch
from sft.train import main as sft_main

WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
COMMON = ("--max-length", "40", "--lr", "1e-2", "--mirror", "none", "--val-set-size", "0.25")
DRAWN = ("--max-new-tokens", "4", "--num-samples", "2")
SMALL = ("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size", "300")
PPO = (
    *("--method", "ppo", "--data", "pairs.jsonl", "--reward-model", "rm", *COMMON, *DRAWN),
    *("--updates", "2", "--episodes", "4", "--ppo-epochs", "2"),
)


def steps(count: int) -> tuple[str, ...]:
    return (*COMMON, "--max-steps", str(count), "--batch-size", "4", "--log-steps", "1")


def rm(count: int) -> tuple[str, ...]:
    return ("--method", "rm", "--data", "pairs.jsonl", *steps(count))


def with_value(flags: tuple[str, ...], flag: str, value: str) -> list[str]:
    """The flags with another value for one of them."""
    at = flags.index(flag) + 1
    return [*flags[:at], value, *flags[at + 1 :]]


DPO = ("--method", "dpo", "--data", "pairs.jsonl", *steps(4), *DRAWN)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that the methods start from: `base` (full), `lora` on it, a reward model `rm`."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(16)]
    write_rows(folder / "rows.jsonl", rows)
    pairs = [
        {"prompt": words(4), "chosen": f"{words(3)} sun moon", "rejected": words(3)}
        for _ in range(64)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    (folder / "plain.txt").write_text("the cat sat", encoding="utf-8")
    sft = ("--data", "rows.jsonl", *steps(4), *DRAWN, "--template", "continuation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sft_main(["--model", "new", *sft, *SMALL, "--out", "base"]) == 0
        assert sft_main(["--model", "base", *sft, "--lora-rank", "2", "--out", "lora"]) == 0
        # These pairs are easy to tell apart: 40 steps make a good reward model, 1 step a poor one.
        assert main([*rm(40), "--model", "base", "--out", "rm"]) == 0
        weak = with_value(rm(1), "--lr", "1e-6")
        assert main([*weak, "--model", "base", "--out", "weak"]) == 0
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The sentence that the command ends with; it has to be one, without a traceback."""
    capsys.readouterr()
    assert main(list(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 15)[None]).logits


def summary(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return document


# The reward model.


def test_reward_model_reopens_for_ppo_and_as_sequence_classification(here: Path) -> None:
    ours = load_scalar_model("rm")
    theirs = AutoModelForSequenceClassification.from_pretrained(here / "rm" / "model")
    assert isinstance(theirs, MoEForReward)
    ids, mask = torch.arange(3, 15).view(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    ours.eval(), theirs.eval()
    with torch.no_grad():
        scores = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(sequence_scores(ours, ids, mask), scores)


def test_reward_model_learns_pairs_that_are_easy_to_tell_apart(here: Path) -> None:
    found = summary(here / "rm")
    assert found["accuracy"]["num_pairs"] == 16
    assert found["accuracy"]["low"] > 0.5
    done = found["normalization"]
    assert (done["mode"], done["gain"], done["num_scores"]) == ("mean", 1.0, 2 * 48)
    assert done["source"] == "both answers of the training pairs" and done["shift"] != 0.0
    assert load_scalar_model("rm").config.reward_normalization == done


def test_reward_model_is_measured_beside_cheap_rules(here: Path) -> None:
    found = summary(here / "rm")
    assert found["accuracy"]["num_pairs"] == sum(found["margins"]["counts"]) == 16
    assert sum(part["num_pairs"] for part in found["calibration"]["bins"]) == 16
    assert found["calibration"]["log_loss"] < 0.6931
    # Chosen answers are longer by two words, always the same two: both rules see it.
    assert set(found["baselines"]) == {"coin", "longer", "bag_of_words"}
    assert found["baselines"]["longer"]["accuracy"]["accuracy"] > 0.9
    assert found["baselines"]["bag_of_words"]["accuracy"]["accuracy"] > 0.9
    metrics = (here / "rm" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"preference/calibration_error"' in metrics and '"preference/log_loss"' in metrics


def scores_of(run: Path, answers: list[tuple[str, str]]) -> torch.Tensor:
    """The saved reward model's scores of (prompt, answer)."""
    text_path = TextPath(load_tokenizer(find_model(run).tokenizer), CONTINUATION, max_length=40)
    texts = [
        text_path.encode((Message("user", prompt), Message("assistant", answer))).input_ids
        for prompt, answer in answers
    ]
    ids, mask = pad_batch(texts, pad_id=text_path.pad_id, side="right")
    return ModelReward(model=load_scalar_model(run))(ids, mask)


@pytest.mark.parametrize("start", ["base", "lora"])
def test_saved_scores_have_mean_0_and_deviation_1_over_given_demonstrations(
    start: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rank = ("--lora-rank", "2") if start == "lora" else ()
    flags = ("--normalize", "std", "--normalize-data", "rows.jsonl", "--out", str(tmp_path / "run"))
    assert main([*rm(2), "--model", start, *rank, *flags]) == 0
    out = capsys.readouterr().out
    assert "mean 0, deviation 1 over 16 of rows.jsonl" in out
    assert "\ncalibration error 0." in out and "\nagainst bag of words " in out
    rows = list(map(json.loads, Path("rows.jsonl").read_text(encoding="utf-8").splitlines()))
    scores = scores_of(tmp_path / "run", [(row["instruction"], row["output"]) for row in rows])
    # float32 scores of a head that was scaled by the gain.
    assert float(scores.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-3)


def test_margins_of_the_file_are_told_and_dpo_says_that_it_has_no_use_for_them(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = map(json.loads, Path("pairs.jsonl").read_text(encoding="utf-8").splitlines())
    write_rows(tmp_path / "pairs.jsonl", [{**row, "margin": 0.5} for row in rows])
    sentences = {"rm": "asked to be ahead by 0.5", "dpo": "margins are not used: DPO's loss"}
    for flags, (method, sentence) in zip((rm(1), DPO), sentences.items(), strict=True):
        found = with_value(flags, "--data", str(tmp_path / "pairs.jsonl"))
        assert main([*found, "--model", "base", "--out", str(tmp_path / method)]) == 0
        assert sentence in capsys.readouterr().out


def test_weak_reward_model_is_named_and_stops_ppo_unless_allowed(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert summary(here / "weak")["accuracy"]["low"] <= 0.5
    weak = [*with_value(PPO, "--reward-model", "weak"), "--model", "base"]
    sentence = told(capsys, *weak)
    assert "is not above chance: PPO would chase noise." in sentence
    assert "Give --allow-weak-reward-model" in sentence
    allowed = [*weak, "--allow-weak-reward-model", "--out", str(tmp_path / "run")]
    assert main(allowed) == 0
    assert "is not above chance" in capsys.readouterr().out


def test_reward_model_of_a_lora_run_is_saved_whole(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*rm(2), "--model", "lora", "--lora-rank", "2", "--out", str(run)]) == 0
    assert not any("lora" in name for name in load_file(run / "model" / "model.safetensors"))
    assert load_scalar_model(run).config.num_labels == 1
    assert "load balancing 0.01" in capsys.readouterr().out  # rm balances, dpo and ppo do not


# DPO.


def test_dpo_reports_margin_and_accuracy_before_and_after(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*DPO, "--model", "base", "--out", str(run)]) == 0
    found = summary(run)
    # Policy and reference are one model at the start: no margin, every pair a tie.
    assert found["before"] == {
        "loss": pytest.approx(0.693147, abs=1e-5),
        "margin": 0.0,
        "accuracy": 0.5,
        "num_pairs": 16,
    }
    assert found["after"]["margin"] > 0.0
    out = capsys.readouterr().out
    assert "held-out margin +0.0000 -> +" in out and "routers observed, not balanced" in out
    assert not torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(run / "model")),
        logits(AutoModelForCausalLM.from_pretrained("base/model")),
    )


@pytest.mark.parametrize("start", ["base", "lora"])
def test_dpo_adapter_opens_in_peft_and_what_it_started_from_is_untouched(
    start: str, here: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    before = {name: digests(here / name) for name in ("base", "lora")}
    run = tmp_path / "run"
    rank = ("--lora-rank", "2") if start == "base" else ()
    assert main([*DPO, "--model", start, *rank, "--out", str(run)]) == 0
    assert {name: digests(here / name) for name in before} == before
    assert summary(run)["before"]["margin"] == 0.0
    base = AutoModelForCausalLM.from_pretrained("base/model")
    opened = PeftModel.from_pretrained(base, run / "adapter")
    trained = logits(opened)
    assert torch.equal(trained, logits(load_causal_lm(find_model(run))))
    assert not torch.equal(trained, logits(load_causal_lm(find_model(start))))


def test_template_of_the_run_is_taken_over(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([*DPO, "--model", "lora", "--out", str(run)]) == 0
    assert "template: continuation\n" in (run / "config.yaml").read_text(encoding="utf-8")


# PPO.


@pytest.mark.parametrize("start", ["base", "lora"])
def test_ppo_reports_reward_kl_length_and_entropy(
    start: str, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main([*PPO, "--model", start, "--kl-target", "2", "--out", str(run)]) == 0
    found = summary(run)
    assert found["steps"] == 4
    assert found["before"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert set(found["after"]) >= {"reward", "kl", "length", "entropy", "ended"}
    assert (run / ("model" if start == "base" else "adapter")).is_dir()
    out = capsys.readouterr().out
    assert "last update: reward " in out and "on 16 held-out prompts: reward " in out
    metrics = (run / "metrics.jsonl").read_text(encoding="utf-8")
    for name in ("policy/kl_coef", "value/loss", "router/load_entropy", "eval/reward"):
        assert f'"{name}"' in metrics


def test_ppo_takes_prompts_of_an_instruction_file(here: Path, tmp_path: Path) -> None:
    flags = [*with_value(PPO, "--data", "rows.jsonl"), "--model", "base", "--quiet"]
    assert main([*flags, "--activation-checkpointing", "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("start", ["base", "lora"])
def test_resumed_ppo_has_the_bits_of_the_uninterrupted_one(
    start: str, here: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*PPO, "--model", start, "--save-steps", "3", "--out", str(whole)]) == 0
    shutil.copytree(whole, cut)
    result = "model" if start == "base" else "adapter"
    shutil.rmtree(cut / result)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    (cut / "status.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    assert main(["--resume", str(cut)]) == 0
    assert digests(cut / result) == digests(whole / result)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


# Mistakes.


PPO_BASE = (*PPO, "--model", "base")
DPO_BASE = (*DPO, "--model", "base")
UNUSED = ("--normalize", "none", "--normalize-data", "rows.jsonl")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            (*PPO_BASE, "--beta", "0.1"),
            "--beta has no effect with --method ppo (it belongs to",
        ),
        ((*DPO_BASE, "--updates", "3"), "--updates has no effect with --method dpo (it belongs to"),
        ((*rm(1), "--model", "base", "--max-new-tokens", "3"), "(it belongs to dpo and kto"),
        ((*PPO_BASE, "--epochs", "1"), "--epochs has no effect with --method ppo"),
        ((*PPO_BASE, "--kl-horizon", "9"), "--kl-horizon has no effect without --kl-target"),
        ((*PPO_BASE, "--allow-weak-reward-model"), "for this reward model, which is above chance"),
        ((*DPO_BASE, "--z-loss-coef", "1"), "--z-loss-coef has no effect with --balance-scope off"),
        ((*DPO, "--model", "lora", "--lora-rank", "2"), "with a LoRA run: the policy is a copy of"),
        ((*DPO[:2], "--data", "rows.jsonl", "--model", "base"), "this method needs preferences"),
        ((*rm(1), "--model", "base", *UNUSED), "--normalize-data has no effect with --normalize"),
        ((*DPO_BASE, "--normalize", "std"), "--normalize has no effect with --method dpo"),
        (
            (*rm(1), "--model", "base", "--normalize-data", "plain.txt"),
            "--normalize-data plain.txt holds plain text: give instructions",
        ),
        (("--method", "ppo", "--model", "base", "--data", "x"), "needs --reward-model, a run of"),
        (("--method", "sac", "--model", "base", "--data", "x"), "not one of rm, dpo, kto, ppo"),
        ((*DPO_BASE, "--label-smoothing", "0.6"), "label_smoothing must be at least 0 and below"),
    ],
)
def test_mistake_is_answered_in_one_sentence(
    flags: tuple[str, ...], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in here.iterdir()}
    assert sentence in told(capsys, *flags)
    assert {path.name for path in here.iterdir()} == before


def test_language_model_is_no_reward_model(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = with_value(PPO, "--reward-model", "base")
    sentence = told(capsys, *flags, "--model", "base", "--allow-weak-reward-model")
    assert "base is no reward model (it is a MoEForCausalLM)" in sentence


def test_help_fits_one_screen_and_flags_are_read_before_torch_is_imported() -> None:
    program = (
        "import sys; from rlhf.train import main; code = main(['--help']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True
    )
    assert len(answer.stdout.splitlines()) <= 40
