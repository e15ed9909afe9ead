"""One flags layer for every command: a frozen dataclass becomes flags, YAML keys and a help screen.

Decision to know: tyro reads the command line; this file adds what it leaves to others, which is the
precedence (built-in < --preset < --config file.yaml < flags), where each value came from, and one
sentence for a mistake. Names are checked before tyro sees them, because its own answer is a box of
many lines. Nothing here imports torch, so that a mistyped flag is answered at once.
"""

import functools
import os
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, ParamSpec, TypedDict, TypeVar

import tyro

from moe.errors import UserError
from sft.help_screen import help_screen, usage
from sft.run import yaml_line
from sft.vocabulary import (
    FALSE,
    TRUE,
    MismatchError,
    Option,
    Vocabulary,
    did_you_mean,
    flag,
    vocabulary,
)
from sft.yaml_layer import read_yaml

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


@dataclass(frozen=True, kw_only=True)
class Parsed(Generic[C]):
    """A command's configuration, and for each field where its value came from.

    Attributes:
        config: an instance of the class given to `parse`.
        origins: field to `built-in`, `preset NAME`, `file.yaml:LINE` or `flag`.
    """

    config: C
    origins: dict[str, str]


# --- The command line -------------------------------------------------------------------------


def _tyro_type(words: Vocabulary) -> Any:
    """The options as a type that tyro fills with those that were given, and no others.

    A value comes back as its words: `Option.read` gives them their type, and our sentence when
    they have none. Only switches are final, since tyro makes --x and --no-x of a bool.
    """
    fields = {}
    for option in (*words.options.values(), *words.own.values()):
        constructor = replace(
            option.constructor,
            nargs="*" if option.is_list else 1,
            instance_from_str=list,
            choices=None,
        )
        shown = tyro.conf.arg(
            aliases=[flag(a) for a, name in words.aliases.items() if name == option.name] or None,
            help=option.help,
            help_behavior_hint="(required)"
            if option.required
            else f"(default: {option.default_text})",
        )
        kind = bool if option.is_switch else Annotated[option.kind, constructor]
        fields[option.name] = Annotated[kind, shown]
    make: Any = TypedDict
    return make("Options", fields, total=False)


def _is_flag(token: str) -> bool:
    """Whether this begins another option, as tyro sees it; -1 and -inf are values."""
    is_number = token.lower() in ("-inf", "-nan", "-infinity")
    return token.startswith("--") or (
        token.startswith("-") and token[1:2].isalpha() and not is_number
    )


class _CommandLine:
    """What was typed: field to the name it was given by, and the tokens as tyro is to read them."""

    def __init__(self, argv: Sequence[str], words: Vocabulary) -> None:
        self.words = words
        self.typed: dict[str, str] = {}
        self.tokens: list[str] = []
        left = list(argv)
        while left:
            token = left.pop(0)
            if token == "--":
                self.tokens += [token, *left]
                return
            if _is_flag(token):
                self._flag(token, left)
            else:
                self.tokens.append(token)

    def _flag(self, token: str, left: list[str]) -> None:
        typed, equals, text = token.partition("=")
        option, negated = self._option(typed)
        if option.name in self.typed:
            raise UserError(f"{option.flag} is given twice; give it once.")
        self.typed[option.name] = typed
        follows = bool(left) and not _is_flag(left[0])
        if option.is_switch:
            if negated and equals:
                raise UserError(f"{typed} takes no value; write {typed} or {option.flag}.")
            given = [text] if equals else ["false"] if negated else ["true"]
            if not equals and not negated and follows and left[0].lower() in (*TRUE, *FALSE):
                given = [left.pop(0)]
            on = _read(option, given, typed)
            self.tokens.append(option.flag if on else flag(f"no_{option.name}"))
        elif equals or follows:
            self.tokens.append(token)
        elif option.is_list:
            raise UserError(f"{typed} needs at least one value; an empty list is '[]'.")
        else:
            raise UserError(f"{typed} needs a value.")

    def _option(self, typed: str) -> tuple[Option, bool]:
        """The option of this name, and whether it is named by --no-."""
        if not typed.startswith("--"):
            raise self.words.unknown_flag(typed)
        name = typed[2:].replace("-", "_")
        if option := self.words.own.get(name) or self.words.find(name):
            return option, False
        option = self.words.find(name.removeprefix("no_"))
        if option is None or not name.startswith("no_"):
            raise self.words.unknown_flag(typed)
        if not option.is_switch:
            raise UserError(f"{typed} is no option, because {option.flag} takes a value.")
        return option, True

    def read(self) -> dict[str, Any]:
        """Field to its value, for those that were given."""
        given, loose = tyro.cli(
            _tyro_type(self.words),
            args=self.tokens,
            prog=self.words.prog,
            add_help=False,
            console_outputs=False,
            return_unknown_args=True,
        )
        for option in self.words.options.values():
            if option.positional and loose and option.name not in given:
                taken = len(loose) if option.is_list else 1
                given[option.name], loose = loose[:taken], loose[taken:]
        if loose:
            raise UserError(
                f"Unexpected value {loose[0]!r}: an option's name begins with --, and only a list "
                "takes more than one value."
            )
        known = {**self.words.options, **self.words.own}
        return {
            name: value
            if isinstance(value, bool)
            else _read(known[name], value, self.typed.get(name, name))
            for name, value in given.items()
        }


def _read(option: Option, given: Sequence[str], typed: str) -> Any:
    try:
        return option.read(given)
    except MismatchError as error:
        raise UserError(f"{typed}: {error}") from None


# --- Putting the layers together --------------------------------------------------------------


def _preset_values(name: str, words: Vocabulary) -> dict[str, Any]:
    if name not in words.presets:
        hint = did_you_mean(name, words.presets)
        raise UserError(f"No preset {name!r}: choose {', '.join(words.presets)}{hint or '.'}")
    unknown = [key for key in words.presets[name] if key not in words.options]
    if unknown:
        raise ValueError(f"preset {name} sets {unknown[0]}, which {words.prog} does not have")
    return {key: words.options[key].convert(v) for key, v in words.presets[name].items()}


def _merge(
    given: Mapping[str, Any], words: Vocabulary
) -> tuple[dict[str, Any], dict[str, str], str | None]:
    """Values, their origins, and the preset in force."""
    file = given.get("config")
    in_file = read_yaml(file, words) if file is not None else {}
    layers: list[dict[str, tuple[Any, str]]] = [
        {n: (o.default, "built-in") for n, o in words.options.items() if not o.required},
        {n: (item.value, f"{file}:{item.line}") for n, item in in_file.items()},
        {n: (value, "flag") for n, value in given.items()},
    ]
    named = [layer["preset"][0] for layer in layers if words.presets and "preset" in layer]
    preset = named[-1] if named else None
    if preset is not None:
        values = _preset_values(preset, words)
        layers.insert(1, {n: (value, f"preset {preset}") for n, value in values.items()})
    found = {name: pair for layer in layers for name, pair in layer.items()}
    order = [name for name in words.options if name in found]
    return {n: found[n][0] for n in order}, {n: found[n][1] for n in order}, preset


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
    words = vocabulary(
        config_class, prog=prog, description=description, aliases=aliases, presets=presets
    )
    _help({token.replace("_", "-") for token in argv}, words)
    given = _CommandLine(argv, words).read()
    values, origins, preset = _merge(given, words)
    missing = [o.flag for n, o in words.options.items() if n not in values]
    if missing:
        raise UserError(f"Missing {', '.join(missing)}. See {prog} --help.")
    try:
        config = config_class(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    if given.get("print_config"):
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


def _help(asked: set[str], words: Vocabulary) -> None:
    """Ends the command with its help, if that was asked for: ours on a screen, tyro's in full."""
    if "--help-all" in asked:
        description = " ".join(words.description.split())
        tyro.cli(_tyro_type(words), args=["--help"], prog=usage(words), description=description)
    if asked & {"-h", "--help"}:
        print(help_screen(words), flush=True)
        raise SystemExit(0)


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
