"""The formats of data files: how a row is read, what is refused and in which words."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moe.errors import UserError
from sft.data import read_examples
from sft.examples import Document, Instruction, Preference
from sft.text import Message

HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: See you.",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Go.",
}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
PAIR = {"prompt": "U", "chosen": "good", "rejected": "bad"}


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    """Rows as JSON or JSONL, gzipped, as the name says."""
    if ".jsonl" in name:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    else:
        text = json.dumps(rows, ensure_ascii=False)
    content = text.encode("utf-8")
    file = folder / name
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


def raw(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_bytes(text.encode("utf-8"))
    return file


def message(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_examples(path, **options)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def turns(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(texts)
    ]


# --- what is read


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
def test_alpaca_is_read_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    examples = read_examples(write(tmp_path, name, [ALPACA, ALPACA]))
    assert (examples.kind, examples.format, len(examples)) == ("instruction", "alpaca", 2)
    row = examples[0]
    assert isinstance(row, Instruction)
    assert row.conversation == (Message("user", "Add.\n1 2"), Message("assistant", "3"))
    assert row.conversation[0].input_at == 5
    assert examples.places[0] == ("line 1" if "jsonl" in name else "row 1")


def test_alpaca_history_and_system_become_turns(tmp_path: Path) -> None:
    row = {"instruction": "C", "input": "", "output": "D", "system": "S", "history": [["A", "B"]]}
    (example,) = read_examples(write(tmp_path, "x.json", [row]))
    assert isinstance(example, Instruction)
    assert [(m.role, m.content) for m in example.conversation] == [
        ("system", "S"),
        ("user", "A"),
        ("assistant", "B"),
        ("user", "C"),
        ("assistant", "D"),
    ]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_messages_may_be_a_field_or_a_bare_list(tmp_path: Path, name: str) -> None:
    fields = read_examples(write(tmp_path, name, [{"messages": turns("U", "A")}] * 2))
    bare = read_examples(write(tmp_path, name, [turns("U", "A")] * 2))
    assert fields.rows == bare.rows and bare.format == "messages" and len(bare) == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "U", "chosen": "good", "rejected": "bad"},
        {"prompt": turns("U"), "chosen": "good", "rejected": "bad"},
        {"prompt": turns("U"), "chosen": turns("U", "good")[1:], "rejected": turns("U", "bad")[1:]},
        {"prompt": "U", "chosen": turns("U", "good")[1:], "rejected": turns("U", "bad")[1:]},
        {"prompt": "U", "chosen": turns("U", "good"), "rejected": turns("U", "bad")},
        {"chosen": turns("U", "good"), "rejected": turns("U", "bad")},
        {"chosen": "\n\nHuman: U\n\nAssistant: good", "rejected": "\n\nHuman: U\n\nAssistant: bad"},
        {
            "conversations": [{"from": "human", "value": "U"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
)
def test_every_form_of_a_preference_reads_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    examples = read_examples(write(tmp_path, "x.jsonl", [row]))
    assert examples.kind == "preference"
    assert examples.rows == (
        Preference(prompt=(Message("user", "U"),), chosen="good", rejected="bad"),
    )


def test_a_transcript_gives_its_turns_and_the_shared_prefix_is_the_prompt(tmp_path: Path) -> None:
    (pair,) = read_examples(write(tmp_path, "x.jsonl", [HH]))
    assert isinstance(pair, Preference)
    assert [(m.role, m.content) for m in pair.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
    ]
    assert (pair.chosen, pair.rejected) == ("See you.", "Go.")


def test_texts_keep_their_domain(tmp_path: Path) -> None:
    rows = [{"text": "a", "domain": "prose", "lang": "en"}, {"text": "b"}]
    examples = read_examples(write(tmp_path, "x.jsonl", rows))
    assert examples.rows == (Document(text="a", domain="prose"), Document(text="b"))
    assert examples.notes == ("Columns not used: lang.",)


def test_a_text_file_is_split_at_its_document_marks(tmp_path: Path) -> None:
    one = read_examples(raw(tmp_path, "one.txt", "a\r\nb\n"))
    assert one.rows == (Document(text="a\nb\n"),)
    two = read_examples(raw(tmp_path, "two.txt", "a\n<|endoftext|>\nb\n<|endoftext|>\n"))
    assert two.rows == (Document(text="a"), Document(text="b"))


def test_columns_map_the_files_names_to_ours(tmp_path: Path) -> None:
    file = write(tmp_path, "x.jsonl", [{"question": "U", "answer": "A"}])
    (row,) = read_examples(file, columns={"instruction": "question", "output": "answer"})
    assert isinstance(row, Instruction)
    assert row.conversation == (Message("user", "U"), Message("assistant", "A"))


def test_placeholders_in_answers_are_noted(tmp_path: Path) -> None:
    rows = [{"instruction": "hi", "output": "I am {{name}}."}, ALPACA]
    (note,) = read_examples(write(tmp_path, "x.json", rows)).notes
    assert note.startswith("1 of 2 answers hold a placeholder such as {{name}} (row 1)")


# --- bad rows, and what is said about them


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"instruction": "U"}, "line 3: field 'output' is missing"),
        ({"instruction": "U", "output": None}, "line 3: field 'output' is missing or null, not a"),
        ({"instruction": "U", "output": ["A"]}, "line 3: field 'output' is a list, not a string"),
        ({"instruction": 5, "output": "A"}, "line 3: field 'instruction' is a number, not"),
        ({"instruction": "U", "output": "A", "input": {}}, "field 'input' is an object"),
        ({"instruction": "U", "output": "A", "history": ["U"]}, "each entry of 'history'"),
        ({"instruction": "\ud83d", "output": "A"}, "has half a Unicode pair"),
        ("text", "line 3 is text, not an object"),
    ],
)
def test_a_bad_field_is_named_by_file_line_and_name(tmp_path: Path, bad: Any, words: str) -> None:
    file = raw(tmp_path, "x.jsonl", f"{json.dumps(ALPACA)}\n\n{json.dumps(bad)}\n")
    text = message(file)
    assert words in text
    assert "Mend or delete" in text


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [{"role": "tool", "content": "x"}],
            "role 'tool' in 'messages' is not one of system, user",
        ),
        ([{"role": "user"}], "a turn of 'messages' needs 'role' and 'content'"),
        ([{"role": ["user"], "content": "x"}], "'role' of a turn of 'messages' is a list"),
        ([{"role": "user", "content": [{"text": "x"}]}], "'content' of a user turn is a list"),
        ([], "'messages' is an empty list, not a list of turns"),
        ("U", "'messages' is text, not a list of turns"),
    ],
)
def test_bad_turns_are_named(tmp_path: Path, messages: Any, words: str) -> None:
    assert words in message(write(tmp_path, "x.jsonl", [{"messages": messages}]))


def test_a_file_without_text_or_without_objects_is_a_sentence(tmp_path: Path) -> None:
    assert "holds no text" in message(raw(tmp_path, "x.txt", " \n"))
    assert "row 1 is a number" in message(raw(tmp_path, "x.json", "[1]"))


def test_unknown_columns_are_answered_with_the_formats_and_a_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", [{"question": "U", "answer": "A"}])
    assert message(file).endswith(
        "has columns question, answer. Need one of: alpaca (instruction, output), messages, "
        "prompt+chosen+rejected, chosen+rejected, conversations+chosen+rejected, "
        "prompt+completion+label, messages+label, text. "
        "Map with --columns instruction=question output=answer"
    )


def test_a_mapping_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", [ALPACA])
    assert "no column 'answer'. It has: instruction" in message(file, columns={"output": "answer"})
    with pytest.raises(UserError, match="--columns outptu=...: no field of that name"):
        read_examples(file, columns={"outptu": "output"})
    text = raw(tmp_path, "x.txt", "text")
    assert "no columns to map" in message(text, columns={"text": "body"})


def test_judged_answers_are_not_read_as_answers_to_learn(tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", [{**ALPACA, "label": False}])
    assert "column 'label', which changes what the answers mean" in message(file)


def test_useless_rows_are_dropped_and_counted(tmp_path: Path) -> None:
    same = PAIR | {"rejected": "good"}
    empty = PAIR | {"rejected": " "}
    examples = read_examples(write(tmp_path, "x.jsonl", [PAIR] * 18 + [same, empty]))
    assert len(examples) == 18
    assert examples.notes == (
        "1 of 20 rows have an identical chosen and rejected (line 19): dropped.",
        "1 of 20 rows have an empty answer (line 20): dropped.",
    )


def test_dialogues_that_part_before_the_last_answer_are_dropped_and_counted(
    tmp_path: Path,
) -> None:
    apart = HH | {"rejected": "\n\nHuman: Ho\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Go."}
    examples = read_examples(write(tmp_path, "x.jsonl", [HH] * 10 + [apart]))
    assert len(examples) == 10
    assert "1 of 11 rows have a chosen and a rejected that differ before" in examples.notes[0]


def test_more_than_a_tenth_of_useless_rows_stops(tmp_path: Path) -> None:
    same = PAIR | {"rejected": "good"}
    text = message(write(tmp_path, "x.jsonl", [PAIR] * 8 + [same]))
    assert "1 of 9 rows have an identical chosen and rejected (line 9)" in text
    assert "That is over 10%" in text


def test_text_that_is_no_transcript_needs_a_prompt(tmp_path: Path) -> None:
    text = message(write(tmp_path, "x.jsonl", [{"chosen": "good", "rejected": "bad"}]))
    assert "line 1: field 'chosen' is not a transcript" in text and "no 'prompt' field" in text


# --- real files


def real(shared_data: Path, name: str) -> Path:
    file = shared_data / name
    if not file.is_file():
        pytest.skip(f"real data absent: {name}")
    return file


def test_ranked_answers_are_refused_for_now(shared_data: Path) -> None:
    with pytest.raises(UserError, match="row 1: field 'output' is a list"):
        read_examples(real(shared_data, "preference/oasst1_rm_zh.json.gz"))
