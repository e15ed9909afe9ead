"""One flags layer for every command: a frozen dataclass becomes flags, YAML keys and a help screen.

Decision to know: text is turned into values by the field's type alone, the same way for flags and
for YAML. YAML's own guesses are not used, so `lr: 3e-4` is a number and `balance: off` stays a word
where the field says so. Precedence: built-in < --preset < --config file.yaml < flags. Nothing here
imports torch, so that a mistyped flag is answered at once.
"""

import dataclasses
import difflib
import functools
import math
import os
import shutil
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Any,
    Generic,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from moe.errors import UserError
from sft.run import yaml_line

C = TypeVar("C")
P = ParamSpec("P")

# Names that people know from alpaca-lora and LLaMA-Factory. Each holds only where the command has
# the field on the right.
SHARED_ALIASES: Mapping[str, str] = types.MappingProxyType(
    {
        "base_model": "model",
        "model_name_or_path": "model",
        "data_path": "data",
        "lora_r": "lora_rank",
        "lora_target_modules": "lora_targets",
        "lora_target": "lora_targets",
        "learning_rate": "lr",
        "cutoff_len": "max_length",
        "num_epochs": "epochs",
        "num_train_epochs": "epochs",
        "pref_beta": "beta",
        "output_dir": "out",
        "micro_batch_size": "batch_size_per_device",
        "per_device_train_batch_size": "batch_size_per_device",
    }
)

_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NULL = ("none", "null", "~")
_HELP_LINES = 40


@dataclass(frozen=True, kw_only=True)
class Parsed(Generic[C]):
    """A command's configuration, and for each field where its value came from.

    Attributes:
        config: an instance of the class given to `parse`.
        origins: field to `built-in`, `preset NAME`, `file.yaml:LINE` or `flag`.
    """

    config: C
    origins: dict[str, str]


class _MismatchError(Exception):
    """A text that its field cannot hold; `expected` completes 'is not ...'."""

    def __init__(self, given: object, expected: str) -> None:
        super().__init__(f"{given!r} is not {expected}")
        self.given = given
        self.expected = expected


@dataclass(frozen=True, kw_only=True)
class _Option:
    name: str
    kind: Any
    default: Any
    required: bool
    positional: bool
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return bool in _alternatives(self.kind)

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is tuple for kind in _alternatives(self.kind))


# --- Text to values, by type ------------------------------------------------------------------


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of an Optional or Union; otherwise the type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _to_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word not in (*_TRUE, *_FALSE):
        raise _MismatchError(value, "true or false")
    return word in _TRUE


def _to_number(value: object, kind: type) -> float:
    expected = "an integer" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _MismatchError(value, expected)
    if value in (".inf", "-.inf"):  # YAML's spelling
        value = str(value).replace(".", "")
    try:
        number = kind(value) if isinstance(value, str) else value
    except ValueError:
        # 1e4 steps is how people write it; 1.5 steps is a mistake.
        number = _float_or_nan(str(value)) if kind is int and "e" in str(value).lower() else None
    if number is None or math.isnan(number):
        raise _MismatchError(value, expected)
    if kind is int and (math.isinf(number) or number != int(number)):
        raise _MismatchError(value, expected)
    return kind(number)


def _float_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _to_choice(value: object, choices: tuple[Any, ...]) -> object:
    for choice in choices:
        if choice is value or (not isinstance(value, bool) and str(choice) == str(value)):
            return choice
    words = [str(choice) for choice in choices]
    raise _MismatchError(value, f"one of {', '.join(words)}{_did_you_mean(str(value), words)}")


def _split_list(value: object) -> list[object]:
    """A list, a tuple, one value, or the bracketed text `[a, b]`, as a list."""
    if isinstance(value, list | tuple):
        if not (value and all(isinstance(item, str) for item in value)):
            return list(value)
        text = " ".join(value)
    elif isinstance(value, str):
        text, value = value, [value]
    else:
        return [value]
    if text.startswith("[") and text.endswith("]"):
        parts = [part.strip().strip("'\"") for part in text[1:-1].split(",")]
        return [part for part in parts if part]
    return list(value)


def _to_tuple(value: object, args: tuple[Any, ...]) -> tuple[object, ...]:
    items = _split_list(value)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_coerce(item, args[0]) for item in items)
    if len(items) != len(args):
        raise _MismatchError(" ".join(map(str, items)), f"a list of {len(args)} values")
    return tuple(_coerce(item, kind) for item, kind in zip(items, args, strict=True))


def _coerce(value: object, kind: Any) -> Any:
    """The value in the field's type, from text, from YAML's lists or from a preset's Python value.

    Raises:
        _MismatchError: when the type cannot hold it.
    """
    members = _alternatives(kind)
    if types.NoneType in members:
        alone = value[0] if isinstance(value, list) and len(value) == 1 else value
        if alone is None or (isinstance(alone, str) and alone.lower() in _NULL):
            return None
    members = tuple(member for member in members if member is not types.NoneType)
    if len(members) > 1:
        return _first_that_fits(value, members)
    kind = members[0]
    if get_origin(kind) is tuple:
        return _to_tuple(value, get_args(kind))
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise _MismatchError(" ".join(map(str, value)), "a single value")
        value = value[0]
    if get_origin(kind) is Literal:
        return _to_choice(value, get_args(kind))
    if kind is bool:
        return _to_bool(value)
    if kind in (int, float):
        return _to_number(value, kind)
    if value is None:
        raise _MismatchError("null", "a value that this option takes")
    if kind is Path:
        return Path(str(value)).expanduser()
    if kind is str:
        return str(value)
    raise TypeError(f"no command can read a field of type {kind!r} from text")


def _first_that_fits(value: object, members: tuple[Any, ...]) -> object:
    expected = []
    for member in members:
        try:
            return _coerce(value, member)
        except _MismatchError as error:
            expected.append(error.expected)
    raise _MismatchError(value, " or ".join(dict.fromkeys(expected)))


# --- The command's vocabulary -----------------------------------------------------------------


def _options(config_class: type) -> dict[str, _Option]:
    hints = get_type_hints(config_class)
    options = {}
    for field in dataclasses.fields(config_class):
        if not field.init:
            continue
        make = field.default_factory
        default = field.default if make is dataclasses.MISSING else make()
        options[field.name] = _Option(
            name=field.name,
            kind=hints[field.name],
            default=default,
            required=default is dataclasses.MISSING,
            positional=bool(field.metadata.get("positional", False)),
            help=str(field.metadata.get("help", "")),
        )
    return options


def _did_you_mean(word: str, known: Iterable[str], style: str = "{}") -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f". Did you mean {style.format(close[0])}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """Every word that a command knows: fields, aliases that apply, and the layer's own."""

    prog: str
    description: str
    options: Mapping[str, _Option]
    aliases: Mapping[str, str]
    presets: Mapping[str, Mapping[str, object]]

    def find(self, word: str) -> _Option | None:
        name = word.replace("-", "_")
        return self.options.get(self.aliases.get(name, name))

    @property
    def own_words(self) -> list[str]:
        return ["config", "print_config", "help", "help_all"] + ["preset"] * bool(self.presets)

    def unknown_flag(self, typed: str) -> UserError:
        switches = ["no_" + option.name for option in self.options.values() if option.is_switch]
        known = [*self.options, *self.aliases, *self.own_words, *switches]
        word = typed.lstrip("-").replace("_", "-")
        hint = _did_you_mean(word, [name.replace("_", "-") for name in known], "--{}")
        return UserError(f"Unknown option {typed}{hint or f'. See {self.prog} --help.'}")


def _vocabulary(
    config_class: type,
    prog: str,
    description: str,
    aliases: Mapping[str, str],
    presets: Mapping[str, Mapping[str, object]],
) -> _Vocabulary:
    options = _options(config_class)
    spelled = {
        alias.lstrip("-").replace("-", "_"): target.lstrip("-").replace("-", "_")
        for alias, target in aliases.items()
    }
    words = _Vocabulary(
        prog=prog,
        description=description,
        options=options,
        aliases={a: t for a, t in spelled.items() if t in options and a not in options},
        presets=presets,
    )
    taken = [name for name in words.own_words if name in options and name != "preset"]
    if taken:
        raise ValueError(f"{config_class.__name__}.{taken[0]}: the flags layer owns this name")
    return words


# --- Flags ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _CommandLine:
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    preset: str | None = None
    config: Path | None = None
    print_config: bool = False


def _is_option(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


class _FlagReader:
    """Walks over argv once, left to right."""

    def __init__(self, argv: Sequence[str], words: _Vocabulary) -> None:
        self.tokens = list(argv)
        self.words = words
        self.line = _CommandLine()
        self.loose: list[str] = []
        self.last = ""

    def read(self) -> _CommandLine:
        while self.tokens:
            token = self.tokens.pop(0)
            if _is_option(token):
                typed, equals, text = token.partition("=")
                self._option(typed, [text] if equals else [])
            elif token == "--":
                self.loose += self.tokens
                self.tokens = []
            else:
                self.loose.append(token)
                self._check_place(token)
        self._positionals()
        return self.line

    def _check_place(self, token: str) -> None:
        if token.startswith("-") and math.isnan(_float_or_nan(token)):
            raise self.words.unknown_flag(token)
        if not any(option.positional for option in self.words.options.values()):
            after = f" after {self.last}, which takes no more" if self.last else ""
            raise UserError(f"Unexpected value {token!r}{after}. Options begin with --.")

    def _option(self, typed: str, given: list[str]) -> None:
        word = typed[2:].replace("-", "_")
        self.last = typed
        if word == "print_config":
            self.line.print_config = True
        elif word == "config":
            self.line.config = Path(self._one(typed, given)).expanduser()
        elif word == "preset" and self.words.presets:
            self.line.preset = self._one(typed, given)
        elif option := self.words.find(word):
            self._set(option, typed, self._values(option, typed, given))
        elif word.startswith("no_") and (option := self.words.find(word[3:])):
            if not option.is_switch:
                raise UserError(f"{typed} is no option, because {option.flag} takes a value.")
            if given:
                raise UserError(f"{typed} takes no value; write {typed} or {option.flag}.")
            self._set(option, typed, "false")
        else:
            raise self.words.unknown_flag(typed)

    def _one(self, typed: str, given: list[str]) -> str:
        if not given and self.tokens and not _is_option(self.tokens[0]):
            given = [self.tokens.pop(0)]
        if not given or not given[0]:
            raise UserError(f"{typed} needs a value.")
        return given[0]

    def _values(self, option: _Option, typed: str, given: list[str]) -> str | list[str]:
        if option.is_list:
            while self.tokens and not _is_option(self.tokens[0]):
                given.append(self.tokens.pop(0))
            if not given:
                raise UserError(f"{typed} needs at least one value; an empty list is '[]'.")
            return given
        if option.is_switch and not given:
            word = self.tokens[0].lower() if self.tokens else ""
            return self.tokens.pop(0) if word in (*_TRUE, *_FALSE) else "true"
        if not given and self.tokens and not _is_option(self.tokens[0]):
            given = [self.tokens.pop(0)]
        if not given:
            raise UserError(f"{typed} needs a value.")
        return given[0]

    def _set(self, option: _Option, typed: str, value: str | list[str]) -> None:
        if option.name in self.line.values:
            raise UserError(f"{option.flag} is given twice; give it once.")
        try:
            self.line.values[option.name] = _coerce(value, option.kind)
        except _MismatchError as error:
            raise UserError(f"{typed}: {_sentence(str(error))}") from None

    def _positionals(self) -> None:
        for option in self.words.options.values():
            if option.positional and self.loose and option.name not in self.line.values:
                taken = len(self.loose) if option.is_list else 1
                value, self.loose = self.loose[:taken], self.loose[taken:]
                self._set(option, option.name, value if option.is_list else value[0])
        if self.loose:
            raise UserError(f"Unexpected value {self.loose[0]!r}. Options begin with --.")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?")) else text + "."


# --- The YAML file ----------------------------------------------------------------------------


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


def _node_value(node: yaml.Node, where: str) -> object:
    """The text as it stands in the file; the field's type decides what it means."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_node_value(item, where) for item in node.value]
    raise UserError(f"{where} holds keys of its own; options are flat, one 'name: value' a line.")


@dataclass(frozen=True, kw_only=True)
class _FileValue:
    value: Any
    line: int


def _read_yaml(path: Path, words: _Vocabulary) -> dict[str, _FileValue]:
    root = _compose(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of 'name: value' and found something else.")
    values: dict[str, _FileValue] = {}
    for key_node, node in root.value:
        line, key = key_node.start_mark.line + 1, str(key_node.value)
        option = words.find(key)
        name = option.name if option else key.replace("-", "_")
        if option is None and not (name == "preset" and words.presets):
            hint = _did_you_mean(name, [*words.options, *words.aliases], "'{}'")
            raise UserError(f"{path} line {line}: unknown key {key!r}{hint or '.'}")
        if name in values:
            raise UserError(
                f"{path} line {line}: {name!r} is already set in line {values[name].line}."
            )
        given = _node_value(node, f"{path} line {line}: {key!r}")
        try:
            value = _coerce(given, option.kind if option else str)
        except _MismatchError as error:
            shown = "null" if error.given is None else error.given
            text = f"{path}: '{key}: {shown}' is not {error.expected}"
            raise UserError(_sentence(text)) from None
        values[name] = _FileValue(value=value, line=line)
    return values


# --- Putting the layers together --------------------------------------------------------------


def _preset_values(name: str, words: _Vocabulary) -> dict[str, Any]:
    if name not in words.presets:
        hint = _did_you_mean(name, words.presets)
        raise UserError(f"No preset {name!r}: choose {', '.join(words.presets)}{hint or '.'}")
    values = {}
    for key, value in words.presets[name].items():
        if key not in words.options:
            raise ValueError(f"preset {name} sets {key}, which {words.prog} does not have")
        values[key] = _coerce(value, words.options[key].kind)
    return values


def _merge(
    line: _CommandLine, words: _Vocabulary
) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Values, their origins, and the preset in force."""
    in_file = _read_yaml(line.config, words) if line.config is not None else {}
    options = words.options
    values = {n: o.default for n, o in options.items() if not o.required}
    origins = dict.fromkeys(values, "built-in")

    preset, origin = (line.preset, "flag") if line.preset is not None else (None, "built-in")
    if words.presets and preset is None and "preset" in in_file:
        preset, origin = in_file["preset"].value, f"{line.config}:{in_file['preset'].line}"
    if words.presets and preset is None and "preset" in options:
        preset = values.get("preset")
    if words.presets and preset is not None:
        for name, value in _preset_values(preset, words).items():
            values[name], origins[name] = value, f"preset {preset}"
    for name, item in in_file.items():
        values[name], origins[name] = item.value, f"{line.config}:{item.line}"
    for name, value in line.values.items():
        values[name], origins[name] = value, "flag"

    if words.presets and "preset" in options and preset is not None:
        values["preset"], origins["preset"] = preset, origin
    elif "preset" not in options:
        values.pop("preset", None)
        origins.pop("preset", None)
    order = [name for name in options if name in values]
    return {n: values[n] for n in order}, {n: origins[n] for n in order}, preset


def parse(
    config_class: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    aliases: Mapping[str, str] = SHARED_ALIASES,
    presets: Mapping[str, Mapping[str, object]] = types.MappingProxyType({}),
) -> Parsed[C]:
    """Reads a command's configuration from presets, a YAML file and flags.

    Args:
        config_class: a frozen dataclass of int, float, bool, str, Path, Literal, Optional and
            tuples of these; `metadata={"help": ...}` documents a field, and
            `metadata={"positional": True}` lets it be given without its flag. A field `preset`
            holds the preset in force, and its default names the preset that is used unasked.
        argv: the words after the command; None takes the process's own.
        prog: the command as the user typed it, for messages (`python -m sft.train`).
        presets: name to the values that it sets.

    Raises:
        UserError: for what the user mistyped, in one sentence.
        SystemExit: with code 0, after --help, --help-all or --print-config.
    """
    argv = sys.argv[1:] if argv is None else argv
    words = _vocabulary(config_class, prog, description, aliases, presets)
    asked = {token.replace("_", "-") for token in argv}
    if asked & {"-h", "--help", "--help-all"}:
        print(_help(words, every="--help-all" in asked), flush=True)
        raise SystemExit(0)
    line = _FlagReader(argv, words).read()
    values, origins, preset = _merge(line, words)
    missing = [o.flag for n, o in words.options.items() if n not in values]
    if missing:
        raise UserError(f"Missing {', '.join(missing)}. See {prog} --help.")
    try:
        config = config_class(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    if line.print_config:
        print(_show(config, origins, preset), flush=True)
        raise SystemExit(0)
    return Parsed(config=config, origins=origins)


# --- What is printed --------------------------------------------------------------------------


def _show(config: object, origins: Mapping[str, str], preset: str | None) -> str:
    """Every value and its origin, in YAML that --config reads back."""
    lines = {name: yaml_line(name, getattr(config, name)) for name in origins}
    width = min(max(map(len, lines.values()), default=0), 48)
    head = [f"# preset {preset}"] if preset is not None and "preset" not in origins else []
    return "\n".join(head + [f"{lines[n]:<{width}}  # {origins[n]}" for n in lines])


def _default_text(option: _Option) -> str:
    if option.required:
        return "required"
    value = option.default
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "[]"
    return str(value) if str(value) else "''"


def _help_text(option: _Option) -> str:
    choices: list[str] = []
    for kind in _alternatives(option.kind):
        inner = get_args(kind)[0] if get_origin(kind) is tuple else kind
        choices += map(str, get_args(inner)) if get_origin(inner) is Literal else []
    shown = f"({'|'.join(choices)})" if choices else ""
    return " ".join(filter(None, [shown, option.help]))


def _flag_text(option: _Option) -> str:
    if option.positional:
        return option.name.upper()
    return option.flag.replace("--", "--[no-]", 1) if option.is_switch else option.flag


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 2, 0)].rstrip() + ".."


def _rows(options: Sequence[_Option], width: int) -> list[str]:
    """One line an option: flag, default, help; clipped to the width."""
    flag_width = max(len(_flag_text(option)) for option in options)
    default_width = min(max(len(_default_text(option)) for option in options), max(width // 6, 8))
    rest = width - flag_width - default_width - 4
    return [
        f"{_flag_text(o):<{flag_width}}  {_clip(_default_text(o), default_width):<{default_width}}"
        f"  {_clip(_help_text(o), rest) if rest > 5 else ''}".rstrip()
        for o in options
    ]


def _help(words: _Vocabulary, *, every: bool) -> str:
    """The help screen: at most 40 lines unless `every`; two columns when there are many options."""
    width = min(max(shutil.get_terminal_size((100, 40)).columns, 80), 120)
    options = list(words.options.values())
    names = "".join(f" {o.name.upper()}" for o in options if o.positional)
    head = [f"usage: {words.prog}{names} [--option value ...]", ""]
    summary = textwrap.wrap(" ".join(words.description.split()), width)
    head += [*(summary if every else summary[:3]), ""]
    foot = [
        "",
        "--config FILE.yaml sets options from a file; --print-config shows where each is set.",
    ]
    if words.presets:
        foot.insert(1, _clip(f"--preset NAME is one of: {', '.join(words.presets)}.", width))
    if every:
        body = [line for option in options for line in _full(option, words, width)]
        return "\n".join(head + body + foot)
    foot.append(
        "- and _ are equal, lists by space; --help-all shows every text in full, and aliases."
    )
    room = _HELP_LINES - len(head) - len(foot)
    return "\n".join(head + _body(options, room, width) + foot)


def _body(options: Sequence[_Option], room: int, width: int) -> list[str]:
    if len(options) <= room:
        return ["  " + row for row in _rows(options, width - 2)] if options else []
    half = -(-len(options) // 2)
    column = (width - 4) // 2
    left, right = _rows(options[:half], column), _rows(options[half:], column)
    right += [""] * (half - len(right))
    body = [f"  {a:<{column}}  {b}".rstrip() for a, b in zip(left, right, strict=True)]
    if len(body) <= room:
        return body
    return [*body[: room - 1], f"  ... {len(options)} options: see --help-all"]


def _full(option: _Option, words: _Vocabulary, width: int) -> list[str]:
    also = [f"--{a.replace('_', '-')}" for a, t in words.aliases.items() if t == option.name]
    text = " ".join([_help_text(option), f"(also {', '.join(also)})" if also else ""]).strip()
    first = f"  {_flag_text(option)}  {_default_text(option)}"
    indent = " " * 6
    return [first, *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


# --- The guard around a command ---------------------------------------------------------------


def _reader_has_gone() -> bool:
    """Whether stdout was closed at the other end (`command | head`), which is no error."""
    try:
        print(flush=True)  # only a write tells; what was buffered is lost with the first failure
    except BrokenPipeError:
        # Python flushes once more at exit and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def main_guard(function: Callable[P, int | None]) -> Callable[P, int]:
    """Decorates a command's `main`, so that it returns an exit code and users see no traceback.

    UserError prints `error: ...` on stderr and gives 2 (or the error's own `exit_code`);
    Ctrl-C gives 130; the end of the function gives 0 or what it returned. Any other exception is
    a bug and keeps its traceback.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            code = function(*args, **kwargs) or 0
            sys.stdout.flush()
            return code
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return int(getattr(error, "exit_code", 2))
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except SystemExit as end:
            if end.code is None or isinstance(end.code, int):
                return end.code or 0
            print(end.code, file=sys.stderr)
            return 1
        except BrokenPipeError:
            if not _reader_has_gone():
                raise
            return 141

    return guarded
