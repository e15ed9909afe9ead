"""A run that finds something changed: refused in one sentence, or allowed, said and recorded."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from sft.text import train_bpe
from sft.train import main

WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
FLAGS = (
    *("--model", "llama", "--data", "rows.jsonl", "--max-length", "40", "--max-steps", "4"),
    *("--batch-size", "4", "--lr", "1e-2", "--lr-schedule", "constant", "--max-new-tokens", "4"),
    *("--mirror", "none", "--val-set-size", "0.2", "--log-steps", "1", "--save-steps", "2"),
)


def write_rows(path: Path, *, seed: int) -> None:
    rng = random.Random(seed)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a tiny Llama, and a run that was stopped between its checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    write_rows(folder / "rows.jsonl", seed=0)
    tokenizer = train_bpe([" ".join(WORDS)], vocab_size=300)
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*FLAGS, "--out", "whole", "--quiet"]) == 0
    shutil.copytree(folder / "whole", folder / "cut")
    shutil.rmtree(folder / "cut" / "model")
    shutil.rmtree(folder / "cut" / "checkpoints" / "checkpoint-4")
    (folder / "cut" / "summary.json").unlink()
    (folder / "cut" / "status.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all that, to change."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The sentence of a refusal; it has to be one line, without a traceback."""
    capsys.readouterr()
    assert main(list(flags)) == 2
    errors = capsys.readouterr().err.splitlines()
    # Where there are checkpoints, the command says how to go on before it says why it stopped.
    assert [line.partition(":")[0] for line in errors if "go on with" not in line] == ["error"]
    return errors[-1]


def document(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def changed_rows(here: Path) -> None:
    write_rows(here / "rows.jsonl", seed=1)


def changed_weights(here: Path) -> None:
    path = here / "llama" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] += 0.5
    save_file(weights, path, metadata={"format": "pt"})


def changed_tokenizer(here: Path) -> None:
    path = here / "llama" / "tokenizer_config.json"
    held = document(path)
    path.write_text(json.dumps({**held, "chat_template": "{{ messages }}"}), encoding="utf-8")


CHANGES = {"data": changed_rows, "model": changed_weights, "tokenizer": changed_tokenizer}


@pytest.mark.parametrize("kind", CHANGES)
def test_changed_input_is_refused_then_allowed_said_and_recorded(
    here: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    CHANGES[kind](here)
    sentence = told(capsys, "--resume", "cut")
    assert f"checkpoint-2 cannot be resumed: fingerprint of {kind} was " in sentence
    assert sentence.endswith(f" --allow-changed {kind} goes on all the same.")
    assert not (here / "cut" / "summary.json").exists()
    other = "model" if kind == "data" else "data"
    assert told(capsys, "--resume", "cut", "--allow-changed", other) == sentence

    capsys.readouterr()
    assert main(["--resume", "cut", "--allow-changed", kind, "settings"]) == 0
    out = capsys.readouterr().out
    assert f"from step 2 on with another fingerprint of {kind}: it was " in out
    assert f"(--allow-changed {kind})" in out
    summary = document(here / "cut" / "summary.json")
    (noted,) = summary["resumed_with_changes"]
    assert noted == document(here / "cut" / "environment.json")["resumed_with_changes"][0]
    (change,) = noted["changes"]
    assert (noted["step"], change["kind"], change["what"]) == (2, kind, f"fingerprint of {kind}")
    assert change["was"] != change["now"]
    assert "allow_changed" not in (here / "cut" / "config.yaml").read_text(encoding="utf-8")
    assert "resumed_with_changes" not in document(here / "whole" / "summary.json")


def test_changed_option_is_refused_with_the_word_that_allows_it(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = told(capsys, "--resume", "cut", "--lr", "2e-2", "--data", "other.jsonl")
    assert sentence.startswith("error: No file other.jsonl") or "other.jsonl" in sentence
    shutil.copy("rows.jsonl", "other.jsonl")
    sentence = told(capsys, "--resume", "cut", "--lr", "2e-2", "--data", "other.jsonl")
    assert "lr differs (0.01 in the run, 0.02 now)" in sentence
    assert "data differs (" in sentence
    assert sentence.endswith("--allow-changed data settings goes on all the same.")
    sentence = told(
        capsys,
        "--resume",
        "cut",
        "--lr",
        "2e-2",
        "--data",
        "other.jsonl",
        "--allow-changed",
        "data",
    )
    assert "data differs" not in sentence
    assert sentence.endswith("--allow-changed settings goes on all the same.")


def test_changed_option_takes_effect_and_is_the_runs_own_from_then_on(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--resume", "cut", "--allow-changed", "settings", "--lr", "2e-2"]
    assert main(flags) == 0
    assert "from step 2 on with another lr: it was 0.01, is 0.02" in capsys.readouterr().out
    assert yaml.safe_load((here / "cut" / "config.yaml").read_text("utf-8"))["lr"] == 0.02
    rows = [json.loads(line) for line in (here / "cut" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["value"] for row in rows if row["name"] == "train/learning_rate"]
    assert rates == [0.01, 0.01, 0.02, 0.02]
    (noted,) = document(here / "cut" / "summary.json")["resumed_with_changes"]
    assert [(c["what"], c["was"], c["now"]) for c in noted["changes"]] == [("lr", 0.01, 0.02)]
    # Killed after its last checkpoint, it needs no word to be gone on with.
    (here / "cut" / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    before = (here / "cut" / "summary.json").read_bytes()
    assert main(["--resume", "cut"]) == 0
    again = document(here / "cut" / "summary.json")
    first = json.loads(before)
    again.pop("timings"), first.pop("timings")
    assert again == first


def test_finished_run_can_be_given_more_steps(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", "whole", "--max-steps", "6", "--allow-changed", "settings"]) == 0
    assert "from step 4 on with another max_steps: it was 4, is 6" in capsys.readouterr().out
    summary = document(here / "whole" / "summary.json")
    assert summary["steps"] == 6
    at = FLAGS.index("--max-steps") + 1
    assert main([*FLAGS[:at], "6", *FLAGS[at + 1 :], "--out", "six", "--quiet"]) == 0
    long, six = (load_file(here / run / "model" / "model.safetensors") for run in ("whole", "six"))
    # The schedule is constant and the order a function of the seed: the same six steps.
    assert all(torch.equal(long[name], six[name]) for name in six)


def test_another_thread_count_is_a_change_of_the_machine(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        sentence = told(capsys, "--resume", "cut")
        assert f"threads was {threads}, is {threads + 1};" in sentence
        assert sentence.endswith("--allow-changed machine goes on all the same.")
        assert main(["--resume", "cut", "--allow-changed", "machine"]) == 0
    finally:
        torch.set_num_threads(threads)
    (noted,) = document(here / "cut" / "summary.json")["resumed_with_changes"]
    assert [change["what"] for change in noted["changes"]] == ["threads"]


def test_allowing_what_is_not_changed_is_said_and_changes_nothing(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", "cut", "--allow-changed", "data", "model"]) == 0
    assert "--allow-changed data model: nothing is changed" in capsys.readouterr().out
    cut, whole = document(here / "cut" / "summary.json"), document(here / "whole" / "summary.json")
    cut.pop("timings"), whole.pop("timings")
    assert cut == whole
    for name in ("config.yaml", "metrics.jsonl", "model/model.safetensors"):
        assert (here / "cut" / name).read_bytes() == (here / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (FLAGS, "--allow-changed has no effect without --resume: leave it out."),
        (("--resume", "cut"), "--allow-changed"),
    ],
)
def test_allowing_nothing_or_an_unknown_thing_is_a_mistake(
    here: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    word = "data" if flags is FLAGS else "weather"
    assert sentence in told(capsys, *flags, "--allow-changed", word)
