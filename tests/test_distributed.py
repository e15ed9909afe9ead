"""Two processes give the result of one: by the launcher's DDP for the commands, by FSDP2 directly."""

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ROOT / "sft" / "accelerate"
# Sums over two halves of a batch round otherwise than over the whole; Adam's step is lr at most.
TOLERANCE = 1e-5
COMMON = (
    *("--max-length", "40", "--lr", "1e-3", "--mirror", "none", "--quiet"),
    *("--max-new-tokens", "4", "--num-samples", "1"),
    *("--balance-scope", "optimizer_step", "--save-steps", "0", "--log-steps", "1"),
)
WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()


@dataclass(frozen=True)
class Place:
    """Data files and the one-process runs that later commands start from."""

    folder: Path

    def run(self, module: str, *flags: str) -> None:
        """The command in this process."""
        from importlib import import_module

        assert import_module(module).main([*flags, *COMMON]) == 0

    def launch(self, module: str, *flags: str) -> str:
        """The command over two processes; what they printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(ACCELERATE / "ddp_cpu.yaml")),
                *("--num_processes", "2", "--main_process_port", str(port)),
                *("-m", module, *flags, *COMMON),
            ],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=240,
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        return answer.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("distributed")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(24)]
    pairs = [
        {"prompt": words(4), "chosen": words(6), "rejected": words(3)} for _ in range(24)
    ]
    for name, held in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in held)
        (folder / name).write_text(text, encoding="utf-8")
    here = Path.cwd()
    os.chdir(folder)
    try:
        made = Place(folder)
        made.run("sft.train", *SFT, "--out", "sft-1")
        yield made
    finally:
        os.chdir(here)


SFT = (
    *("--model", "new", "--data", "rows.jsonl", "--max-steps", "2", "--batch-size", "8"),
    *("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size", "300"),
)
PAIRS = ("--model", "sft-1", "--data", "pairs.jsonl", "--max-steps", "2", "--batch-size", "8")
RM = ("--method", "rm", *PAIRS)
# Balanced only in the tests of sft and rm: in the others the scope would be all that is tested.
DPO = ("--method", "dpo", *PAIRS)
PPO = (
    *("--method", "ppo", "--model", "sft-1", "--data", "pairs.jsonl", "--reward-model", "rm-1"),
    *("--updates", "2", "--episodes", "8", "--ppo-epochs", "1", "--minibatches", "2"),
    *("--allow-weak-reward-model", "--val-set-size", "0.2"),
)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_result(one: Path, two: Path, printed: str) -> None:
    first = load_file(one / "model" / "model.safetensors")
    second = load_file(two / "model" / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=TOLERANCE)
    rows_one, rows_two = metrics(one), metrics(two)
    key = ("step", "stage", "split", "name")
    assert [[r[k] for k in key] for r in rows_one] == [[r[k] for k in key] for r in rows_two]
    for a, b in zip(rows_one, rows_two, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-4, abs=1e-4), (a, b)
        assert b["count"] == a["count"], (a, b)
    assert printed.count("\nin ") == 1, "more than the first process printed"
    assert json.loads((two / "status.json").read_text(encoding="utf-8")) == {"status": "done"}


def test_sft_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    before = set(place.folder.iterdir())
    printed = place.launch("sft.train", *SFT, "--out", "sft-2")
    assert_same_result(place.folder / "sft-1", place.folder / "sft-2", printed)
    assert {path.name for path in set(place.folder.iterdir()) - before} == {"sft-2"}


def test_reward_model_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    printed = place.launch("rlhf.train", *RM, "--out", "rm-2")
    place.run("rlhf.train", *without_samples(RM), "--out", "rm-1")
    assert_same_result(place.folder / "rm-1", place.folder / "rm-2", printed)
