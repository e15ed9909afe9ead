"""The world `pairs` on a tiny model and a tiny file: what it leaves, and that it resumes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.compare import main
from experiments.lab.pairs_config import PairsConfig
from experiments.lab.pairs_summary import gather
from experiments.lab.pairs_world import plan, run_pairs, stage_job, trunk_job
from moe.errors import UserError
from sft.run import Run
from sft.text import train_bpe

SEED = 7


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random dense model of 5 thousand parameters and 40 pairs of 20 prompts."""
    folder = tmp_path_factory.mktemp("given")
    tokenizer = train_bpe(["a kind answer and a rude answer to a question"], vocab_size=280)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"prompt": f"question {i // 2}", "chosen": f"kind {i}", "rejected": f"rude {i} indeed"}
        for i in range(40)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(text, encoding="utf-8")
    return folder


def small(given: Path, **changes: Any) -> PairsConfig:
    options: dict[str, Any] = {
        "data": given / "pairs.jsonl",
        "model": given / "model",
        "upcycle": "4x2",
        "seeds": (SEED,),
        "scale": "debug",
        "processes": 1,
        "mirror": "none",
    }
    return PairsConfig(**{**options, **changes})


def run_here(config: PairsConfig, folder: Path) -> dict[str, Any]:
    """The jobs of a run, one after the other in this process; the summary."""
    state = Run.create(Path("results"), "compare", config.identity(), out=folder)
    for job in plan(config, folder):
        job.function(*job.arguments)
    state.set_status("interrupted")
    return summary_of(config, folder)


def summary_of(config: PairsConfig, folder: Path) -> dict[str, Any]:
    """What a run left, without what it cost."""
    found = gather(config, folder, seeds=config.seeds, status="done")
    del found["timings"]
    whole: dict[str, Any] = json.loads(json.dumps(found))
    return whole


@pytest.fixture(scope="module")
def finished(given: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, run_here(small(given), folder)


def test_the_summary_has_the_schema_and_every_arm(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    assert summary["schema"] == 1 and summary["seeds"] == [SEED]
    assert summary["experiment"] == "compare" and summary["world"]["name"] == "pairs"
    arms = summary["arms"]
    assert list(arms) == ["rm", "dpo", "longer_wins", "length_rule", "bag_of_words", "chance"]
    assert all(len(values) == 1 for arm in arms.values() for values in arm.values())
    for arm in ("rm", "dpo"):
        low, accuracy, high = (
            arms[arm][name][0] for name in ("wilson_low", "accuracy", "wilson_high")
        )
        assert 0 <= low < high <= 1 and low - 1e-12 <= accuracy <= high + 1e-12
    assert arms["dpo"]["accuracy_before"] == [0.5]  # the policy is its reference: all ties
    assert arms["dpo"]["implicit_margin_before"] == [0.0]
    assert arms["longer_wins"]["accuracy"] == [0.0] and arms["length_rule"]["accuracy"] == [1.0]
    assert arms["bag_of_words"]["accuracy"] == [1.0]
    assert {c["word"] for c in summary["comparisons"]} == {"UNRESOLVED"}  # one seed: no interval
    assert summary["verdict"]["word"] == "INCONCLUSIVE" and summary["verdict"]["rule"]
    assert all({"claim", "published", "ours", "verdict"} <= set(c) for c in summary["claims"])
    assert summary["world"]["num_held_out_pairs"] == [10]
    assert summary["world"]["num_train_pairs"] == [30]


def test_expert_use_is_recorded_at_every_stage(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, summary = finished
    assert set(summary["routing"]) == {"base", "sft", "rm", "dpo"}
    for stage, metrics in summary["routing"].items():
        (load,) = metrics["load_share"]
        assert np.asarray(load).shape == (1, 4)  # layers, experts
        assert np.mean(load) == pytest.approx(1.0)
        assert (folder / f"{stage}-s{SEED}" / "routing.npz").is_file()
    assert summary["routing"]["sft"]["jaccard_from_sft"] == [[1.0]]


def test_a_stage_leaves_its_metrics_and_dpo_its_samples(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, _ = finished
    for stage in ("sft", "rm", "dpo"):
        assert (folder / f"{stage}-s{SEED}" / "metrics.jsonl").is_file()
    text = (folder / f"dpo-s{SEED}" / "samples.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 3 and set(rows[0]) == {"prompt", "before", "after"}


def test_a_finished_grid_is_gone_on_with_without_training_and_reported(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = finished
    weights = folder / "stages" / f"s{SEED}" / "rm" / "final" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert main(["--resume", str(folder), "--processes", "1", "--mirror", "none"]) == 0
    resumed = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    del resumed["timings"]
    assert resumed == summary
    assert weights.stat().st_mtime_ns == before
    for name in ("summary.json", "table.md", "report.html", "config.yaml", "environment.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "status.json").read_text("utf-8"))["status"] == "done"
    assert "against chance in held-out accuracy" in (folder / "table.md").read_text(
        encoding="utf-8"
    )


def test_an_interrupted_stage_goes_on_to_the_same_summary(
    given: Path,
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the reward model's third step, one behind its checkpoint."""
    config, folder = small(given), tmp_path / "run"
    Run.create(Path("results"), "compare", config.identity(), out=folder)
    trunk_job(config, folder, SEED)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.lab.pairs_world.report", stop_at("rm", 3))
        with pytest.raises(KeyboardInterrupt):
            stage_job(config, folder, SEED, "rm")
    assert (folder / "stages" / f"s{SEED}" / "rm" / "checkpoint-2").is_dir()
    for job in plan(config, folder):
        job.function(*job.arguments)
    assert summary_of(config, folder) == finished[1]


def stop_at(stage: str, step: int) -> Callable[[str, str, int, int], None]:
    def hear(job: str, told: str, at: int, total: int) -> None:
        if (told, at) == (stage, step):
            raise KeyboardInterrupt

    return hear


def test_a_resumed_run_refuses_another_file(given: Path, tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_bytes((given / "pairs.jsonl").read_bytes())
    config, folder = small(given, data=data, sft=False), tmp_path / "run"
    trunk_job(config, folder, SEED)
    with data.open("a", encoding="utf-8") as file:
        file.write('{"prompt": "one more", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(UserError, match="The data of this run has changed since it began"):
        stage_job(config, folder, SEED, "rm")


def test_a_dense_model_without_sft_runs_and_has_no_routing(given: Path, tmp_path: Path) -> None:
    summary = run_here(small(given, upcycle="none", sft=False), tmp_path / "run")
    assert summary["routing"] == {}
    assert not list(tmp_path.glob("run/sft-s*")) and "sft" not in summary["arms"]
    assert summary["notes"][0].startswith("Reward model and DPO start from the model as it is")


def test_what_would_fail_later_is_refused_before_a_folder_is_made(
    given: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError, match="--max-length 100 is over the 64 positions"):
        run_pairs(small(given, max_length=100, out=out))
    with pytest.raises(UserError, match="holds no model"):
        run_pairs(small(given, model=tmp_path, out=out))
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="this method needs preferences"):
        run_pairs(replace(small(given), data=plain, out=out))
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--world", "pairs", "--model", "m"], "give --data FILE and --model DIR"),
        (["--data", "d"], "--data has no effect in the world tales"),
        (["--world", "stories", "--model", "m", "--max-length", "9"], "or give --world pairs"),
        (["--world", "pairs", "--data", "d", "--model", "m", "--target", "negative"], "--target"),
        (["--world", "pairs", "--data", "d", "--model", "m", "--tune"], "--tune has no effect"),
        (
            ["--world", "pairs", "--data", "d", "--model", "m", "--peft", "lora", "--lora-rank=2"],
            "--peft lora has no effect",
        ),
        (["--world", "pairs", "--data", "d", "--model", "m"], "No model folder m"),
    ],
)
def test_the_command_says_what_is_missing_and_what_has_no_effect(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    assert told in capsys.readouterr().err
