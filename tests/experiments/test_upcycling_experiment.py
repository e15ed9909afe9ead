"""The experiment `upcycling` at debug scale: what it leaves, who reads what, and its rule."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.lab import grid
from experiments.lab.question import STATE_KEYS, Options, summarised
from experiments.lab.upcycling_arms import (
    ARMS,
    RATES,
    START,
    arm_job,
    beginning,
    scratch_config,
)
from experiments.lab.upcycling_text import Lab, Prepared, read_text
from experiments.lab.upcycling_tuning import TRIED_ON, choose_start
from experiments.upcycling import (
    METRIC,
    PAIRS,
    QUESTION,
    UPCYCLED,
    claims,
    main,
    plan,
    run,
    verdict_word,
)
from moe.errors import UserError
from sft.run import Run

CONFIG = Options(seeds=(0,), scale="debug", processes=1)


def lab_of(folder: Path) -> Lab:
    return Lab(seed=0, scale="debug", folder=folder, rates=RATES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs run here, one by one; the command then finds them done and goes on to the report."""
    folder = tmp_path_factory.mktemp("upcycling") / "run"
    Run.create(folder, "upcycling", CONFIG.identity, out=folder)
    for job in plan(CONFIG, folder):
        job.function(*job.arguments)
    run(Options(seeds=(0,), scale="debug", processes=1, resume=folder))
    return folder


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    return found


def test_a_run_leaves_summary_table_report_and_curves(finished: Path) -> None:
    for name in ("config.yaml", "environment.json", "summary.json", "table.md", "report.html"):
        assert (finished / name).is_file(), name
    assert (finished / "figures" / "curve-held_out-eval-loss.svg").is_file()
    assert json.loads((finished / "status.json").read_text("utf-8"))["status"] == "done"


def test_every_arm_has_its_loss_overall_and_by_domain_and_what_it_cost(
    summary: dict[str, Any],
) -> None:
    assert set(summary["arms"]) == {*ARMS, START}
    for arm, metrics in summary["arms"].items():
        assert {METRIC, "loss_arithmetic", "loss_tales_zh", "train_gflops"} <= set(metrics), arm
        assert (metrics["expert_distance"][0] is None) == arm.startswith("dense"), arm
    assert [(row["arm"], row["against"]) for row in summary["comparisons"]] == list(PAIRS)
    assert summary["verdict"]["word"] == verdict_word(summary["comparisons"]) == "INCONCLUSIVE"


def test_gathering_again_gives_the_same_summary(finished: Path, summary: dict[str, Any]) -> None:
    assert json.loads(json.dumps(summarised(QUESTION, CONFIG, folder=finished))) == summary


def test_who_goes_on_from_the_dense_model_has_its_tokens_behind_it(
    summary: dict[str, Any],
) -> None:
    def tokens(arm: str, name: str = "tokens_behind_weights") -> int:
        return int(summary["arms"][arm][name][0])

    d0, d1 = tokens(START), tokens("moe_scratch_d1")
    assert {tokens(arm) for arm in (*UPCYCLED, "dense_continued", "moe_scratch")} == {d0 + d1}
    assert {tokens(arm, "tokens_trained") for arm in (*UPCYCLED, "dense_continued")} == {d1}


def test_no_row_is_read_twice_and_one_arm_alone_reads_both_parts(finished: Path) -> None:
    text = read_text(lab_of(finished))
    assert len({row["sample_id"] for row in text.whole}) == len(text.whole)
    assert [arm for arm, how in ARMS.items() if how.sees_all] == ["moe_scratch"]
    assert text.whole[len(text.start) :] == text.more


def test_copies_and_slices_begin_where_the_dense_model_ended(summary: dict[str, Any]) -> None:
    ended = summary["arms"][START][METRIC][0]
    begun = {arm: summary["arms"][arm]["loss_before"][0] for arm in ARMS}
    assert begun["dense_continued"] == ended
    # What float32 rounding leaves after a softmax of equal weights and a sum of halves.
    assert begun["upcycled_copy"] == pytest.approx(ended, abs=1e-5)
    assert begun["upcycled_granular"] == pytest.approx(ended, abs=1e-5)
    assert abs(begun["upcycled_drop"] - ended) > 1e-4


def test_only_slices_have_the_flops_of_the_dense_model(summary: dict[str, Any]) -> None:
    flops = {arm: m["forward_flops_per_token"][0] for arm, m in summary["arms"].items()}
    hidden, layers, experts = 32, 2, 8
    router = 2 * hidden * layers * experts
    assert flops["upcycled_granular"] == flops["dense_continued"] + router
    assert flops["upcycled_copy"] == flops["moe_scratch"] > flops["upcycled_granular"]


def test_from_scratch_has_the_shape_of_the_copies(finished: Path) -> None:
    lab = lab_of(finished)
    text: Prepared = read_text(lab)
    copies = beginning(lab, ARMS["upcycled_copy"], text)
    scratch = beginning(lab, ARMS["moe_scratch"], text)
    assert {k: v.shape for k, v in copies.named_parameters()} == {
        k: v.shape for k, v in scratch.named_parameters()
    }
    assert copies.config.router_spec == scratch_config(lab, text).router_spec


class Interruption(Exception):
    pass


class Interrupting:
    """A place for progress reports at which the job dies when it tells of this step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def put(self, told: tuple[str, str, int, int]) -> None:
        if told[2] == self.step:
            raise Interruption


@pytest.mark.parametrize("arm", ["dense_continued", "upcycled_noise"])
def test_an_interrupted_arm_goes_on_to_the_same_end(
    arm: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "stages", tmp_path / "stages")
    shutil.rmtree(tmp_path / "stages" / "s0" / arm)
    lab = lab_of(tmp_path)
    log = finished / f"{arm}-s0" / "metrics.jsonl"
    if arm == "dense_continued":  # its log begins with the dense start's
        lab.arm_folder(arm).mkdir()
        rows = log.read_text(encoding="utf-8").splitlines(keepends=True)
        before = [r for r in rows if '"pretrain"' in r or json.loads(r)["step"] <= 4]
        before = [row for row in before if json.loads(row)["stage"] != "train"]
        (lab.arm_folder(arm) / "metrics.jsonl").write_text("".join(before), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_reports", Interrupting(3))
        with pytest.raises(Interruption):
            arm_job(lab, "job", arm)
    assert (lab.stages / arm / "checkpoint-2").is_dir()
    arm_job(lab, "job", arm)
    same, other = lab.judged(arm), lab_of(finished).judged(arm)
    del same["timings"], other["timings"]
    assert same == other
    assert (lab.arm_folder(arm) / "metrics.jsonl").read_bytes() == log.read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["BETTER", "BETTER"], "REPRODUCED"),
        (["BETTER", "UNRESOLVED"], "INCONCLUSIVE"),
        (["EQUIVALENT", "BETTER"], "INCONCLUSIVE"),
        (["BETTER", "WORSE"], "NOT REPRODUCED"),
    ],
)
def test_the_verdict_follows_its_rule(words: list[str], expected: str) -> None:
    rows = [
        {"arm": "upcycled_copy", "against": against, "word": word}
        for against, word in zip(("dense_continued", "moe_scratch_d1"), words, strict=True)
    ]
    others = [
        {"arm": "upcycled_copy", "against": "moe_scratch", "word": "WORSE"},
        {"arm": "upcycled_drop", "against": "dense_continued", "word": "WORSE"},
    ]
    assert verdict_word([*rows, *others]) == expected


def test_a_claim_needs_every_seed_and_the_threshold() -> None:
    levels = {"upcycled_copy": 2.0, "moe_scratch_d1": 2.005, "moe_scratch": 1.9}
    arms = {arm: {METRIC: [levels.get(arm, 2.1)] * 3} for arm in ARMS}
    words = [claim["verdict"] for claim in claims(arms)]
    assert words == ["REPRODUCED", "INCONCLUSIVE", "REPRODUCED", "NOT REPRODUCED"]


def test_the_start_with_the_lowest_loss_is_taken_for_all(tmp_path: Path) -> None:
    labs = {}
    for rate, loss in ((0.1, 3.0), (0.2, 2.0)):
        labs[rate] = Lab(
            seed=1,
            scale="debug",
            folder=tmp_path / str(rate),
            rates=dict.fromkeys(TRIED_ON, rate),
            trunk_folder=tmp_path / "stages",
        )
        folder = labs[rate].stages / START / "final"
        folder.mkdir(parents=True)
        (folder / "which").write_text(str(rate), encoding="utf-8")
        labs[rate].arm_folder(START).mkdir()
        path = labs[rate].arm_folder(START) / "judged.json"
        path.write_text(json.dumps({"metrics": {METRIC: loss}}), encoding="utf-8")
    choose_start(labs)
    chosen = tmp_path / "stages" / START / "final" / "which"
    assert chosen.read_text(encoding="utf-8") == "0.2"


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", str(finished)]) == 0
    assert "nothing to resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tune", "--seeds", "3"], "no effect with --tune"),
        (["--tune", "--overwrite"], "--tune takes neither"),
        (["--seeds", "1", "1"], "give each seed once"),
        (["--processes", "0"], "at least 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    assert said in capsys.readouterr().err


def test_resuming_with_another_option_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="seeds"):
        run(Options(seeds=(0, 1), scale="debug", resume=finished))
    assert not set(STATE_KEYS) & set(CONFIG.identity)
