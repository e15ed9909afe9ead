"""What a run left in its folder, read back: the summary, the arms' logs and samples, the settings.

This is the only reader that the report has, and it forgives one thing alone: a log whose last line
breaks off, as an interrupted run leaves it. Anything else that is broken is an error naming it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.lab.plots import in_order
from moe.errors import UserError

SCHEMA = 1

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunFiles:
    """What a run left: texts are "" and mappings empty where it left nothing."""

    folder: Path
    summary: Summary
    metrics: Mapping[str, Mapping[int, Sequence[Row]]]
    samples: Mapping[str, Mapping[int, Sequence[Row]]]
    config: str
    environment: Mapping[str, Any]
    notes: tuple[str, ...]


def commit_of(folder: Path) -> str | None:
    """The commit that a run was started at; None outside a repository."""
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    commit: str | None = environment.get("commit")
    return commit


def read_run(folder: Path) -> RunFiles:
    """Reads a run's folder.

    Raises:
        UserError: if it is no run with a summary, or a file in it is broken. A last line without
            its end, as an interrupted run leaves it, is left out and mentioned in `notes`.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    metrics: dict[str, dict[int, list[Row]]] = {}
    samples: dict[str, dict[int, list[Row]]] = {}
    notes: list[str] = []
    for path in sorted(folder.glob("*-s*")):
        found = re.fullmatch(r"(.+)-s(\d+)", path.name)
        if not found or not path.is_dir():
            continue
        arm, seed = found.group(1), int(found.group(2))
        for name, target in (("metrics.jsonl", metrics), ("samples.jsonl", samples)):
            if (path / name).is_file():
                target.setdefault(arm, {})[seed] = _read_jsonl(path / name, notes)
    environment = folder / "environment.json"
    config = folder / "config.yaml"
    return RunFiles(
        folder=folder,
        summary=summary,
        metrics={arm: dict(sorted(metrics[arm].items())) for arm in in_order(metrics)},
        samples={arm: dict(sorted(samples[arm].items())) for arm in in_order(samples)},
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=_read_json(environment) if environment.is_file() else {},
        notes=tuple(notes),
    )


def read_summary(folder: Path) -> Summary:
    """The run's `summary.json`.

    Raises:
        UserError: if there is none, or it is of another schema.
    """
    path = Path(folder) / "summary.json"
    if not path.is_file():
        raise UserError(_no_summary(Path(folder)))
    summary = _read_json(path)
    if summary.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema {summary.get('schema')!r}; this version reads schema {SCHEMA}."
        )
    return summary


def _no_summary(folder: Path) -> str:
    if not folder.exists():
        return f"No folder {folder}; give the folder of a run, which holds a summary.json."
    if not folder.is_dir():
        return f"{folder} is a file; give the folder of a run, which holds a summary.json."
    inside = sorted(path.parent.name for path in folder.glob("*/summary.json"))
    if inside:
        more = ", ..." if len(inside) > 3 else ""
        return f"{folder} is not a run but holds runs: give {', '.join(inside[:3])}{more} in it."
    return f"{folder} has no summary.json: the run has not finished, or this is not a run."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = _parse_json(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object belongs.")
    return value


def _parse_json(text: str) -> Any:
    """JSON without lone surrogates: a model cut off inside an emoji writes them, UTF-8 has none."""
    value = json.loads(text)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        whole = json.dumps(value, ensure_ascii=False)
        value = json.loads(whole.encode("utf-8", errors="replace"))
    return value


def _read_jsonl(path: Path, notes: list[str]) -> list[Row]:
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _parse_json(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                notes.append(
                    f"{path.parent.name}/{path.name}: line {number} breaks off (the run was "
                    "interrupted there) and is left out."
                )
                continue
            raise UserError(f"{path} line {number} is not valid JSON: {error}.") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not an object.")
        rows.append(row)
    return rows
