"""`python -m rlhf.label` from two models to a reward model, and what it says when it cannot."""

import io
import json
import random
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rlhf.label import main
from rlhf.train import main as rlhf_main
from sft.data import read_examples
from sft.train import main as sft_main

WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
COMMON = ("--max-length", "40", "--lr", "1e-2", "--mirror", "none", "--val-set-size", "0.25")
SMALL = ("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size", "300")
STEPS = ("--max-steps", "2", "--batch-size", "4", "--num-samples", "0")
ROOM = ("--max-length", "64", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two policies, `base` and `lora` on it, and instructions to take prompts from."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(16)]
    rows.append(rows[0])
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "plain.txt").write_text("the cat sat", encoding="utf-8")
    sft = ("--data", "rows.jsonl", *COMMON, *STEPS, "--template", "continuation")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert sft_main(["--model", "new", *sft, *SMALL, "--out", "base"]) == 0
        assert sft_main(["--model", "base", *sft, "--lora-rank", "2", "--out", "lora"]) == 0
        long = ("--max-length", "2000", *sft[4:])
        assert sft_main(["--model", "new", *sft[:2], *long, *SMALL, "--out", "judge"]) == 0
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    return made


def command(out: Path, *more: str) -> list[str]:
    return ["base", "lora", "--prompts", "rows.jsonl", "--out", str(out), *ROOM, *more]


def run(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints."""
    capsys.readouterr()
    assert main(list(argv)) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that it ends with."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def piped(monkeypatch: pytest.MonkeyPatch, keys: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys))


def test_labels_of_two_runs_train_a_reward_model(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "pairs.jsonl"
    piped(monkeypatch, "1 2 1 q")
    told = run(command(out), capsys)
    assert "1 rows repeat an earlier prompt" in told and "left to judge" in told
    assert "A is" not in told and "lora" not in told.split("Keys:")[1]
    piped(monkeypatch, "1 2" * 8)
    told = run(command(out), capsys)
    assert "A is base\nB is lora" in told and "A over B:" in told and "Wilson, 95 %" in told
    examples = read_examples(out)
    assert examples.kind == "preference" and len(examples) >= 8
    summary = json.loads((tmp_path / "pairs.summary.json").read_text(encoding="utf-8"))
    assert summary["num_prompts"] == 16 and summary["num_preferences"] == len(examples)
    rm = ["--method", "rm", "--model", "base", "--data", str(out), *COMMON]
    rm += ["--max-steps", "2", "--batch-size", "4", "--out", str(tmp_path / "rm")]
    assert rlhf_main(rm) == 0
    assert "Columns not used: chosen_from, rater, key." in capsys.readouterr().out


def test_a_second_rater_sees_the_same_texts_and_agreement_is_told(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "pairs.jsonl"
    (tmp_path / "keys.txt").write_text("1" * 8, encoding="utf-8")
    keys = ("--answers", str(tmp_path / "keys.txt"), "--num", "6")
    run(command(out, *keys, "--rater", "ana"), capsys)
    answers = (tmp_path / "pairs.answers.json").read_bytes()
    told = run(command(out, *keys, "--rater", "ben"), capsys)
    assert (tmp_path / "pairs.answers.json").read_bytes() == answers
    assert "/6 answers" not in told
    assert "ana and ben on" in told and "Cohen's kappa" in told and "Krippendorff's alpha" in told
    report = run(command(out, "--num", "6", "--report"), capsys)
    assert "ana and ben on" in report and "Keys:" not in report


def test_a_model_judges_in_both_orders_and_is_not_asked_twice(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pairs.jsonl"
    told = run(command(out, "--num", "5", "--judge", "judge"), capsys)
    assert "judge:judge#" in told and "the same winner in both orders" in told
    votes = (tmp_path / "pairs.votes.jsonl").read_bytes()
    again = run(command(out, "--num", "5", "--judge", "judge"), capsys)
    assert "0 pairs in both orders, 0 questions asked" in again
    assert (tmp_path / "pairs.votes.jsonl").read_bytes() == votes
    # Its verdicts are kept: without its votes it says the same again, unasked.
    (tmp_path / "pairs.votes.jsonl").unlink()
    out.unlink(missing_ok=True)
    anew = run(command(out, "--num", "5", "--judge", "judge"), capsys)
    assert ", 0 questions asked" in anew
    assert (tmp_path / "pairs.votes.jsonl").read_bytes() == votes
    other = run(command(out, "--num", "5", "--judge", "judge", "--criterion", "Short?"), capsys)
    assert ", 0 questions asked" not in other and "Cohen's kappa" in other


class FirstIsBetter(BaseHTTPRequestHandler):
    """An endpoint with a position bias, as many models have."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        reply: dict[str, Any] = {"choices": [{"message": {"content": "1"}}]}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


def test_a_judge_that_always_takes_the_first_gives_ties_and_no_preference(
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    out = tmp_path / "pairs.jsonl"
    with ThreadingHTTPServer(("127.0.0.1", 0), FirstIsBetter) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        try:
            flags = ("--num", "4", "--judge", url, "--judge-model", "biased")
            told = run(command(out, *flags), capsys)
        finally:
            server.shutdown()
            thread.join()
    assert "judge:biased#" in told and "A 0, B 0, tie" in told
    assert "the same winner in both orders 0.000" in told
    assert "There is no preference to train on yet." in told and not out.exists()


def test_two_draws_of_one_model_can_be_compared_and_two_greedy_ones_cannot(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.txt").write_text("1" * 20, encoding="utf-8")
    same = ["base", "base", *command(tmp_path / "pairs.jsonl")[2:]]
    same += ["--answers", str(tmp_path / "keys.txt")]
    error = refused([*same, "--temperature", "0"], capsys)
    assert "are the same model" in error and "raise it" in error
    run(same, capsys)
    pairs = json.loads((tmp_path / "pairs.answers.json").read_text(encoding="utf-8"))["pairs"]
    assert any(row["a"] != row["b"] for row in pairs)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (("--criterion", "x"), "--criterion has no effect without --judge"),
        (("--judge", "base", "--rater", "ana"), "--rater has no effect with --judge"),
        (("--judge", "base", "--judge-tokens", "3"), "with a --judge that is no URL"),
        (("--judge", "http://host/v1"), "--judge URL needs --judge-model"),
        (("--judge", "base", "--criterion", ""), "--criterion is empty"),
        (("--judge", " "), "--judge is empty"),
        (("--judge", "http://host/v1", "--judge-model", ""), "--judge-model is empty"),
        (("--report", "--answers", "x"), "--answers has no effect with --report"),
        (("--report",), "label first"),
        (("--rater", "judge:x"), "names that begin with judge:"),
        (("--temperature", "-1"), "must be 0 or more"),
        (("--max-new-tokens", "64"), "leaves no room for a prompt"),
        (("--out", "pairs.json"), "ending .jsonl"),
        ((), "needs a terminal"),
    ],
)
def test_a_mistake_is_one_sentence(
    more: tuple[str, ...],
    told: str,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    piped(monkeypatch, "")
    argv = ["base", "lora", "--prompts", "rows.jsonl"]
    given = {"--out": str(tmp_path / "x.jsonl"), "--max-length": "64", "--max-new-tokens": "6"}
    for flag, value in given.items():
        argv += [] if flag in more else [flag, value]
    assert told in refused([*argv, *more], capsys)


@pytest.mark.parametrize(
    ("judge", "told"),
    [
        (("nowhere",), "No model folder nowhere"),
        (("http://:8000/v1", "--judge-model", "m"), "is not http://HOST"),
        (
            ("http://host/v1", "--judge-model", "m", "--judge-key-env", "NO_SUCH_KEY"),
            "NO_SUCH_KEY (--judge-key-env) is not set",
        ),
    ],
)
def test_a_judge_that_cannot_be_opened_is_told_before_any_answer_is_drawn(
    judge: tuple[str, ...],
    told: str,
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert told in refused(command(tmp_path / "pairs.jsonl", "--judge", *judge), capsys)
    assert list(tmp_path.iterdir()) == []


def test_plain_text_and_changed_options_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys.txt").write_text("q", encoding="utf-8")
    keys = ("--answers", str(tmp_path / "keys.txt"), "--num", "3")
    out = tmp_path / "pairs.jsonl"
    plain = [*command(out, *keys)[:3], "plain.txt", *command(out, *keys)[4:]]
    assert "holds plain text; prompts come from" in refused(plain, capsys)
    run(command(out, *keys), capsys)
    error = refused(command(out, *keys, "--temperature", "0.5"), capsys)
    assert "was made with temperature 1.0, and now it is 0.5" in error
