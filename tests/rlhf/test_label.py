"""Labelling without models: order, screen, files, loop and report."""

import json
import os
import pty
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from moe.errors import UserError
from rlhf.label_files import Answer, LabelFiles, Outcome, Pair, Side, Vote
from rlhf.label_order import rating_order
from rlhf.label_report import label_report
from rlhf.label_screen import (
    are_identical,
    ask,
    drop_early_keys,
    keys_from,
    keys_of,
    shown,
    terminal_key,
    wrapped,
)
from sft.data import read_examples
from sft.examples import Preference
from sft.text import Message


def pair(prompt: str, a: str, b: str, *, ended: bool = True) -> Pair:
    return Pair(
        prompt=(Message("user", prompt),),
        a=Answer(text=a, ended=ended),
        b=Answer(text=b, ended=True),
    )


PAIRS = [pair(f"prompt {n}", f"apple {n}", f"berry {n}") for n in range(6)]
KEYS = [one.key for one in PAIRS]
WRITTEN = "\u4f60\u597d \u00e9 \U0001f469\u200d\U0001f680"  # Chinese, an accent, a joined emoji


@pytest.fixture
def files(tmp_path: Path) -> LabelFiles:
    return LabelFiles(out=tmp_path / "pairs.jsonl")


def run(
    files: LabelFiles, keys: str, *, rater: str = "ana", seed: int = 0, pairs: list[Pair] = PAIRS
) -> tuple[int, list[str]]:
    said: list[str] = []
    order = rating_order([one.key for one in pairs], rater=rater, seed=seed)
    pressed = keys_of(keys, name="keys")
    left = ask(pairs, order, rater=rater, files=files, keys=pressed, say=said.append)
    return left, said


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(10))
def test_positions_are_balanced_in_blocks_of_four_and_in_all(count: int) -> None:
    keys = [f"k{n}" for n in range(count)]
    order = rating_order(keys, rater="ana", seed=3)
    assert sorted(order) == keys
    first = list(order.values())
    for start in range(0, count - 3, 4):
        assert Counter(first[start : start + 4]) == {"A": 2, "B": 2}
    assert abs(first.count("A") - first.count("B")) <= count % 2


def test_order_is_the_raters_own_and_does_not_depend_on_the_order_of_keys() -> None:
    keys = [f"k{n}" for n in range(20)]
    ana = rating_order(keys, rater="ana", seed=0)
    assert rating_order(keys[::-1], rater="ana", seed=0) == ana
    assert list(rating_order(keys, rater="ben", seed=0)) != list(ana)
    assert list(rating_order(keys, rater="ana", seed=1)) != list(ana)


def test_which_side_is_first_says_nothing_about_the_place_in_a_block() -> None:
    starts: Counter[Side] = Counter()
    for seed in range(400):
        starts.update(
            [next(iter(rating_order(["a", "b", "c", "d"], rater="r", seed=seed).values()))]
        )
    assert 150 < starts["A"] < 250


# --- screen --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x08c\x7f", "a\\rb\\x08c\\x7f"),
        ("\x9b2J", "\\x9b2J"),
        ("left\u202eright\u2066", "left\\u202eright\\u2066"),
        ("one\u2028two\u200b", "one\\u2028two\\u200b"),
        ("half \ud800", "half \\ud800"),
        ("two\r\nlines\tof", "two\nlines   of"),
        (
            "\u4f60\u597d \u00e9 \U0001f469\u200d\U0001f680",
            "\u4f60\u597d \u00e9 \U0001f469\u200d\U0001f680",
        ),
    ],
)
def test_nothing_that_steers_a_terminal_reaches_it(text: str, seen: str) -> None:
    assert shown(text) == seen


def test_long_answers_are_wrapped_by_cells_and_lose_nothing() -> None:
    text = "word " * 60 + "\n\n" + "\u4f60" * 90
    lines = wrapped(text, width=60).split("\n")
    assert all(len(line) + sum(c == "\u4f60" for c in line) <= 60 for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert "" in lines


def test_brackets_in_an_answer_are_text_and_no_markup() -> None:
    assert wrapped("[bold]x[/bold] [1]", width=60) == "    [bold]x[/bold] [1]"


def test_pairs_that_look_the_same_are_identical() -> None:
    assert are_identical(pair("p", "same \n", " same"))
    assert not are_identical(pair("p", "same", "Same"))


def test_the_screen_never_tells_which_model_wrote_which(files: LabelFiles) -> None:
    _, said = run(files, "1 2 t s 1 2")
    text = "\n".join(said)
    assert "apple" in text and not {"A", "B"} & set(text.replace("\n", " ").split())
    assert sum("undo the last" in line for line in said) == 1


def test_a_cut_answer_says_so(files: LabelFiles) -> None:
    _, said = run(files, "1", pairs=[pair("p", "x", "y", ended=False)])
    assert sum(line.count("cut at its limit") for line in said) == 1


# --- keys ----------------------------------------------------------------------------------------


def test_keys_are_read_with_or_without_blanks_and_an_unknown_one_is_named() -> None:
    key = keys_of("1 2\nTq", name="keys.txt")
    assert [key() for _ in range(5)] == ["1", "2", "t", "q", None]
    with pytest.raises(UserError, match=r"keys.txt: key 2 is 'x', and there are only 1 2 t s u q"):
        keys_of("1x", name="keys.txt")


def test_without_a_terminal_and_without_keys_one_sentence_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "nothing").open("w+", encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(UserError, match="needs a terminal.*--answers.*--judge"):
            keys_from(None)
    with pytest.raises(UserError, match="No file of keys"):
        keys_from(tmp_path / "absent")


def test_piped_keys_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("12", encoding="utf-8")
    with (tmp_path / "keys").open(encoding="utf-8") as piped:
        monkeypatch.setattr(sys, "stdin", piped)
        key = keys_from(None)
    assert [key(), key(), key()] == ["1", "2", None]


def press(keys: bytes, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What `terminal_key` reads on a terminal where this is pressed until it was read."""
    master, slave = pty.openpty()
    done = threading.Event()

    def fingers() -> None:
        while not done.is_set():
            os.write(master, keys)
            done.wait(0.01)

    with os.fdopen(slave, "r", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert keys_from(None) is terminal_key
        thread = threading.Thread(target=fingers)
        thread.start()
        try:
            return terminal_key()
        finally:
            done.set()
            thread.join()
            os.close(master)


@pytest.mark.parametrize(("keys", "read"), [(b"2", "2"), (b"T", "t"), (b"\x04", None)])
def test_a_terminal_gives_a_key_without_enter(
    keys: bytes, read: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert press(keys, monkeypatch) == read


def test_an_end_pressed_before_the_terminal_was_ours_is_an_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "r", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"\x04")
        assert terminal_key() is None
    os.close(master)


def test_what_was_pressed_before_a_pair_was_shown_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "r", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        os.write(master, b"1")
        drop_early_keys()
        os.write(master, b"2")
        assert terminal_key() == "2"
    os.close(master)


# --- the loop and its files ----------------------------------------------------------------------


def test_keys_become_votes_for_the_model_that_stood_there(files: LabelFiles) -> None:
    left, _ = run(files, "1 2 t s 1 1")
    assert left == 0
    order = rating_order(KEYS, rater="ana", seed=0)
    firsts = list(order.values())
    seconds: list[Side] = ["B" if side == "A" else "A" for side in firsts]
    expected = [firsts[0], seconds[1], "tie", "skip", firsts[4], firsts[5]]
    votes = files.read_votes()
    assert [vote.key for vote in votes] == list(order)
    assert [vote.outcome for vote in votes] == expected
    assert [vote.first for vote in votes] == firsts


def test_preferences_hold_the_chosen_and_the_rejected_text_and_no_ties(files: LabelFiles) -> None:
    run(files, "1 2 t s 1 1")
    by_key = {one.key: one for one in PAIRS}
    found = rows(files.out)
    assert len(found) == 4
    for row in found:
        one = by_key[str(row["key"])]
        sides = (one.a.text, one.b.text)
        chosen, rejected = sides if row["chosen_from"] == "A" else sides[::-1]
        assert (row["prompt"], row["chosen"], row["rejected"], row["rater"]) == (
            one.prompt[0].content,
            chosen,
            rejected,
            "ana",
        )
    examples = read_examples(files.out)
    assert examples.kind == "preference" and len(examples) == 4
    assert examples.notes == ("Columns not used: chosen_from, rater, key.",)


def test_several_turns_come_back_from_the_preference_file(files: LabelFiles) -> None:
    turns = (
        Message("system", "Be kind."),
        Message("user", "Hi"),
        Message("assistant", "Hello"),
        Message("user", "And?"),
    )
    one = Pair(prompt=turns, a=Answer(text="x", ended=True), b=Answer(text="y", ended=True))
    run(files, "1", pairs=[one])
    (row,) = read_examples(files.out).rows
    assert isinstance(row, Preference) and row.prompt == turns


def test_undo_takes_back_the_last_vote_and_asks_again(files: LabelFiles) -> None:
    left, said = run(files, "1 u 2 1 u u t")
    votes = files.read_votes()
    assert [vote.outcome for vote in votes] == ["tie"] and left == 5
    assert len(rows(files.votes)) == 7  # a line for each key: nothing is rewritten
    assert sum("asked again" in line for line in said) == 3
    assert files.out.read_text(encoding="utf-8") == ""


def test_there_is_nothing_to_undo_before_the_first_vote(files: LabelFiles) -> None:
    left, said = run(files, "u q")
    assert left == 6 and any("nothing to undo" in line for line in said)
    assert not files.out.exists()


def test_undo_reaches_back_into_an_earlier_sitting_but_not_to_another_rater(
    files: LabelFiles,
) -> None:
    run(files, "1 q", rater="ben")
    run(files, "1 q")
    run(files, "u u q")
    assert [vote.rater for vote in files.read_votes()] == ["ben"]


def test_a_sitting_that_stops_goes_on_and_asks_nothing_twice(
    files: LabelFiles, tmp_path: Path
) -> None:
    whole = LabelFiles(out=tmp_path / "whole.jsonl")
    run(whole, "1 2 t 1 2 1")
    for keys in ("1 2 q", "t", "1 2 1"):
        run(files, keys)
    assert files.read_votes() == whole.read_votes()
    assert files.out.read_bytes() == whole.out.read_bytes()
    left, said = run(files, "1 1 1")
    assert left == 0 and not said


def test_an_interrupt_loses_no_vote_and_no_preference(files: LabelFiles) -> None:
    pressed = keys_of("1 2", name="keys")

    def interrupted() -> str:
        key = pressed()
        if key is None:
            raise KeyboardInterrupt
        return key

    order = rating_order(KEYS, rater="ana", seed=0)
    with pytest.raises(KeyboardInterrupt):
        ask(PAIRS, order, rater="ana", files=files, keys=interrupted, say=lambda text: None)
    assert len(files.read_votes()) == 2 and len(rows(files.out)) == 2


def test_a_half_written_vote_is_cut_off_and_told(files: LabelFiles) -> None:
    run(files, "1 2 q")
    with files.votes.open("a", encoding="utf-8") as file:
        file.write('{"key": "abc", "ra')
    note = files.mend()
    assert note is not None and "half written" in note
    assert len(files.read_votes()) == 2
    assert files.mend() is None
    assert run(files, "1 2 1 2")[0] == 0


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", '{"key": "a"}', '{"key": "a", "rater": "r", "outcome": "C"}']
)
def test_a_line_that_is_no_vote_is_named(files: LabelFiles, line: str) -> None:
    files.votes.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="pairs.votes.jsonl line 1 is no vote"):
        files.read_votes()


def test_a_file_that_labelling_did_not_write_is_left_alone(files: LabelFiles) -> None:
    files.out.write_text('{"prompt": "mine"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="holds rows that no labelling wrote"):
        files.refuse_foreign()
    with pytest.raises(UserError, match="ending .jsonl"):
        LabelFiles(out=Path("pairs.json"))


def test_answers_come_back_and_those_of_other_models_are_refused(files: LabelFiles) -> None:
    made = {"model_a": "x", "temperature": 1.0}
    assert files.read_answers(made) is None
    files.write_answers(PAIRS, made_of=made)
    assert files.read_answers(made) == PAIRS
    with pytest.raises(UserError, match="made with temperature 1.0, and now it is 0.5"):
        files.read_answers({**made, "temperature": 0.5})


def test_a_preference_over_an_empty_answer_is_a_vote_and_no_row(files: LabelFiles) -> None:
    run(files, "1 1", pairs=[pair("p", "words", " "), pair("q", "x", "y")])
    assert len(files.read_votes()) == 2 and len(rows(files.out)) == 1


# --- the report ----------------------------------------------------------------------------------


def vote(number: int, rater: str, outcome: Outcome, first: Side | None = "A") -> Vote:
    return Vote(key=KEYS[number], rater=rater, outcome=outcome, first=first)


def report_of(votes: list[Vote]) -> list[str]:
    return label_report(votes, PAIRS, a="runs/sft", b="runs/dpo").lines()


def test_win_rate_and_position_bias_by_hand() -> None:
    votes = [
        vote(0, "ana", "A"),
        vote(1, "ana", "A", "B"),
        vote(2, "ana", "B"),
        vote(3, "ana", "tie"),
        vote(4, "ana", "identical", None),
        vote(5, "ana", "skip"),
    ]
    found = label_report(votes, PAIRS, a="a", b="b")
    assert found.wins is not None and (found.wins.value, found.wins.n) == (0.6, 5)
    (ana,) = found.raters
    assert ana.first is not None and (ana.first.value, ana.first.n) == (1 / 3, 3)
    assert found.num_preferences == 3 and found.reliability is None


def test_more_raters_do_not_count_a_prompt_twice() -> None:
    votes = [vote(0, name, word) for name, word in (("ana", "A"), ("ben", "B"), ("cyd", "A"))]  # type: ignore[arg-type]
    found = label_report([*votes, vote(1, "ana", "tie")], PAIRS, a="a", b="b")
    assert found.wins is not None and found.wins.n == 2
    assert found.wins.value == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_agreement_is_of_prompts_that_both_looked_at() -> None:
    ana: list[Outcome] = ["A", "A", "B", "B", "skip", "identical"]
    ben: list[Outcome] = ["A", "B", "B", "B", "A", "identical"]
    votes = [vote(n, "ana", word) for n, word in enumerate(ana)]
    votes += [vote(n, "ben", word) for n, word in enumerate(ben)]
    found = label_report(votes, PAIRS, a="a", b="b")
    (both,) = found.pairs_of_raters
    assert (both.raters, both.agreement.num_items, both.agreement.share) == (
        ("ana", "ben"),
        4,
        0.75,
    )
    assert both.agreement.kappa == pytest.approx(0.5)  # by chance (2*1 + 2*3)/16 = 0.5
    assert found.reliability is not None and found.reliability.num_items == 4


def test_the_report_names_the_models_the_interval_and_n() -> None:
    votes = [vote(0, "ana", "A"), vote(1, "ana", "B"), vote(0, "ben", "A"), vote(1, "ben", "A")]
    text = "\n".join(report_of(votes))
    for part in (
        "A is runs/sft",
        "ana: A 1, B 1, tie 0",
        "A over B: 0.750 [",
        "on 2 of 6 prompts (ties half; Wilson, 95 %)",
        "ana and ben on 2 shared prompts: equal 0.500, Cohen's kappa 0.000",
        "Krippendorff's alpha (nominal)",
        "the answer shown first was chosen",
    ):
        assert part in text, part


def test_a_report_without_votes_says_so() -> None:
    assert "No vote yet: there is no win rate." in report_of([])


def test_of_a_judge_the_report_tells_how_often_the_order_made_no_difference() -> None:
    votes = [
        Vote(key=KEYS[0], rater="judge:m", outcome="A", first_probability=(0.9, 0.2)),
        Vote(key=KEYS[1], rater="judge:m", outcome="tie", first_probability=(0.9, 0.8)),
        Vote(key=KEYS[2], rater="judge:m", outcome="skip"),
    ]
    (judge,) = label_report(votes, PAIRS, a="a", b="b").raters
    assert judge.consistent is not None and (judge.consistent.value, judge.consistent.n) == (0.5, 2)
    assert judge.first is None


def test_votes_survive_their_file(files: LabelFiles) -> None:
    votes = [
        vote(0, "ana", "A", "B"),
        Vote(key="k", rater="judge:m", outcome="tie", first_probability=(0.25, 0.75)),
    ]
    files.append(*votes)
    assert files.read_votes() == votes
