"""`rlhf.train --method dpo --loss ...` and `--method kto`: what each trains, says and refuses."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rlhf.train import main
from sft.train import main as sft_main

WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
RUN = (
    *("--max-length", "40", "--lr", "1e-2", "--mirror", "none", "--val-set-size", "0.25"),
    *("--max-steps", "3", "--batch-size", "4", "--log-steps", "1", "--num-samples", "0"),
)
SMALL = ("--hidden-size", "16", "--num-layers", "1", "--num-experts", "4", "--vocab-size", "300")
DPO = ("--method", "dpo", "--data", "pairs.jsonl", "--model", "base", *RUN)
KTO = ("--method", "kto", "--model", "base", *RUN)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `base`, pairs, the same pairs as judged answers, and instructions."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    pairs = [
        {"prompt": words(4), "chosen": f"{words(3)} sun moon", "rejected": words(3)}
        for _ in range(32)
    ]
    judged = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "judged.jsonl", judged)
    rows = [{"instruction": words(4), "output": words(5)} for _ in range(16)]
    write_rows(folder / "rows.jsonl", rows)
    sft = ("--data", "rows.jsonl", *RUN, "--template", "continuation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sft_main(["--model", "new", *sft, *SMALL, "--out", "base"]) == 0
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def summary(run: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return document


@pytest.mark.parametrize(
    ("loss", "flags", "ending"),
    [
        ("DPOLoss", ("--normalisation", "mean", "--beta", "5"), " (0.6931 at the reference)"),
        ("IPOLoss", ("--loss", "ipo", "--beta", "0.5"), " (1.0000 at the reference)"),
        ("HingeLoss", ("--loss", "hinge"), " (1.0000 at the reference)"),
        ("SimPOLoss", ("--loss", "simpo", "--target-margin", "0.5"), ""),
        ("ORPOLoss", ("--loss", "orpo", "--odds-coef", "0.5"), ""),
    ],
)
def test_every_loss_of_pairs_trains_and_says_where_it_began(
    loss: str,
    flags: tuple[str, ...],
    ending: str,
    here: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert main([*DPO, *flags, "--out", str(run)]) == 0
    line = re.search(r"train loss \d+\.\d{4}(.*)\n", capsys.readouterr().out)
    assert line is not None and line[1].rstrip() == ending
    found = summary(run)
    assert found["loss"].startswith(f"{loss}(")
    if ending:
        assert found["before"]["margin"] == 0.0 and found["before"]["accuracy"] == 0.5
    assert found["after"] != found["before"]  # whither, three steps leave to chance


def test_without_beta_each_loss_has_its_own(here: Path, tmp_path: Path) -> None:
    own = {"ipo": "IPOLoss(beta=0.1,", "simpo": "SimPOLoss(beta=2.0, target_margin=1.0)"}
    for name, told in own.items():
        assert main([*DPO, "--loss", name, "--out", str(tmp_path / name)]) == 0
        assert summary(tmp_path / name)["loss"].startswith(told)
        config = (tmp_path / name / "config.yaml").read_text(encoding="utf-8")
        assert f"loss: {name}\n" in config and "odds_coef" not in config


def test_a_run_with_a_loss_of_its_own_is_repeated_from_its_config(
    here: Path, tmp_path: Path
) -> None:
    flags = ("--loss", "ipo", "--beta", "0.5", "--normalisation", "mean")
    assert main([*DPO, *flags, "--out", str(tmp_path / "one")]) == 0
    config = str(tmp_path / "one" / "config.yaml")
    assert main(["--config", config, "--out", str(tmp_path / "two")]) == 0
    assert summary(tmp_path / "one")["after"] == summary(tmp_path / "two")["after"]


def test_kto_learns_the_same_from_pairs_and_from_their_answers_judged_one_by_one(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for name in ("pairs", "judged"):
        flags = ("--data", f"{name}.jsonl", "--beta", "0.5", "--out", str(tmp_path / name))
        assert main([*KTO, *flags]) == 0
        found.append(summary(tmp_path / name))
        out = capsys.readouterr().out
        assert "64 judged answers, split 48 / 16 by prompt; 24 good, 24 bad" in out
        assert "(0.5000 at the reference)" in out
        assert "good over bad answers: margin +0.0000 -> +" in out
    assert found[0]["before"] == found[1]["before"] and found[0]["after"] == found[1]["after"]
    assert found[0]["before"]["loss"] == pytest.approx(0.5, abs=1e-6)
    metrics = (tmp_path / "judged" / "metrics.jsonl").read_text(encoding="utf-8")
    assert '"preference/reference_point"' in metrics and '"preference/accuracy"' in metrics


def test_kto_trains_where_its_held_out_rows_are_of_one_prompt_and_says_that_margins_are_idle(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (here / "pairs.jsonl").read_text("utf-8").splitlines()]
    write_rows(tmp_path / "five.jsonl", [{**row, "margin": 1.0} for row in rows[:5]])
    few = ("--data", str(tmp_path / "five.jsonl"))
    assert main([*KTO, *few, "--out", str(tmp_path / "run")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "held-out examples are not measured" in out and "give a larger --val-set-size" in out
    assert "the margins are not used: KTO's loss has none" in out
    assert summary(tmp_path / "run")["after"] is None


def test_kto_trains_adapters_and_takes_weights(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    weights = ("--desirable-weight", "1.3", "--lora-rank", "2")
    assert main([*KTO, "--data", "judged.jsonl", *weights, "--out", str(run)]) == 0
    assert summary(run)["loss"] == (
        "KTOLoss(beta=0.1, desirable_weight=1.3, undesirable_weight=1.0)"
    )
    assert (run / "adapter").is_dir()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            (*DPO, "--loss", "orpo", "--beta", "0.1"),
            "--beta has no effect with --loss orpo (it belongs to dpo and ipo and hinge and simpo)",
        ),
        ((*DPO, "--target-margin", "0.5"), "with --loss dpo (it belongs to simpo)"),
        ((*DPO, "--loss", "ipo", "--label-smoothing", "0.1"), "with --loss ipo (it belongs to dpo"),
        ((*DPO, "--loss", "simpo", "--normalisation", "mean"), "with --loss simpo (it belongs to"),
        ((*DPO, "--desirable-weight", "2"), "with --method dpo (it belongs to kto)"),
        ((*KTO, "--data", "pairs.jsonl", "--loss", "ipo"), "with --method kto (it belongs to dpo)"),
        ((*DPO, "--loss", "ipo", "--beta", "0"), "IPO: beta must be a finite number above 0"),
        ((*DPO, "--loss", "bco"), "not one of dpo, ipo, hinge, simpo, orpo"),
        ((*KTO, "--data", "rows.jsonl"), "needs preferences, or answers with a label"),
        (
            ("--method", "dpo", "--data", "judged.jsonl", "--model", "base", *RUN),
            "needs preferences (chosen/rejected). Use rlhf.train --method kto.",
        ),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(
    flags: tuple[str, ...], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in here.iterdir()}
    capsys.readouterr()
    assert main(list(flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and sentence in error
    assert {path.name for path in here.iterdir()} == before
