"""A run's folder is written whole, says what it was, and is not resumed as something else."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import yaml

from moe.errors import UserError
from sft import flags
from sft.run import (
    Run,
    config_hash,
    describe_environment,
    redact,
    redact_command,
    write_json_atomic,
    write_text_atomic,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = "moe-tiny"
    lr: float = 3e-4
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Path | None = None
    note: str = ""
    packing: bool = False


def test_the_folder_is_stamped_and_carries_the_hash_of_its_configuration(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    assert run.folder.parent == tmp_path / "compare"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.name)
    assert run.name.endswith(config_hash(Config())[:4])
    assert {p.name for p in run.folder.iterdir()} == {
        "config.yaml",
        "environment.json",
        "status.json",
    }


def test_two_runs_of_one_second_get_two_folders_and_latest_leads_to_the_second(
    tmp_path: Path,
) -> None:
    first = Run.create(tmp_path, "compare", Config())
    second = Run.create(tmp_path, "compare", Config())
    assert first.folder != second.folder
    assert (tmp_path / "latest").resolve() == second.folder.resolve()


def test_its_config_file_gives_the_configuration_back_through_the_flags_layer(
    tmp_path: Path,
) -> None:
    config = Config(lr=1e-5, seeds=(4,), data=Path("a b/x.json"), note="yes: 'no' # on")
    run = Run.create(tmp_path, "compare", config)
    again = flags.parse(
        Config, ["--config", str(run.folder / "config.yaml")], prog="x", description=""
    )
    assert again.config == config


def test_the_hash_knows_equal_configurations() -> None:
    as_dict = {"seeds": [0, 1, 2], **{k: v for k, v in dataclasses.asdict(Config()).items()}}
    assert config_hash(Config()) == config_hash(as_dict)
    assert config_hash(Config()) != config_hash(Config(lr=1e-3))
    assert re.fullmatch(r"[0-9a-f]{16}", config_hash({}))


# --- Out ---


def test_a_folder_that_is_not_empty_is_refused_in_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run.create(tmp_path, "compare", Config(), out=out)
    with pytest.raises(UserError, match=r"out is not empty: add --resume .* --overwrite .* --out"):
        Run.create(tmp_path, "compare", Config(), out=out)


def test_overwriting_replaces_an_earlier_run_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    Run.create(tmp_path, "compare", Config(), out=out).write_json("old.json", 1)
    run = Run.create(tmp_path, "compare", Config(lr=1.0), out=out, overwrite=True)
    assert not (out / "old.json").exists() and run.config["lr"] == 1.0


def test_overwriting_spares_what_no_run_has_written(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="leaves it alone"):
        Run.create(tmp_path, "compare", Config(), out=tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").is_file()
    with pytest.raises(UserError, match="is a file"):
        Run.create(tmp_path, "compare", Config(), out=tmp_path / "thesis.tex")


def test_an_empty_folder_may_be_given(tmp_path: Path) -> None:
    assert Run.create(tmp_path, "compare", Config(), out=tmp_path).folder == tmp_path


# --- Opening again ---


def test_resuming_with_the_same_configuration_is_accepted(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    assert Run.open(run.folder, Config()).config == run.config
    assert Run.open(run.folder).config["lr"] == 3e-4


def test_resuming_with_another_one_names_each_difference_and_both_values(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    with pytest.raises(UserError) as error:
        Run.open(run.folder, Config(lr=1e-3, seeds=(0,), note="x"), ignore=["note"])
    assert "lr differs (0.0003 in the run, 0.001 now)" in str(error.value)
    assert "seeds differs ([0, 1, 2] in the run, [0] now)" in str(error.value)
    assert "note" not in str(error.value)


def test_a_key_that_only_one_side_has_is_a_difference(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", {"a": 1})
    with pytest.raises(UserError, match=r"a differs \(1 in the run, absent now\); b differs"):
        Run.open(run.folder, {"b": 2})


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run: it has no config.yaml"):
        Run.open(tmp_path)


# --- Status ---


def test_the_status_follows_the_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    assert (run.status, run.finished) == ("running", False)
    run.set_status("failed: loss is nan")
    assert run.status == "failed: loss is nan"
    assert json.loads((run.folder / "status.json").read_text(encoding="utf-8")) == {
        "status": "failed",
        "reason": "loss is nan",
    }
    run.set_status("done")
    assert Run.open(run.folder).finished
    with pytest.raises(ValueError, match="'finished' is not one of running, done"):
        run.set_status("finished")
    with pytest.raises(ValueError, match="reason"):
        run.set_status("failed")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "done"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("bad\nthing"), "failed: ValueError: bad thing"),
    ],
)
def test_as_a_context_manager_it_records_how_the_block_ended(
    tmp_path: Path, error: BaseException | None, status: str
) -> None:
    run = Run.create(tmp_path, "compare", Config())
    try:
        with run:
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    assert run.status == status


# --- Files ---


def test_json_is_byte_stable_and_keeps_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json_atomic(path, {"b": (1, numpy.float64(0.5)), "a": Path("p"), "c": None})
    text = b'{\n "b": [\n  1,\n  0.5\n ],\n "a": "p",\n "c": null\n}\n'
    assert path.read_bytes() == text


def test_json_says_where_a_number_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.json: arms.dpo.kl.1 is nan; write null"):
        write_json_atomic(tmp_path / "x.json", {"arms": {"dpo": {"kl": [1.0, math.nan]}}})
    with pytest.raises(TypeError, match="object has no plain form"):
        write_json_atomic(tmp_path / "x.json", object())
    assert list(tmp_path.iterdir()) == []


def test_a_writing_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    write_text_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_text_atomic(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]


def test_a_run_writes_into_folders_below_it(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    run.write_json("ppo-s1/summary.json", {"a": 1})
    assert (run.folder / "ppo-s1" / "summary.json").is_file()


# --- What is told ---


def test_secrets_are_redacted_and_what_only_sounds_like_one_is_not() -> None:
    assert redact(
        {
            "api_key": "x",
            "hubToken": "x",
            "token": "x",
            "db-password": 1234,
            "nested": [{"client_secret": "x"}],
            "url": "https://me:pass@example.org/x",
            "note": "hf_" + "a" * 34,
        }
    ) == {
        "api_key": "<redacted>",
        "hubToken": "<redacted>",
        "token": "<redacted>",
        "db-password": "<redacted>",
        "nested": [{"client_secret": "<redacted>"}],
        "url": "https://<redacted>@example.org/x",
        "note": "<redacted>",
    }
    harmless = {
        "max_tokens": 5,
        "eos_token": "</s>",
        "prompt_key": "question",
        "tokenizer": "bpe",
        "token": None,
        "hf_token": False,
        "monkey": "x",
    }
    assert redact(harmless) == harmless


def test_a_command_line_is_told_without_secrets_and_homes() -> None:
    words = ["-m", "sft.train", "--hub-token", "x", "--api_key=x", "WANDB_API_KEY=x", "--lr", "1"]
    assert redact_command(words) == [
        *["-m", "sft.train", "--hub-token", "<redacted>", "--api_key=<redacted>"],
        *["WANDB_API_KEY=<redacted>", "--lr", "1"],
    ]
    homes = [f"{Path.home()}/data.json", "/home/ada/x", "/Users/ada"]
    assert redact_command(homes) == ["~/data.json", "~/x", "~"]


def test_the_environment_tells_versions_and_no_place(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", Config())
    text = (run.folder / "environment.json").read_text(encoding="utf-8")
    told = json.loads(text)
    assert told == json.loads(json.dumps(describe_environment()))
    assert told["torch_threads"] == 1 and "torch" in told["packages"]
    assert told["command"][0] == "python"
    assert str(Path.home()) + "/" not in text
    assert (told["commit"] is None) == (told["dirty"] is None)


def test_secrets_reach_neither_file(tmp_path: Path) -> None:
    run = Run.create(tmp_path, "compare", {"hub_token": "open sesame", "lr": 1.0})
    assert "open sesame" not in (run.folder / "config.yaml").read_text(encoding="utf-8")
    stored = yaml.safe_load((run.folder / "config.yaml").read_text(encoding="utf-8"))
    assert stored == {"hub_token": "<redacted>", "lr": 1.0}


def test_a_run_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sft.run import Run; import sft.tracking\n"
        "Run.create(Path(sys.argv[1]), 'x', {'a': 1})\n"
        "print([m for m in ('torch', 'transformers', 'wandb', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, encoding="utf-8"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
