"""Data files as text and rows of JSON: what is read, what is refused and in which words."""

import gzip
import json
from pathlib import Path

import pytest

from moe.errors import UserError
from sft.files import Record, parse_records, read_text, suffix_of

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def raw(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_bytes(text.encode("utf-8"))
    return file


def read(file: Path) -> list[Record]:
    return parse_records(read_text(file), file)


def message(file: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(file)
    text = str(caught.value)
    assert str(file) in text and "\n" not in text
    return text


# --- what is read


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson", "x.jsonl.gz", "x.JSONL.GZ"])
def test_a_file_of_lines_gives_its_rows_by_line(tmp_path: Path, name: str) -> None:
    content = b'{"a": 1}\n{"a": 2}\n'
    is_packed = name.lower().endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content) if is_packed else content)
    assert read(tmp_path / name) == [
        Record(place="line 1", value={"a": 1}),
        Record(place="line 2", value={"a": 2}),
    ]


def test_a_json_file_gives_its_rows_by_number(tmp_path: Path) -> None:
    rows = read(raw(tmp_path, "x.json", '[{"a": 1}, 2]'))
    assert rows == [Record(place="row 1", value={"a": 1}), Record(place="row 2", value=2)]


def test_a_json_file_may_hold_one_row_or_one_list_of_turns(tmp_path: Path) -> None:
    assert read(raw(tmp_path, "x.json", '{"a": 1}')) == [Record(place="row 1", value={"a": 1})]
    turns = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    (record,) = read(raw(tmp_path, "x.json", json.dumps(turns)))
    assert record.value == turns


def test_the_suffix_is_the_one_before_gz_in_small_letters() -> None:
    names = ("x.json", "x.v2.JSONL.gz", "x.gz", "x")
    assert [suffix_of(Path(name)) for name in names] == [".json", ".jsonl", "", ""]


def test_a_json_file_with_a_row_on_each_line_is_read_as_lines(tmp_path: Path) -> None:
    file = raw(tmp_path, "x.json", f"{json.dumps(ALPACA)}\n\n{json.dumps(ALPACA)}\n")
    assert [record.place for record in read(file)] == ["line 1", "line 3"]


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    lines = [json.dumps(line, ensure_ascii=False) for line in (text, "b")]
    records = read(raw(tmp_path, "x.jsonl", "\n".join(lines)))
    assert [record.value for record in records] == [text, "b"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_matter(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ALPACA).encode() + b"\r\n")
    assert [record.value for record in read(file)] == [ALPACA]


def test_a_missing_file_is_named_with_its_neighbours(tmp_path: Path) -> None:
    raw(tmp_path, "x.jsonl", "{}")
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


def test_a_file_that_is_not_utf8_is_named_with_a_guess(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_bytes('[{"text":\n"\u4f60\u597d\uff0c\u4e16\u754c"}]'.encode("gbk"))
    assert "is GBK, not UTF-8 (line 2, byte 0xc4). Convert it: iconv -f GBK" in message(file)
    file.write_bytes(b'[{"text": "caf\xe9"}]')
    assert "is LATIN1, not UTF-8" in message(file)


def test_other_broken_files_are_sentences(tmp_path: Path) -> None:
    assert "holds no rows" in message(raw(tmp_path, "x.jsonl", "\n\n"))
    assert "cannot read this kind of file" in message(raw(tmp_path, "x.parquet", "PAR1"))
    assert "not a whole gzip file" in message(raw(tmp_path, "x.json.gz", "[]"))
    assert "nested too deeply" in message(raw(tmp_path, "x.json", "[" * 100_000))
    lines = "1\n" + "[" * 100_000
    assert "line 2: the JSON is nested too deeply" in message(raw(tmp_path, "x.jsonl", lines))
