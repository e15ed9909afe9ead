"""The --help of a command on one screen, whatever the number of its options.

Decision to know: tyro's own help takes two lines an option or more, which suits --help-all; here an
option has one line, and options share the line in two columns when there are many.
"""

import shutil
import textwrap
from collections.abc import Sequence

from sft.vocabulary import Option, Vocabulary

_LINES = 40


def help_screen(words: Vocabulary) -> str:
    """At most 40 lines, as wide as the terminal (80 to 120 columns)."""
    width = min(max(shutil.get_terminal_size((100, 40)).columns, 80), 120)
    options = list(words.options.values())
    head = [f"usage: {usage(words)} [--option value ...]", ""]
    head += [*textwrap.wrap(" ".join(words.description.split()), width)[:3], ""]
    foot = [
        "",
        "--config FILE.yaml sets options from a file; --print-config shows where each is set.",
        "- and _ are equal, lists by space; --help-all shows every text in full, and aliases.",
    ]
    if words.presets:
        foot.insert(1, _clip(f"--preset NAME is one of: {', '.join(words.presets)}.", width))
    return "\n".join(head + _body(options, _LINES - len(head) - len(foot), width) + foot)


def usage(words: Vocabulary) -> str:
    """The command with the values that need no flag."""
    names = (item.name.upper() for item in words.options.values() if item.positional)
    return " ".join([words.prog, *names])


def _body(options: Sequence[Option], room: int, width: int) -> list[str]:
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


def _rows(options: Sequence[Option], width: int) -> list[str]:
    """One line an option: flag, default, help; clipped to the width."""
    flag_width = max(len(_flag_text(item)) for item in options)
    default_width = min(max(len(item.default_text) for item in options), max(width // 6, 8))
    rest = width - flag_width - default_width - 4
    return [
        f"{_flag_text(item):<{flag_width}}  "
        f"{_clip(item.default_text, default_width):<{default_width}}  "
        f"{_clip(_help_text(item), rest) if rest > 5 else ''}".rstrip()
        for item in options
    ]


def _flag_text(option: Option) -> str:
    if option.positional:
        return option.name.upper()
    return option.flag.replace("--", "--[no-]", 1) if option.is_switch else option.flag


def _help_text(option: Option) -> str:
    choices = option.constructor.choices
    return " ".join(filter(None, [f"({'|'.join(choices)})" if choices else "", option.help]))


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 2, 0)].rstrip() + ".."
