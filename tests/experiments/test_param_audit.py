"""The audit's words follow from its numbers, and its files say what it returns."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from experiments.param_audit import Config, Row, judge, main, rounded, run, show, verdict
from moe.budget import known_names
from moe.errors import UserError


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("audit")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    return out, run(Config(out=out, overwrite=True))


@pytest.mark.parametrize(
    ("count", "published", "expected"),
    [
        (46_702_792_704, "46.7B", "46.7B"),
        (46_702_792_704, "47B", "47B"),
        (12_748_853_248, "12.9B", "12.7B"),
        (7_241_732_096, "7.3B", "7.2B"),
        (222_977_280, "223M", "223M"),
        (1_978_514_688, "2.0B", "2.0B"),
        (1_250_000_000, "1.3B", "1.3B"),  # a half goes up
        (1_249_999_999, "1.3B", "1.2B"),
        (20_971_520, "20971520", "20971520"),
        (Fraction(100 * 20_971_520, 7_262_703_616), "0.2888%", "0.2888%"),
    ],
)
def test_a_count_is_rounded_to_the_printed_precision(
    count: int, published: str, expected: str
) -> None:
    assert rounded(count, published) == expected
    assert judge(count, published) == ("REPRODUCED" if expected == published else "NOT REPRODUCED")


def test_a_figure_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="'about 7B' is not a number"):
        rounded(7, "about 7B")


def row(figure: str, word: Any) -> Row:
    return Row(figure=figure, claim=figure, published="1B", ours=1, verdict=word)


def test_one_convention_is_enough_for_a_figure_and_every_figure_is_needed() -> None:
    either = [row("a", "NOT REPRODUCED"), row("a", "REPRODUCED"), row("b", "REPRODUCED")]
    assert verdict(either) == ("REPRODUCED", [])
    assert verdict([*either, row("c", "NOT REPRODUCED")]) == ("NOT REPRODUCED", ["c"])


def test_every_word_matches_its_numbers(audit: tuple[Path, dict[str, Any]]) -> None:
    for claim in audit[1]["claims"]:
        reproduced = rounded(Fraction(claim["ours"]), claim["published"]) == claim["published"]
        assert claim["verdict"] == ("REPRODUCED" if reproduced else "NOT REPRODUCED"), claim
    assert (audit[1]["verdict"]["word"] == "REPRODUCED") == (not audit[1]["not_reproduced"])


def test_every_pinned_model_and_the_lora_line_are_claims(
    audit: tuple[Path, dict[str, Any]],
) -> None:
    claims = {claim["claim"]: claim for claim in audit[1]["claims"]}
    for name in known_names():
        assert any(text.startswith(f"{name} ") for text in claims), name
    assert claims["mixtral-8x7b total (announcement)"]["ours"] == 46_702_792_704
    lora = [
        claims[f"mistral-7b LoRA r8 all-linear, {word} (PEFT's line)"]
        for word in (
            "trainable",
            "total",
            "percent",
        )
    ]
    assert [claim["published"] for claim in lora] == ["20971520", "7262703616", "0.2888%"]
    assert {claim["verdict"] for claim in lora} == {"REPRODUCED"}
    biases = claims["deepseek-v3 total and routing biases (paper)"]
    assert biases["ours"] == 671_026_419_200


def test_variants_of_a_pinned_model_are_counted_to_the_integer(
    audit: tuple[Path, dict[str, Any]],
) -> None:
    totals = {name: counted["total"] for name, counted in audit[1]["counts"].items()}
    assert totals["mixtral-8x22b-v0.3"] == 140_630_071_296
    assert [totals[f"switch-base-{n}"] for n in (8, 16, 32, 64, 128, 256)] == [
        619_339_008,
        1_072_397_568,
        1_978_514_688,
        3_790_748_928,
        7_415_217_408,
        14_664_154_368,
    ]


def test_the_files_hold_what_run_returns(audit: tuple[Path, dict[str, Any]]) -> None:
    out, summary = audit
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert {"schema", "experiment", "question", "status", "claims", "verdict", "timings"} <= set(
        summary
    )
    table = (out / "table.md").read_text(encoding="utf-8")
    for claim in summary["claims"]:
        assert f"| {claim['claim']} | {claim['published']} |" in table
    assert summary["verdict"]["word"] in table


def test_a_folder_with_files_is_refused_before_anything_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["--out", str(tmp_path)]) == 2
    assert "is not empty: give another folder, or --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_writes_the_results_and_keeps_other_files(
    audit: tuple[Path, dict[str, Any]],
) -> None:
    assert {path.name for path in audit[0].iterdir()} == {
        "notes.txt",
        "summary.json",
        "table.md",
    }


def test_the_terminal_shows_the_word_its_rule_and_the_folder(
    audit: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    show(audit[1], audit[0])
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{audit[1]['verdict']['word']}: a row is REPRODUCED when" in printed
    assert "summary.json, table.md" in printed
