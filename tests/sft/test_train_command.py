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
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import moe.heads  # noqa: F401 - registers our classes
from sft.command import first_process_speaks
from sft.flags import main_guard
from sft.models import find_model, load_causal_lm
from sft.text import train_bpe
from sft.train import main

WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()
QUICK = (
    *("--max-length", "40", "--max-steps", "4", "--batch-size", "4", "--lr", "1e-2"),
    *("--max-new-tokens", "4", "--mirror", "none", "--val-set-size", "0.2", "--log-steps", "1"),
)
SMALL = ("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size", "300")
NEW = ("--model", "new", "--data", "rows.jsonl", *QUICK, *SMALL)


def words(count: int, rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files, a tiny Llama folder, and one finished run of `--model new`."""
    folder = tmp_path_factory.mktemp("made")
    rng = random.Random(0)
    rows = [{"instruction": words(4, rng), "output": words(5, rng)} for _ in range(20)]
    write_rows(folder / "rows.jsonl", rows)
    pairs = [
        {"prompt": words(4, rng), "chosen": words(5, rng), "rejected": words(3, rng)}
        for _ in range(20)
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "texts.jsonl", [{"text": words(30, rng)} for _ in range(20)])
    tokenizer = train_bpe([" ".join(WORDS)], vocab_size=300)
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*NEW, "--out", "tiny", "--save-steps", "2"]) == 0
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


# What a run leaves.


def test_new_model_run_leaves_its_record_and_a_model_that_transformers_opens(here: Path) -> None:
    run = here / "tiny"
    assert json.loads((run / "status.json").read_text(encoding="utf-8")) == {"status": "done"}
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert config["template"] == "plain" and config["max_steps"] == 4
    assert not {"out", "resume", "epochs", "lora_alpha"} & set(config)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 4 and summary["val_loss"] < summary["val_loss_before"]
    rows = [
        json.loads(line)
        for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(rows) == 3 and set(rows[0]) == {"prompt", "before", "after"}
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert type(model).__name__ == "MoEForCausalLM"
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    newest = load_file(run / "checkpoints" / "checkpoint-4" / "model.safetensors")
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(tensor, newest[name])


def test_runs_own_config_repeats_it(here: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert main(["--config", "tiny/config.yaml", "--out", str(again)]) == 0
    assert digests(again / "model") == digests(here / "tiny" / "model")


def test_full_update_of_a_foreign_folder_leaves_that_folder_alone(
    here: Path, tmp_path: Path
) -> None:
    before = digests(here / "llama")
    run = tmp_path / "run"
    assert main(["--model", "llama", "--data", "rows.jsonl", *QUICK, "--out", str(run)]) == 0
    assert digests(here / "llama") == before
    trained = AutoModelForCausalLM.from_pretrained(run / "model")
    base = AutoModelForCausalLM.from_pretrained(here / "llama")
    assert not torch.equal(logits(trained), logits(base))


@pytest.mark.parametrize("base", ["llama", "tiny"])
def test_lora_run_leaves_an_adapter_that_peft_opens_and_an_untouched_base(
    base: str, here: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    before = digests(here / base)
    run = tmp_path / "run"
    flags = ["--model", base, "--data", "rows.jsonl", *QUICK, "--lora-rank", "2"]
    assert main([*flags, "--out", str(run)]) == 0
    assert digests(here / base) == before
    assert not (run / "model").exists()
    plain = AutoModelForCausalLM.from_pretrained(find_model(base).base)
    expected = logits(plain)
    opened = PeftModel.from_pretrained(plain, run / "adapter")
    assert not torch.equal(logits(opened), expected)
    assert torch.equal(logits(opened), logits(load_causal_lm(find_model(run))))
    final = load_file(run / "adapter" / "adapter_model.safetensors")
    if base == "tiny":
        assert any(".experts." in name for name in final)
        assert not any(".gate." in name for name in final)  # `auto` leaves the router alone


def test_pretraining_reads_plain_text(here: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--stage", "pretrain", "--model", "new", "--data", "texts.jsonl", *QUICK, *SMALL]
    assert main([*flags, "--out", str(run)]) == 0
    first = json.loads((run / "samples.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"].split()[0] in WORDS


def test_chosen_answers_of_a_preference_file_can_be_learned(here: Path, tmp_path: Path) -> None:
    flags = ["--model", "llama", "--data", "pairs.jsonl", *QUICK, "--use", "chosen"]
    assert main([*flags, "--out", str(tmp_path / "run"), "--quiet"]) == 0


def test_piped_output_has_header_progress_result_and_place(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["--model", "tiny/model", "--data", "rows.jsonl", *QUICK, "--out", str(run)]) == 0
    out = capsys.readouterr().out
    for text in (
        "MoEForCausalLM",
        "active), 4 experts top-2",
        "experts 6,144",
        "split 16 / 4 by prompt",
        "supervised tokens",
        "load balancing 0.01, z-loss 0.001, f over optimizer_step",
        "sft 4/4",
        "prompt ",
        "before ",
        "val loss ",
        f"in {run}/model",
    ):
        assert text in out, text
    assert "\x1b" not in out


# Resuming.


@pytest.mark.parametrize("extra", [(), ("--lora-rank", "2")], ids=["full", "lora"])
def test_resumed_run_has_the_bits_of_the_uninterrupted_one(
    extra: tuple[str, ...], here: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--model", "llama", "--data", "rows.jsonl", *QUICK, "--save-steps", "2", *extra]
    assert main([*flags, "--out", str(whole)]) == 0
    shutil.copytree(whole, cut)
    result = "adapter" if extra else "model"
    shutil.rmtree(cut / result)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    (cut / "status.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    assert main(["--resume", str(cut)]) == 0
    assert digests(cut / result) == digests(whole / result)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


def test_resume_refuses_another_data_file_and_other_options(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copy("rows.jsonl", rows)
    flags = ["--model", "llama", "--data", str(rows), *QUICK, "--save-steps", "2"]
    assert main([*flags, "--out", str(run)]) == 0
    shutil.rmtree(run / "checkpoints" / "checkpoint-4")
    (run / "status.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    assert "lr differs (0.01 in the run, 0.02 now)" in told(
        capsys, "--resume", str(run), "--lr", "2e-2"
    )
    rows.write_text(rows.read_text(encoding="utf-8").replace("cat", "cow"), encoding="utf-8")
    capsys.readouterr()
    assert main(["--resume", str(run)]) == 2
    assert "fingerprint of data was" in capsys.readouterr().err
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert status["status"] == "failed"


def test_divergence_is_told_in_one_sentence_with_its_own_exit_code(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    flags = [*LLAMA, "--lr", "1e30", "--lr-schedule", "constant", "--save-steps", "1"]
    flags.remove("1e-2")
    flags.remove("--lr")
    assert main([*flags, "--out", str(run)]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lower lr (1e+30)" in error
    assert f"The last good checkpoint is {run}/checkpoints/checkpoint-1." in error
    status = json.loads((run / "status.json").read_text(encoding="utf-8"))
    assert status["status"] == "failed"


def test_finished_run_has_nothing_to_resume(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "tiny"]) == 0
    assert "tiny is finished: there is nothing to resume." in capsys.readouterr().out


# Mistakes.


LLAMA = ("--model", "llama", "--data", "rows.jsonl", *QUICK)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--model", "nowhere", *NEW[2:4]), "No model folder nowhere (looked from "),
        (("--model", "meta/llama", *NEW[2:4]), "'meta/llama' is not a folder here, and names on a"),
        (("--model", ".", *NEW[2:4]), ". holds no model: it needs config.json with weights"),
        (("--resume", "llama"), "llama is not a run: it has no config.yaml"),
        ((*LLAMA, "--lora-alpha", "4"), "--lora-alpha has no effect with --lora-rank 0"),
        ((*LLAMA, "--epochs", "2"), "--epochs has no effect beside --max-steps"),
        ((*LLAMA, "--hidden-size", "8"), "--hidden-size has no effect with a model folder"),
        ((*LLAMA, "--overwrite"), "--overwrite has no effect without --out"),
        ((*LLAMA, "--z-loss-coef", "1"), "--z-loss-coef has no effect for this model: it has no"),
        ((*LLAMA, "--lr-schedule", "constant", "--warmup-steps", "2"), "--warmup-steps has no"),
        ((*LLAMA, "--stage", "pretrain", "--drop-long"), "--drop-long has no effect with --stage"),
        ((*LLAMA, "--stage", "pretrain"), "holds instructions with one answer each"),
        ((*LLAMA, "--lora-rank", "2", "--lora-targets", "experts"), "matches nothing: this model"),
        ((*LLAMA, "--batch-size-per-device", "3"), "not a multiple of micro_batch_size 3"),
        ((*LLAMA[:4], "--max-length", "99"), "--max-length 99 is over the 64 positions of llama"),
        ((*LLAMA, "--out", "tiny"), "tiny is not empty: add --resume"),
        ((*LLAMA, "--columns", "output"), "--columns output: write our=theirs"),
        ((*NEW, "--lora-rank", "2"), "a new model has no weights to keep"),
        ((*NEW, "--top-k", "9"), "9"),
    ],
)
def test_mistake_is_answered_in_one_sentence(
    flags: tuple[str, ...], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name for path in here.iterdir()}
    assert sentence in told(capsys, *flags)
    assert {path.name for path in here.iterdir()} == before


def test_weights_that_lack_a_tensor_are_refused(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree("llama", broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing keys, first model.layers.1.mlp.up_proj.weight" in told(
        capsys, "--model", str(broken), *LLAMA[2:]
    )


def test_lora_run_is_no_start_for_another_supervised_run(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    assert main([*LLAMA, "--lora-rank", "2", "--out", run]) == 0
    assert "is a LoRA run: give its base llama" in told(capsys, "--model", run, *LLAMA[2:])


def test_help_fits_one_screen_and_flags_are_read_before_torch_is_imported() -> None:
    program = (
        "import sys; from sft.train import main; code = main(['--help']);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=True
    )
    assert len(answer.stdout.splitlines()) <= 40


def test_other_processes_say_nothing_and_leave_with_the_same_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moe.errors import UserError

    @main_guard
    @first_process_speaks
    def command() -> int:
        print("a header")
        raise UserError("A mistake.")

    monkeypatch.setenv("RANK", "1")
    assert command() == 2
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert command() == 2
    assert capsys.readouterr() == ("a header\n", "error: A mistake.\n")
