"""Options from a YAML file: flat, strict, each with its line.

Decision to know: the file is composed, not loaded, so that every value keeps the text and the line
it has in the file; the type of its field says what it means.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moe.errors import UserError
from sft.vocabulary import MismatchError, Vocabulary, did_you_mean, sentence


@dataclass(frozen=True, kw_only=True)
class FileValue:
    """A value and the line that sets it."""

    value: Any
    line: int


def no_such_file(path: Path, *, suffixes: Sequence[str] = ()) -> UserError:
    """The error for a file that is not there: where it was looked for, what lies there instead.

    Args:
        suffixes: endings of the files worth naming (`.yaml`); empty names all.
    """
    folder = path if path.is_dir() else path.parent
    names = (
        sorted(
            item.name
            for item in folder.iterdir()
            if item.is_file() and (not suffixes or item.name.endswith(tuple(suffixes)))
        )
        if folder.is_dir()
        else []
    )
    names = difflib.get_close_matches(path.name, names, n=12, cutoff=0.0) if names else []
    where = "this folder" if folder == Path(".") else str(folder)
    kind = f"no {' or '.join(suffixes)} file" if suffixes else "no file"
    found = f"In {where}: {', '.join(sorted(names))}." if names else f"In {where}: {kind}."
    if not folder.is_dir():
        found = f"There is no folder {folder}."
    return UserError(f"No file {path} (looked from {Path.cwd()}). {found}")


def _compose(path: Path) -> yaml.Node | None:
    if not path.is_file():
        raise no_such_file(path, suffixes=(".yaml", ".yml"))
    try:
        return yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8; save it as UTF-8.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path}{place}: not valid YAML ({error.problem}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error}).") from None


def _words(node: yaml.Node, where: str) -> list[str] | None:
    """The text as it stands in the file; None for null."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else [node.value]
    if isinstance(node, yaml.SequenceNode) and all(
        isinstance(item, yaml.ScalarNode) for item in node.value
    ):
        return [item.value for item in node.value]
    raise UserError(
        f"{where} holds keys or lists of its own; options are flat, one 'name: value' a line."
    )


def read_yaml(path: Path, words: Vocabulary) -> dict[str, FileValue]:
    """Field to its value in the file, `preset` included; raises UserError with the place."""
    root = _compose(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of 'name: value' and found something else.")
    values: dict[str, FileValue] = {}
    for key_node, node in root.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        where = f"{path} line {line}"
        known = words.find(key)
        if key == "preset":
            known = known or words.own.get("preset")
        if known is None:
            names = [*words.options, *words.aliases]
            hint = did_you_mean(key.replace("-", "_"), names, "'{}'")
            raise UserError(f"{where}: unknown key {key!r}{hint or '.'}")
        if known.name in values:
            earlier = values[known.name].line
            raise UserError(f"{where}: {known.name!r} is already set in line {earlier}.")
        try:
            value = known.read(_words(node, f"{where}: {key!r}"))
        except MismatchError as error:
            told = f"{path}: '{key}: {error.given}' is not {error.expected}"
            raise UserError(sentence(told)) from None
        values[known.name] = FileValue(value=value, line=line)
    return values
