"""The resume matrix: killed by SIGKILL at a named point, then the same command with --resume.

128 cells: method x (full, lora) x (moe, dense) x kill point. Every cell is the real command, and
what it leaves must be the uninterrupted run's to the bit: weights, moments, generators, metrics,
samples, summary. Started as a program this file is a server that has imported everything and forks
one process per run, so that a run costs a fifth of a second and not six.
"""

import contextlib
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
SECONDS = 120  # after which a run that hangs is ended

# Checkpoints at steps 2, 4 and 6; metrics at 3 and 6, so that a checkpoint holds half-made sums.
# PPO's six steps are two updates of three epochs: a checkpoint lies in the middle of either buffer.
COMMON = (
    *("--max-length", "40", "--lr", "1e-2", "--mirror", "none", "--save-steps", "2"),
    *("--keep-checkpoints", "1", "--log-steps", "3", "--batch-size-per-device", "2"),
    *("--warmup-steps", "1"),
)
STEPS = ("--max-steps", "6", "--batch-size", "4", "--val-set-size", "0.2")
DRAWN = ("--max-new-tokens", "4", "--num-samples", "1")
PAIRS = ("--data", "pairs.jsonl")
METHODS = {
    "sft": ("sft.train", "--data", "rows.jsonl", *STEPS, *DRAWN),
    "rm": ("rlhf.train", "--method", "rm", *PAIRS, *STEPS),
    "dpo": ("rlhf.train", "--method", "dpo", *PAIRS, *STEPS, *DRAWN),
    "ppo": (
        *("rlhf.train", "--method", "ppo", *PAIRS, *DRAWN, "--allow-weak-reward-model"),
        *("--updates", "2", "--episodes", "4", "--ppo-epochs", "3", "--val-set-size", "0.1"),
        *("--kl-target", "0.5", "--kl-horizon", "100", "--missing-eos-penalty", "0.5"),
    ),
}
ADAPTS = {"full": (), "lora": ("--lora-rank", "2")}
MODELS = ("moe", "dense")
# Kill point -> the step that is gone on from.
POINTS = {
    "between_micro_batches_before_the_first_checkpoint": 0,
    "after_a_step": 2,
    "in_a_line_of_the_metrics": 2,
    "in_a_rollout_or_forward_pass": 2,
    "while_a_checkpoint_is_written": 2,
    "before_old_checkpoints_are_rotated": 4,
    "between_gradient_and_optimizer_step": 4,
    "at_the_end": 6,
}


def command(method: str, adapt: str, model: str) -> list[str]:
    """Module and flags, without a folder for the run."""
    words = [*METHODS[method], *COMMON, "--model", model, *ADAPTS[adapt]]
    return [*words, "--reward-model", f"rm-{model}"] if method == "ppo" else words


# --- the server


def die(*args: Any, **kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL came back")


class TornFile:
    """Writes two thirds of the bytes that hold a mark, then dies."""

    def __init__(self, file: Any, *, mark: bytes) -> None:
        self.file, self.mark = file, mark

    def write(self, text: bytes) -> None:
        if self.mark in text:
            self.file.write(text[: 2 * len(text) // 3])
            die()
        self.file.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def arm(point: str) -> None:
    """Let this process kill itself at the named point."""
    from torch.nn.modules.module import register_module_forward_hook

    import sft.trainer
    from sft.session import Session
    from sft.tracking import Tracker
    from sft.trainer import StageTrainer

    watch: Any = sft.trainer._Watch

    def before(owner: Any, name: str, doomed: Callable[..., bool]) -> None:
        """Die instead of a call for which `doomed` holds."""
        original = getattr(owner, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if doomed(*args, **kwargs):
                die()
            return original(*args, **kwargs)

        setattr(owner, name, guarded)

    def step_ends(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> bool:
        return bool(state.global_step == 3)

    if point == "between_micro_batches_before_the_first_checkpoint":
        seen = []

        def second_of_second(self: Any, *args: Any, **kwargs: Any) -> bool:
            seen.append(self.state.global_step)
            return seen.count(1) == 2

        before(StageTrainer, "compute_loss", second_of_second)
    elif point == "after_a_step":
        before(watch, "on_step_end", step_ends)
    elif point == "in_a_line_of_the_metrics":
        start = Tracker.__init__

        def torn(self: Any, *args: Any, **kwargs: Any) -> None:
            start(self, *args, **kwargs)
            self._file = TornFile(self._file, mark=b'"step": 3,')

        Tracker.__init__ = torn  # type: ignore[method-assign]
    elif point == "in_a_rollout_or_forward_pass":
        calls: list[int] = []

        def count(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 12:
                die()

        def listen(*args: Any, **kwargs: Any) -> bool:
            if step_ends(*args, **kwargs):
                register_module_forward_hook(count)
            return False

        before(watch, "on_step_end", listen)
    elif point == "while_a_checkpoint_is_written":
        before(Path, "rename", lambda self, target: Path(target).name == "checkpoint-4")
    elif point == "before_old_checkpoints_are_rotated":
        before(sft.trainer, "rotate", lambda root, **_: (root / "checkpoint-4").is_dir())
    elif point == "between_gradient_and_optimizer_step":
        before(
            watch,
            "on_pre_optimizer_step",
            lambda self, args, state, *_, **__: state.global_step == 5,
        )
    elif point == "at_the_end":
        before(Session, "leave", lambda *args, **kwargs: True)
    else:
        raise ValueError(point)


def write_start(folder: Path) -> None:
    """Data files and the two models that every run starts from; dropout makes SFT draw."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from moe import MoEConfig, MoEForCausalLM
    from sft.text import train_bpe

    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(24)]
    pairs = [{"prompt": words(4), "chosen": words(6), "rejected": words(3)} for _ in range(24)]
    for name, held in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in held)
        (folder / name).write_text(text, encoding="utf-8")
    tokenizer = train_bpe([" ".join(WORDS)], vocab_size=300)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    models = {
        "moe": MoEForCausalLM(MoEConfig(**sizes, **experts)),
        "dense": LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=24)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_module(words: list[str]) -> int:
    """`python -m MODULE FLAGS` in this process; its exit code."""
    module, *flags = words
    sys.argv = [module, *flags]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def warm_up(folder: Path) -> None:
    """Make the reward models, and import whatever the commands import late."""
    from rlhf.train import main as rlhf
    from sft.train import main as sft

    for model in MODELS:
        _, *flags = command("rm", "full", model)
        at = flags.index("--val-set-size") + 1
        flags[at] = "0"  # never measured, so that PPO has to be allowed to follow it, always
        assert rlhf([*flags, "--out", f"rm-{model}"]) == 0
    for method in METHODS:
        _, *flags = command(method, "lora", "moe")
        assert (sft if method == "sft" else rlhf)([*flags, "--out", f"warm-{method}"]) == 0
        shutil.rmtree(folder / f"warm-{method}")


def serve(folder: Path) -> None:
    """Answer each line {words, kill, log} with the wait status of the process that ran it."""
    import gc

    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what the warm-up prints is not an answer
    write_start(folder)
    warm_up(folder)
    gc.collect()
    gc.freeze()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(log, stream)
            signal.alarm(SECONDS)
            code = 70
            try:
                if job["kill"]:
                    arm(job["kill"])
                code = run_module(job["words"])
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                for file in (sys.stdout, sys.stderr):
                    file.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


# --- the tests


@dataclass
class Server:
    folder: Path
    process: Any
    whole: dict[tuple[str, str, str], Path] = field(default_factory=dict)

    def run(self, words: list[str], *, log: Path, kill: str | None = None) -> int:
        """The exit code of the command, negative for the signal that ended it."""
        job = {"words": words, "kill": kill, "log": str(log)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the server is gone"
        return int(answer)

    def uninterrupted(self, method: str, adapt: str, model: str) -> Path:
        key = (method, adapt, model)
        if key not in self.whole:
            run = self.folder / f"{method}-{adapt}-{model}"
            log = run.with_suffix(".log")
            code = self.run([*command(*key), "--out", str(run)], log=log)
            assert code == 0, log.read_text(encoding="utf-8")
            self.whole[key] = run
        return self.whole[key]


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """In memory where that can be: fsync is called as ever, and waits for no disk."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.fixture
def cell(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[Server]:
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork a process")
    folder = place
    # No GPU for it: a process that has used one cannot be forked.
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "server.log").open("wb"),
        encoding="utf-8",
    )
    assert process.stdin is not None and process.stdout is not None
    ready = process.stdout.readline()
    assert ready == "ready\n", (folder / "server.log").read_text(encoding="utf-8")[-3000:]
    yield Server(folder, process)
    process.stdin.close()
    process.wait(timeout=SECONDS)
    process.stdout.close()


def contents(run: Path) -> dict[str, str]:
    """Every file that a run leaves, by checksum, also hidden ones that it should have swept up.

    But environment.json, which has the command, and the timings, which are no result.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or name == "environment.json":
            continue
        text = path.read_bytes()
        if name == "summary.json":
            summary = json.loads(text)
            assert summary.pop("timings")["seconds"] > 0
            text = json.dumps(summary).encode()
        found[name] = hashlib.sha256(text).hexdigest()
    return found


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapt", ADAPTS)
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_that_is_resumed_is_the_uninterrupted_one_to_the_bit(
    server: Server, cell: Path, method: str, adapt: str, model: str, point: str
) -> None:
    whole = server.uninterrupted(method, adapt, model)
    run, log = cell / "run", cell / "log"
    words = command(method, adapt, model)
    assert server.run([*words, "--out", str(run)], kill=point, log=log) == -signal.SIGKILL, (
        log.read_text(encoding="utf-8")
    )
    assert not (run / "summary.json").exists()
    log.unlink()
    code = server.run([*words, "--resume", str(run)], log=log)
    told = log.read_text(encoding="utf-8")
    assert code == 0, told
    assert f"going on with {run} at step {POINTS[point]}, in the same order of rows" in told
    assert contents(run) == contents(whole)


@pytest.mark.parametrize(
    ("method", "adapt", "model"), [("sft", "full", "moe"), ("ppo", "lora", "dense")]
)
def test_a_run_that_is_killed_at_every_point_in_turn_is_still_the_uninterrupted_one(
    server: Server, cell: Path, method: str, adapt: str, model: str
) -> None:
    run, words, log = cell / "run", command(method, adapt, model), cell / "log"
    for number, point in enumerate(POINTS):
        place = "--resume" if number else "--out"
        assert server.run([*words, place, str(run)], kill=point, log=log) == -signal.SIGKILL, point
    assert server.run([*words, "--resume", str(run)], log=log) == 0
    assert contents(run) == contents(server.uninterrupted(method, adapt, model))


@pytest.mark.parametrize(
    ("method", "adapt", "model", "point"),
    [
        ("sft", "lora", "dense", "in_a_line_of_the_metrics"),
        ("ppo", "lora", "moe", "in_a_rollout_or_forward_pass"),
    ],
)
def test_a_fresh_interpreter_goes_on_with_what_another_left(
    server: Server, cell: Path, method: str, adapt: str, model: str, point: str
) -> None:
    """Nothing of a result hangs on the process: on its hash seed, or on what it ran before."""
    run, words, log = cell / "run", command(method, adapt, model), cell / "log"
    assert server.run([*words, "--out", str(run)], kill=point, log=log) == -signal.SIGKILL
    done = subprocess.run(
        [sys.executable, "-m", *words, "--resume", str(run)],
        cwd=server.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        timeout=2 * SECONDS,
    )
    assert done.returncode == 0, done.stdout
    assert contents(run) == contents(server.uninterrupted(method, adapt, model))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not tests/, where folders have our packages' names
    with contextlib.suppress(KeyboardInterrupt):
        serve(Path(sys.argv[1]))
