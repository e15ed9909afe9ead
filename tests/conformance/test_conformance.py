"""The command that runs Hugging Face's tests judges their report rightly; no test here fetches."""

import ast
from pathlib import Path

import pytest
from hf_conformance import (
    HERE,
    STUBS,
    Outcome,
    is_listed,
    no_longer_skipped,
    problems,
    read_outcomes,
    read_skips,
)

REPORT = """<?xml version="1.0"?><testsuites><testsuite name="pytest">
<testcase classname="tests.models.switchyard.test_modeling_switchyard.ATest" name="test_good"/>
<testcase classname="tests.models.ATest" name="test_left">
  <skipped type="pytest.skip" message="needs a moon">file.py:1: needs a moon</skipped></testcase>
<testcase classname="tests.models.ATest" name="test_both">
  <skipped type="pytest.skip" message="one part"/>
  <failure message="AssertionError: 1 != 2&#10;more">trace</failure></testcase>
<testcase classname="tests.models.BTest" name="test_early">
  <error message="failed on setup">trace</error></testcase>
</testsuite></testsuites>"""


def test_a_report_says_how_each_test_ended_and_why() -> None:
    assert read_outcomes(REPORT) == {
        "ATest.test_good": Outcome(kind="passed"),
        "ATest.test_left": Outcome(kind="skipped", reason="needs a moon"),
        "ATest.test_both": Outcome(kind="failed", reason="AssertionError: 1 != 2"),
        "BTest.test_early": Outcome(kind="failed", reason="failed on setup"),
    }


def test_failures_and_unlisted_skips_are_problems_and_listed_skips_are_not() -> None:
    outcomes = read_outcomes(REPORT)
    assert problems(outcomes, {"test_left": "no moon"}, at_least=1) == [
        "failed: ATest.test_both: AssertionError: 1 != 2",
        "failed: BTest.test_early: failed on setup",
    ]
    assert "new skip: ATest.test_left: needs a moon" in problems(outcomes, {}, at_least=1)


def test_a_listed_test_that_runs_in_every_class_is_named() -> None:
    passed, skipped = Outcome(kind="passed"), Outcome(kind="skipped", reason="why")
    outcomes = {"ATest.test_x": passed, "BTest.test_x": skipped, "ATest.test_y": passed}
    skips = {"test_x": "a", "test_y": "b", "ATest.test_x": "c", "test_gone": "d"}
    assert no_longer_skipped(outcomes, skips) == ["test_y", "ATest.test_x"]


def test_finding_hardly_any_test_is_a_problem() -> None:
    outcomes = {"ATest.test_good": Outcome(kind="passed")}
    assert problems(outcomes, {}, at_least=1) == []
    assert problems(outcomes, {}, at_least=100) == ["only 1 tests passed, at least 100 should"]


def test_a_listed_name_holds_for_every_class_or_for_the_one_it_names() -> None:
    skips = read_skips("# why\n\ntest_left: no moon\nBTest.test_right: no sun\n")
    assert skips == {"test_left": "no moon", "BTest.test_right": "no sun"}
    assert is_listed("ATest.test_left", skips) and is_listed("BTest.test_right", skips)
    assert not is_listed("ATest.test_right", skips)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("test_left", "write a test's name"),
        ("test_left:", "write a test's name"),
        (" test_left: indented", "write a test's name"),
        ("test_left: a\ntest_left: b", "stands there twice"),
    ],
)
def test_a_list_that_cannot_be_read_is_an_error(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        read_skips(text)


def test_the_committed_list_gives_each_skip_a_name_and_a_reason() -> None:
    skips = read_skips((HERE / "skips.txt").read_text(encoding="utf-8"))
    assert len(skips) > 50
    assert all(name.rpartition(".")[2].startswith("test_") for name in skips)


def test_what_our_tests_skip_by_themselves_is_on_the_list() -> None:
    source = (HERE / "modeling_switchyard.py").read_text(encoding="utf-8")
    skips = read_skips((HERE / "skips.txt").read_text(encoding="utf-8"))
    refused = [
        node.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and "skipTest" in ast.dump(node)
    ]
    assert len(refused) == 5 and all(name in skips for name in refused)


def test_every_stub_that_stands_in_is_defined() -> None:
    tree = ast.parse((HERE / "stubs.py").read_text(encoding="utf-8"))
    named = {getattr(node, "name", None) for node in tree.body} | {
        node.target.id
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert set(STUBS.values()) <= named
    assert all(Path(place).suffix == ".py" for place in STUBS)
