"""What a folder of trials or of a run was begun with, and the sentence when that is something else.

The decision to know: what is compared is plain data in a file of the folder, not its hash, so that
the sentence names what differs. Nothing here imports torch.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.errors import UserError
from sft.run import plain, write_json_atomic

TRIALS = "options.json"
SETTINGS = "settings.json"
NO_TRIALS = ("tuning.json", "README.md")  # what trials ended with is written anew from them
MAX_NAMED = 3


def claim_trials(folder: Path, asked: Mapping[str, Any]) -> None:
    """The folder of a tuning, begun with this or empty; trials of two kinds would be mixed up.

    Raises:
        UserError: if what lies there was begun with something else, or does not say with what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TRIALS
    if path.is_file():
        differ = named_differences(_held(path), asked, here="there")
        if differ:
            raise UserError(
                f"{folder} holds trials of other options ({differ}): give another --out."
            )
        return
    others = sorted(item.name for item in folder.iterdir() if item.name not in NO_TRIALS)
    if others:
        raise UserError(
            f"{folder} holds {others[0]} but no {TRIALS}, which says what its trials were begun "
            "with: give another --out."
        )
    write_json_atomic(path, asked)


def keep_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """A new run's settings beside its options; a run without settings keeps none."""
    if settings:
        write_json_atomic(folder / SETTINGS, settings)


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the run was begun with other settings than the code has now."""
    path = folder / SETTINGS
    held = _held(path) if path.is_file() else {}
    if differ := named_differences(held, settings, here="in the run"):
        raise UserError(
            f"Cannot resume {folder}: the experiment's own settings differ ({differ}). Take the "
            "code that the run was begun with, or start a new run."
        )


def named_differences(held: Mapping[str, Any], asked: Mapping[str, Any], *, here: str) -> str:
    """`rates.moe 0.003 there, 0.006 now`, for the first of what differs; empty if nothing does.

    here: what is said of the values in `held`.
    """
    old, new = dict(_leaves(plain(held))), dict(_leaves(plain(asked)))
    differ = [
        f"{name} {_said(old, name)} {here}, {_said(new, name)} now"
        for name in dict.fromkeys([*old, *new])
        if name not in old or name not in new or old[name] != new[name]
    ]
    more = f"; {len(differ) - MAX_NAMED} more" if len(differ) > MAX_NAMED else ""
    return "; ".join(differ[:MAX_NAMED]) + more


def _held(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(held, dict):
        raise UserError(f"{path} must hold names and values, not {type(held).__name__}.")
    return held


def _leaves(tree: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{where}.{key}" if where else key
        if isinstance(value, dict) and value:
            yield from _leaves(value, name)
        else:
            yield name, value


def _said(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    value = values[name]
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
