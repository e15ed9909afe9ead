"""Data files: what is read, what is refused and in which words, and what a batch holds."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from moe.errors import UserError
from sft.data import (
    IGNORED_LABEL,
    Document,
    Examples,
    Instruction,
    Preference,
    PreferenceCollator,
    SupervisedCollator,
    as_examples,
    document_rows,
    drop_shared_prompts,
    preference_rows,
    prompt_rows,
    prompt_text,
    read_examples,
    require,
    split_by_prompt,
    supervised_rows,
    use_chosen,
)
from sft.text import CONTINUATION, PLAIN, Message, TextPath, load_tokenizer, train_bpe

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


@pytest.fixture(scope="module")
def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One id a byte, so that lengths can be counted by hand."""
    return train_bpe(["x"], vocab_size=259)


@pytest.fixture
def path(bytes_tokenizer: PreTrainedTokenizerFast) -> TextPath:
    return TextPath(bytes_tokenizer, PLAIN, max_length=64)


def short_path(tokenizer: PreTrainedTokenizerFast, max_length: int) -> TextPath:
    return TextPath(tokenizer, CONTINUATION, max_length=max_length)


# --- formats


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


def test_a_json_file_with_a_row_on_each_line_is_read_as_lines(tmp_path: Path) -> None:
    file = raw(tmp_path, "x.json", f"{json.dumps(ALPACA)}\n\n{json.dumps(ALPACA)}\n")
    assert read_examples(file).places == ("line 1", "line 3")


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


# --- traps of real files


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    examples = read_examples(write(tmp_path, "x.jsonl", [{"text": text}, {"text": "b"}]))
    assert examples.rows == (Document(text=text), Document(text="b"))


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode() + b"\r\n")
    assert len(read_examples(file)) == 1


def test_placeholders_in_answers_are_noted(tmp_path: Path) -> None:
    rows = [{"instruction": "hi", "output": "I am {{name}}."}, ALPACA]
    (note,) = read_examples(write(tmp_path, "x.json", rows)).notes
    assert note.startswith("1 of 2 answers hold a placeholder such as {{name}} (row 1)")


# --- bad input, and what is said about it


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, "x.jsonl", [ALPACA])
    text = message(tmp_path / "x.json")
    assert text.startswith(f"No file {tmp_path / 'x.json'} (looked from ")
    assert text.endswith("In that folder: x.jsonl.")
    assert "does not exist either" in message(tmp_path / "no" / "x.json")
    assert "is a folder" in message(tmp_path)


def test_broken_json_is_named_by_line_and_column_blank_lines_counted(tmp_path: Path) -> None:
    lines = [json.dumps(ALPACA), "", json.dumps(ALPACA), '{"instruction": "a" "output": 1}']
    text = message(raw(tmp_path, "x.jsonl", "\n".join(lines)))
    assert "line 4, column 21: expecting ',' delimiter. Near: " in text
    text = message(raw(tmp_path, "x.json", '[\n{"instruction": "a"},\n{"instruction" 1}\n]'))
    assert "line 3, column 16: expecting ':' delimiter" in text


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


def test_a_file_that_is_not_utf8_is_named_with_a_guess(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes('[{"text":\n"\u4f60\u597d\uff0c\u4e16\u754c"}]'.encode("gbk"))
    assert "is GBK, not UTF-8 (line 2, byte 0xc4). Convert it: iconv -f GBK" in message(file)
    file.write_bytes(b'[{"text": "caf\xe9"}]')
    assert "is LATIN1, not UTF-8" in message(file)


def test_other_broken_files_are_sentences(tmp_path: Path) -> None:
    assert "holds no rows" in message(raw(tmp_path, "x.jsonl", "\n\n"))
    assert "holds no text" in message(raw(tmp_path, "x.txt", " \n"))
    assert "cannot read this kind of file" in message(raw(tmp_path, "x.parquet", "PAR1"))
    assert "not a whole gzip file" in message(raw(tmp_path, "x.json.gz", "[]"))
    assert "nested too deeply" in message(raw(tmp_path, "x.json", "[" * 100_000))
    assert "row 1 is a number" in message(raw(tmp_path, "x.json", "[1]"))


def test_unknown_columns_are_answered_with_the_formats_and_a_mapping(tmp_path: Path) -> None:
    file = write(tmp_path, "x.json", [{"question": "U", "answer": "A"}])
    assert message(file).endswith(
        "has columns question, answer. Need one of: alpaca (instruction, output), messages, "
        "prompt+chosen+rejected, chosen+rejected, conversations+chosen+rejected, text. "
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
    file = write(tmp_path, "x.json", [{"messages": turns("U", "A"), "label": False}])
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


# --- the right kind


def pairs(number: int = 1) -> list[Preference]:
    return [
        Preference(prompt=(Message("user", f"q{index}"),), chosen="good", rejected="bad")
        for index in range(number)
    ]


def answers(*texts: str) -> list[Instruction]:
    return [
        Instruction(conversation=(Message("user", "q"), Message("assistant", text)))
        for text in texts
    ]


def test_the_wrong_kind_of_file_is_refused_with_the_way_out() -> None:
    preferences = as_examples(pairs(), name="p.json")
    with pytest.raises(UserError) as caught:
        require(preferences, "instruction")
    assert str(caught.value) == (
        "p.json holds preferences (chosen/rejected); this stage needs answers to learn "
        "(instructions). Use rlhf.train --method dpo, or --use chosen."
    )
    with pytest.raises(UserError, match="instructions with one answer each; this method needs"):
        require(as_examples(answers("a")), "preference")
    assert require(preferences, "preference") is preferences


def test_rows_of_the_wrong_kind_are_refused(path: TextPath) -> None:
    with pytest.raises(UserError, match="--use chosen"):
        supervised_rows(as_examples(pairs()), path)
    with pytest.raises(UserError, match="needs preferences"):
        preference_rows(as_examples(answers("a")), path)


def test_the_chosen_answers_can_be_learned() -> None:
    examples = use_chosen(as_examples(pairs()))
    assert examples.rows == (
        Instruction(conversation=(Message("user", "q0"), Message("assistant", "good"))),
    )
    assert "rejected ones are not" in examples.notes[-1]


def test_rows_of_two_kinds_do_not_mix() -> None:
    with pytest.raises(UserError, match="rows of one kind, got instruction, preference"):
        as_examples([*pairs(), *answers("a")])


# --- splitting


def test_no_prompt_is_on_both_sides_and_no_row_is_lost() -> None:
    rows = [pair for index in range(40) for pair in pairs(40)[index : index + 1] * (index % 3 + 1)]
    train, val = split_by_prompt(rows, val_fraction=0.2, seed=1)
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in val}
    assert len(train) + len(val) == len(rows)
    assert 0.2 * len(rows) - 1 <= len(val) <= 0.2 * len(rows) + 3


def test_the_split_follows_the_seed_and_not_the_order() -> None:
    rows = pairs(30)
    _, val = split_by_prompt(rows, val_fraction=0.3, seed=1)
    _, same = split_by_prompt(rows[::-1], val_fraction=0.3, seed=1)
    _, other = split_by_prompt(rows, val_fraction=0.3, seed=2)
    assert {prompt_text(row) for row in val} == {prompt_text(row) for row in same}
    assert {prompt_text(row) for row in val} != {prompt_text(row) for row in other}
    assert len(val) == 9


def test_too_few_rows_to_split_is_an_error() -> None:
    with pytest.raises(UserError, match=r"8 rows with 8 different prompts .* Need 20 rows"):
        split_by_prompt(pairs(8), val_fraction=0.05, seed=0)
    with pytest.raises(UserError, match="6 rows with 1 different prompts"):
        split_by_prompt(pairs(1) * 6, val_fraction=0.5, seed=0)
    with pytest.raises(UserError, match="share 1.0"):
        split_by_prompt(pairs(8), val_fraction=1.0, seed=0)


def test_no_validation_share_gives_no_validation_rows() -> None:
    train, val = split_by_prompt(pairs(3), val_fraction=0, seed=0)
    assert (len(train), len(val)) == (3, 0)


def test_prompts_of_the_training_file_leave_the_held_out_file() -> None:
    train, held_out = as_examples(pairs(2), name="a"), as_examples(pairs(5), name="b")
    kept = drop_shared_prompts(held_out, train=train)
    assert [prompt_text(row) for row in kept] == ["q2", "q3", "q4"]
    assert kept.notes == ("2 prompts occur in both files; kept in a only.",)
    with pytest.raises(UserError, match="nothing is left"):
        drop_shared_prompts(train, train=held_out)


# --- rows of ids


def test_labels_are_the_ids_of_the_answer(path: TextPath) -> None:
    (row,) = supervised_rows(answers("ab"), path)
    prompt = path.encode_prompt((Message("user", "q"),))
    completion = path.encode_completion("ab")
    assert row["input_ids"] == prompt + completion
    assert row["labels"] == [IGNORED_LABEL] * len(prompt) + completion
    assert row["sample_id"] == 0


def test_a_cut_row_is_kept_and_the_rate_is_noted(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    # BOS, q, newline, 2 bytes, EOS: 6 tokens; with 8 bytes 12, of which 4 go.
    path = TextPath(bytes_tokenizer, PLAIN, max_length=8)
    rows = supervised_rows(answers("ab", "abcdefgh"), path)
    assert [len(row["input_ids"]) for row in rows] == [6, 8]
    assert rows.notes == (
        "1 of 2 rows (50.0%) are over --max-length 8 and lose their end (22.2% of the tokens).",
    )
    kept = supervised_rows(answers("abcdefgh", "ab"), path, drop_long=True)
    assert [(len(row["input_ids"]), row["sample_id"]) for row in kept] == [(6, 0)]
    assert kept.notes == ("1 of 2 rows (50.0%) are over --max-length 8 and are dropped.",)


def test_a_row_with_nothing_to_learn_is_named(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = TextPath(bytes_tokenizer, PLAIN, max_length=3)
    with pytest.raises(UserError) as caught:
        supervised_rows(answers("ab"), path)
    assert str(caught.value) == (
        "examples row 1: nothing left to learn after --max-length 3 (the prompt is 3 tokens). "
        "Raise it, or drop long rows with --drop-long."
    )
    with pytest.raises(UserError, match="--drop-long leaves none"):
        supervised_rows(answers("ab"), path, drop_long=True)


def test_documents_follow_each_other_in_full_blocks(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 64)
    a, b = path.encode_document("aaa"), path.encode_document("bb")
    assert (a[0], a[-1], len(a)) == (path.bos_id, path.eos_id, 5)
    rows = document_rows(["aaa", "bb"], path, block=4)
    assert [row["input_ids"] for row in rows] == [a[:4], [*a[4:], *b[:3]]]
    assert all(row["labels"] == row["input_ids"] for row in rows)
    assert rows.notes == ("1 last tokens stood alone in a block: dropped.",)


def test_a_block_holds_one_domain(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = short_path(bytes_tokenizer, 64)
    texts = [Document(text=3 * name, domain=name) for name in "abab"]
    rows = document_rows(texts, path, block=10)
    assert [(row["domain"], len(row["input_ids"]), row["sample_id"]) for row in rows] == [
        ("a", 10, 0),
        ("b", 10, 1),
    ]
    assert path.decode(rows[1]["input_ids"]) == "bbbbbb"


def test_whole_packing_splits_no_document_that_fits(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 64)
    texts = ["a" * 3, "b" * 4, "c" * 1, "d" * 9]
    rows = document_rows(texts, path, block=8, packing="whole")
    assert sorted(length for row in rows for length in row["seq_lengths"]) == [3, 3, 5, 6, 8]
    assert sum(len(row["input_ids"]) for row in rows) == 25
    whole = [text for text in texts if any(text in path.decode(row["input_ids"]) for row in rows)]
    assert whole == texts[:3]


def test_preferences_are_cut_where_the_least_is_lost(
    bytes_tokenizer: PreTrainedTokenizerFast,
) -> None:
    path = short_path(bytes_tokenizer, 12)
    pair = Preference(prompt=(Message("user", "0123456789"),), chosen="abcdefgh", rejected="xy")
    rows = preference_rows([pair], path)
    (row,) = rows
    # Half of 12 for the completions; the prompt keeps its BOS and its end in what is left.
    assert path.decode(row["chosen_ids"]) == "abcdef" and path.eos_id not in row["chosen_ids"]
    assert path.decode(row["rejected_ids"]) == "xy" and row["rejected_ids"][-1] == path.eos_id
    assert row["prompt_ids"][0] == path.bos_id and path.decode(row["prompt_ids"]) == "56789"
    assert rows.notes == (
        "1 of 1 prompts lose their beginning under --max-length 12.",
        "1 of 2 completions lose their end, and so their EOS, under --max-length 12.",
    )


def test_preferences_that_fit_are_whole(path: TextPath) -> None:
    rows = preference_rows(pairs(), path)
    assert rows[0]["prompt_ids"] == path.encode_prompt((Message("user", "q0"),))
    assert rows[0]["chosen_ids"] == path.encode_completion("good")
    assert rows.notes == ()


def test_pairs_made_equal_by_the_cut_stop_the_run(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    pair = Preference(prompt=(Message("user", "q"),), chosen="aaaaaaab", rejected="aaaaaaac")
    with pytest.raises(UserError, match="same ids for both answers .* Raise --max-length"):
        preference_rows([pair], short_path(bytes_tokenizer, 8))


def test_prompts_come_as_ids_and_as_text(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    path = short_path(bytes_tokenizer, 8)
    rows = prompt_rows(pairs(2), path)
    assert [row["prompt"] for row in rows] == ["q0", "q1"]
    assert rows[1]["prompt_ids"] == path.encode_prompt((Message("user", "q1"),))
    long = Instruction(conversation=(Message("user", "0123456789"), Message("assistant", "a")))
    cut = prompt_rows([long], path, max_prompt_length=4)
    assert cut[0]["prompt_ids"][0] == path.bos_id
    assert path.decode(cut[0]["prompt_ids"]) == "789"
    assert cut.notes == ("1 of 1 prompts lose their beginning: over 4 tokens.",)


def test_a_prompt_without_tokens_is_an_error(bytes_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = train_bpe(["x"], vocab_size=259)
    tokenizer.bos_token = None
    pair = Preference(prompt=(Message("user", ""),), chosen="a", rejected="b")
    with pytest.raises(UserError, match="row 1: the prompt has no tokens"):
        preference_rows([pair], short_path(tokenizer, 8))


# --- batches


def test_the_supervised_batch_is_right_padded_and_masked() -> None:
    rows = [
        {"input_ids": [5, 6, 0], "labels": [-100, 6, 0], "sample_id": 7},
        {"input_ids": [8], "labels": [8], "sample_id": 2},
    ]
    batch = SupervisedCollator(0)(rows)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[5, 6, 0], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 0], [8, -100, -100]]
    assert batch["sample_ids"].tolist() == [7, 2]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_the_preference_batch_has_the_chosen_rows_first() -> None:
    rows = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 9], "rejected_ids": [9], "sample_id": 0},
        {"prompt_ids": [1], "chosen_ids": [4], "rejected_ids": [5, 6, 9], "sample_id": 3},
    ]
    batch = PreferenceCollator(pad_id=0)(rows)  # type: ignore[arg-type]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9], [1, 4, 0, 0], [1, 2, 9, 0], [1, 5, 6, 9]]
    assert batch["attention_mask"].tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert batch["completion_mask"].tolist() == [
        [False, False, True, True],
        [False, True, False, False],
        [False, False, True, False],
        [False, True, True, True],
    ]
    assert batch["sample_ids"].tolist() == [0, 6, 1, 7]


# --- real files


def read_real(shared_data: Path, name: str) -> Examples:
    file = shared_data / name
    if not file.is_file():
        pytest.skip(f"real data absent: {name}")
    return read_examples(file)


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("preference/hh_harmless_base_test.jsonl.gz", "preference", 2303),
        ("preference/llamafactory_dpo_en_demo.json.gz", "preference", 300),
        ("instruction/llamafactory_alpaca_en_demo.json.gz", "instruction", 999),
        ("instruction/llamafactory_alpaca_zh_demo.json.gz", "instruction", 1000),
        ("instruction/xtuner_openai_sft.jsonl", "instruction", 128),
        ("instruction/llamafactory_identity.json", "instruction", 91),
        ("lm/multidomain.jsonl.gz", "document", 5850),
        ("lm/tinystories_5.txt", "document", 5),
    ],
)
def test_real_files_are_read_whole(shared_data: Path, name: str, kind: str, number: int) -> None:
    examples = read_real(shared_data, name)
    assert (examples.kind, len(examples)) == (kind, number)


def test_the_hh_file_accounts_for_every_row(shared_data: Path) -> None:
    examples = read_real(shared_data, "preference/hh_harmless_base_test.jsonl.gz")
    dropped = [int(re.match(r"\d+", note)[0]) for note in examples.notes]  # type: ignore[index]
    assert dropped == [4, 5] and len(examples) + sum(dropped) == 2312
    train, val = split_by_prompt(examples, val_fraction=0.1, seed=0)
    assert len(val) == 230
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in val}


@pytest.mark.parametrize("folder", ["models/stories260K/hf", "tokenizers/minimind6400"])
def test_real_files_become_rows_with_real_tokenizers(shared_data: Path, folder: str) -> None:
    path = TextPath(load_tokenizer(shared_data / folder), PLAIN, max_length=512)
    name = "instruction/llamafactory_alpaca_zh_demo.json.gz"
    rows = supervised_rows(read_real(shared_data, name).select(range(100)), path, drop_long=True)
    assert all(row["labels"][-1] == path.eos_id for row in rows)
    name = "preference/llamafactory_dpo_en_demo.json.gz"
    for pair in preference_rows(read_real(shared_data, name).select(range(50)), path):
        longest = max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))
        assert 1 <= len(pair["prompt_ids"]) <= 512 - longest
        assert pair["chosen_ids"] != pair["rejected_ids"]


def test_ranked_and_unpaired_answers_are_refused_for_now(shared_data: Path) -> None:
    with pytest.raises(UserError, match="row 1: field 'output' is a list"):
        read_real(shared_data, "preference/oasst1_rm_zh.json.gz")
    with pytest.raises(UserError, match="column 'label'"):
        read_real(shared_data, "preference/llamafactory_kto_en_demo.json.gz")
