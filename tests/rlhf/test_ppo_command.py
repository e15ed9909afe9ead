"""The options of PPO on the command line: refused where idle, and all at once in one run."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moe.errors import UserError
from rlhf.options import COMMAND, Config
from rlhf.train import main
from sft.command import parse_training
from sft.train import main as sft_main

ROOT = Path(__file__).resolve().parents[2]
PPO = ("--method", "ppo", "--model", "m", "--data", "d", "--reward-model", "r")
WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
COMMON = ("--max-length", "40", "--mirror", "none", "--quiet", "--save-steps", "0")
EVERYTHING = (
    *("--critic", "shared", "--critic-lam", "1.0", "--critic-warmup", "1", "--kl-in", "loss"),
    *("--kl-estimator", "k3", "--clip-high", "0.28", "--dual-clip", "3", "--compat", "n_plus"),
    *("--whitening-variance", "biased", "--whitening-scope", "minibatch"),
    *("--missing-eos-replace", "-1", "--score-scaling", "running", "--score-clip", "5"),
    *("--target-kl", "1e-6", "--ratio-threshold", "5", "--ptx-data", "texts.txt"),
    *("--ptx-coef", "0.5", "--kl-target", "2"),
)
RUN = (
    *("--method", "ppo", "--model", "base", "--data", "pairs.jsonl", "--reward-model", "rm"),
    *("--allow-weak-reward-model", "--updates", "3", "--episodes", "8", "--ppo-epochs", "2"),
    *("--minibatches", "2", "--max-new-tokens", "4", "--num-samples", "1", "--lr", "1e-3"),
    *("--log-steps", "1", *COMMON),
)


def config(*flags: str) -> Config:
    return parse_training(Config, [*PPO, *flags], prog=COMMAND, description="").config


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--kl-estimator", "k2"), "--kl-estimator has no effect with --kl-in reward, which takes"),
        (("--kl-in", "loss", "--kl-estimator", "k1"), "a gradient of zero in expectation"),
        (("--clip-high", "0.2"), "--clip-high has no effect where it equals --clip"),
        (("--clip-high", "-1"), "clip_high is -1.0: give a number of 0 or more."),
        (("--dual-clip", "0.5"), "dual_clip is 0.5: it must be above 1, or 0 to leave it out."),
        (("--ppo-epochs", "1", "--dual-clip", "3"), "--dual-clip has no effect with one step an"),
        (("--ppo-epochs", "1", "--value-clip", "1"), "--value-clip has no effect with one step an"),
        (("--ppo-epochs", "1", "--target-kl", "1"), "target_kl has no effect with 1 epoch"),
        (("--ratio-threshold", "0.5"), "ratio_threshold is 0.5: it must be above 1, or 0"),
        (("--missing-eos-penalty", "1", "--missing-eos-replace", "0"), "two answers to one quest"),
        (("--whitening-scope", "update"), "--whitening-scope has no effect with --minibatches 1"),
        (("--no-whiten-advantages", "--whitening-variance", "biased"), "without a whitening"),
        (("--critic-lam", "0.95"), "--critic-lam has no effect where it equals --lam"),
        (("--critic-warmup", "50"), "must be at least 0 and below updates 50"),
        (("--ptx-coef", "1"), "--ptx-data and --ptx-coef go together: give both or neither."),
        (("--ptx-data", "x.txt"), "--ptx-data and --ptx-coef go together: give both or neither."),
    ],
)
def test_an_option_without_effect_or_sense_is_one_sentence(
    flags: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as caught:
        config(*flags)
    assert sentence in str(caught.value)


def test_an_option_of_ppo_is_refused_with_another_method() -> None:
    flags = ["--method", "dpo", "--model", "m", "--data", "d", "--critic", "shared"]
    with pytest.raises(UserError, match="--critic has no effect with --method dpo .it belongs to"):
        parse_training(Config, flags, prog=COMMAND, description="")


def test_flags_become_the_settings_of_ppo() -> None:
    found = config(*EVERYTHING, "--minibatches", "2", "--ppo-epochs", "3").ppo_settings()
    assert (found.epochs, found.kl_in, found.kl_estimator) == (3, "loss", "k3")
    assert (found.clip_high, found.dual_clip, found.target_kl) == (0.28, 3.0, 1e-6)
    assert (found.missing_eos_replace, found.critic_lam, found.critic_warmup) == (-1.0, 1.0, 1)
    assert (found.whitening_variance, found.whitening_scope) == ("biased", "minibatch")
    assert (found.score_scaling, found.ptx_coef, found.compat) == ("running", 0.5, "n_plus")
    assert found.ratio_threshold == 5.0
    assert config().ppo_settings().epochs == 4  # not the passes over data of other methods


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A language model, a reward model on it, pairs and plain texts."""
    folder = tmp_path_factory.mktemp("ppo-command")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows: list[dict[str, Any]] = [{"instruction": words(4), "output": words(5)} for _ in range(16)]
    pairs = [{"prompt": words(4), "chosen": words(6), "rejected": words(3)} for _ in range(16)]
    for name, held in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in held)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "texts.txt").write_text("\n\n".join(words(30) for _ in range(9)), encoding="utf-8")
    small = ("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size")
    one = ("--max-steps", "1", "--batch-size", "4", *COMMON)
    here = Path.cwd()
    os.chdir(folder)
    try:
        drawn = ("--num-samples", "0", "--out")
        assert sft_main(["--model", "new", "--data", "rows.jsonl", *one, *small, "300", *drawn,
                         "base"]) == 0  # fmt: skip
        assert main(["--method", "rm", "--model", "base", "--data", "pairs.jsonl", *one, "--out",
                     "rm"]) == 0  # fmt: skip
        yield folder
    finally:
        os.chdir(here)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_two_processes_with_every_option_give_the_result_of_one(place: Path) -> None:
    """They agree on the steps that are left out, too."""
    assert main([*RUN, *EVERYTHING, "--out", "one"]) == 0
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "sft" / "accelerate" / "ddp_cpu.yaml")),
            *("--num_processes", "2", "--main_process_port", "0"),  # a free one
            *("-m", "rlhf.train", *RUN, *EVERYTHING, "--out", "two"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    first, second = (load_file(run + "/model/model.safetensors") for run in ("one", "two"))
    assert first.keys() == second.keys()  # and no value head is among them
    assert not any("critic" in name or "score" in name for name in first)
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5)
    one, two = metrics(Path("one")), metrics(Path("two"))
    assert [(r["step"], r["name"], r["count"]) for r in one] == [
        (r["step"], r["name"], r["count"]) for r in two
    ]
    for a, b in zip(one, two, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-4, abs=1e-4), (a, b)
    # The critic's warm-up has no KL; of each later update only the first epoch is made.
    skipped = [row["value"] for row in one if row["name"] == "policy/skipped_steps"]
    assert skipped == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]
    for run in ("one", "two"):
        document = json.loads((Path(run) / "summary.json").read_text(encoding="utf-8"))
        assert document["skipped_steps"] == 4


def test_texts_of_preferences_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*RUN, "--ptx-data", "pairs.jsonl", "--ptx-coef", "1", "--out", "no"]
    assert main(flags) == 2
    assert "pairs.jsonl holds preferences" in capsys.readouterr().err
