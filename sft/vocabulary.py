"""What a command understands: its fields as options, and how text becomes a value of each.

Decision to know: the type of the field alone decides, through tyro's constructors, and in the same
way for a flag, a line of YAML and a preset. YAML's own guesses are not used, so `lr: 3e-4` is a
number and `balance: off` stays a word where the field says so. The rules added to tyro's own are
for values that people write otherwise than Python does: 1e4 steps, packing off, ~/folder.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

from moe.errors import UserError

TRUE, FALSE = ("true", "yes", "on"), ("false", "no", "off")
_NULL = ("none", "null", "~")


class MismatchError(Exception):
    """A text that its field cannot hold; `expected` completes 'is not ...'.

    No ValueError, which tyro would catch inside a list and replace by a sentence of its own.
    """

    def __init__(self, given: str, expected: str) -> None:
        super().__init__(sentence(f"{given!r} is not {expected}"))
        self.given = given
        self.expected = expected


def sentence(text: str) -> str:
    """The text with an end."""
    return text if text.endswith((".", "?")) else text + "."


def did_you_mean(word: str, known: Iterable[str], style: str = "{}") -> str:
    """`. Did you mean X?` when a known word is close, otherwise nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)
    return f". Did you mean {style.format(close[0])}?" if close else ""


# --- Rules beside tyro's ----------------------------------------------------------------------


def _to_bool(text: str) -> bool:
    if text.lower() not in (*TRUE, *FALSE):
        raise MismatchError(text, "true or false")
    return text.lower() in TRUE


def _float_or_nan(text: str) -> float:
    try:
        return float(text.replace(".inf", "inf"))  # .inf is YAML's spelling
    except ValueError:
        return math.nan


def _to_float(text: str) -> float:
    if math.isnan(number := _float_or_nan(text)):
        raise MismatchError(text, "a number")
    return number


def _to_int(text: str) -> int:
    """An integer, also as 1e4, which is how people write many steps; 1.5 steps is a mistake."""
    try:
        return int(text)
    except ValueError:
        number = _float_or_nan(text)
        if "e" in text.lower() and number.is_integer():
            return int(number)
        raise MismatchError(text, "an integer") from None


def _to_path(text: str) -> Path:
    return Path(text).expanduser()


_READERS: Mapping[Any, Callable[[str], Any]] = {
    bool: _to_bool,
    int: _to_int,
    float: _to_float,
    Path: _to_path,
}


def _rule(asked: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    if asked.type not in _READERS:
        return None
    read = _READERS[asked.type]
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=asked.type.__name__.upper(),
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, asked.type),
        str_from_instance=lambda value: [str(value)],
    )


def _constructor(kind: Any) -> PrimitiveConstructorSpec[Any]:
    """Tyro's constructor for a type, with our rules."""
    rules = ConstructorRegistry()
    rules.primitive_rule(_rule)
    with rules:
        found = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, set()))
    if isinstance(found, UnsupportedTypeAnnotationError):
        raise TypeError(f"no command can read a field of type {kind!r} from text")
    return found


# --- Options ----------------------------------------------------------------------------------


def flag(name: str) -> str:
    """The name of a field as it is typed."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a command's configuration.

    Attributes:
        kind: its type, without None.
        optional: whether it may be none.
        constructor: tyro's, from words to a value of `kind`.
    """

    name: str
    kind: Any
    optional: bool
    constructor: PrimitiveConstructorSpec[Any]
    default: Any
    required: bool = False
    positional: bool = False
    help: str = ""

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        return self.constructor.nargs != 1

    def read(self, words: Sequence[str] | None) -> Any:
        """The value that these words spell; None stands for YAML's null.

        Raises:
            MismatchError: when the type cannot hold it.
        """
        if words is None or (len(words) == 1 and words[0].lower() in _NULL):
            if self.optional:
                return None
            if words is None:
                raise MismatchError("null", "a value that this option takes")
        words = _without_brackets(words) if self.is_list else words
        if not self.is_list and len(words) != 1:
            raise MismatchError(" ".join(words), "a single value")
        choices = self.constructor.choices or words
        for word in words:
            if word not in choices:
                hint = did_you_mean(word, choices)
                raise MismatchError(word, f"one of {', '.join(choices)}{hint}")
        try:
            return self.constructor.instance_from_str(list(words))
        except ValueError:
            form = self.constructor.metavar
            raise MismatchError(" ".join(words), f"of the form {form}") from None

    def convert(self, value: Any) -> Any:
        """A preset's Python value as the field's type has it."""
        return self.read(None if value is None else self.constructor.str_from_instance(value))

    @property
    def default_text(self) -> str:
        if self.required:
            return "required"
        if self.default is None:
            return "none"
        if isinstance(self.default, bool):
            return "on" if self.default else "off"
        if isinstance(self.default, tuple):
            return " ".join(map(str, self.default)) or "[]"
        return str(self.default) or "''"


def _without_brackets(words: Sequence[str]) -> list[str]:
    """`[a, b]`, as alpaca-lora's users write a list, as its words."""
    text = " ".join(words)
    if not (text.startswith("[") and text.endswith("]")):
        return list(words)
    parts = (part.strip().strip("'\"") for part in text[1:-1].split(","))
    return [part for part in parts if part]


def option(name: str, annotation: Any, default: Any = None, **more: Any) -> Option:
    """An option from the annotation of its field, X or X | None."""
    union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if union else (annotation,)
    kinds = [member for member in members if member is not NoneType]
    if len(kinds) != 1:
        raise TypeError(f"{name} is {annotation}: a field of a command has one type, or none")
    return Option(
        name=name,
        kind=kinds[0],
        optional=NoneType in members,
        constructor=_constructor(kinds[0]),
        default=default,
        **more,
    )


def _options(config_class: type) -> dict[str, Option]:
    hints = get_type_hints(config_class)
    options = {}
    for field in dataclasses.fields(config_class):
        if field.init:
            make = field.default_factory
            default = field.default if make is dataclasses.MISSING else make()
            options[field.name] = option(
                field.name,
                hints[field.name],
                default,
                required=default is dataclasses.MISSING,
                positional=bool(field.metadata.get("positional", False)),
                help=str(field.metadata.get("help", "")),
            )
    return options


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Every word that a command knows.

    Attributes:
        options: the fields of its configuration.
        own: the options of the flags layer itself, as --config.
        aliases: other names of fields, those that apply to this command.
    """

    prog: str
    description: str
    options: Mapping[str, Option]
    own: Mapping[str, Option]
    aliases: Mapping[str, str]
    presets: Mapping[str, Mapping[str, object]]

    def find(self, word: str) -> Option | None:
        """The field of this name or alias, `-` and `_` being equal."""
        name = word.replace("-", "_")
        return self.options.get(self.aliases.get(name, name))

    def unknown_flag(self, typed: str) -> UserError:
        """The error for a flag that no field has."""
        names = [*self.options, *self.aliases, *self.own, "help", "help_all"]
        names += ["no_" + item.name for item in self.options.values() if item.is_switch]
        word = typed.lstrip("-").replace("_", "-")
        hint = did_you_mean(word, [name.replace("_", "-") for name in names], "--{}")
        return UserError(f"Unknown option {typed}{hint or f'. See {self.prog} --help.'}")


def vocabulary(
    config_class: type,
    *,
    prog: str,
    description: str,
    aliases: Mapping[str, str],
    presets: Mapping[str, Mapping[str, object]],
) -> Vocabulary:
    """The words of a command; raises ValueError when its class takes a name of the flags layer."""
    options = _options(config_class)
    own = {
        "config": option("config", Path | None, help="a YAML file that sets options"),
        "print_config": option("print_config", bool, False, help="where each value is set"),
    }
    taken = [name for name in (*own, "help", "help_all") if name in options]
    if taken:
        raise ValueError(f"{config_class.__name__}.{taken[0]}: the flags layer owns this name")
    if presets and "preset" not in options:
        own["preset"] = option("preset", str | None, help=f"one of {', '.join(presets)}")
    spelled = {
        alias.lstrip("-").replace("-", "_"): target.lstrip("-").replace("-", "_")
        for alias, target in aliases.items()
    }
    return Vocabulary(
        prog=prog,
        description=description,
        options=options,
        own=own,
        aliases={a: t for a, t in spelled.items() if t in options and a not in options},
        presets=presets,
    )
