"""Rebuilds a run's report, table and figures from its files: `python -m experiments.report DIR...`

Nothing is trained and no model is loaded, so this is how a report follows when its layout changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sft.flags import main_guard, parse


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is asked for."""

    runs: tuple[Path, ...] = field(
        metadata={"positional": True, "help": "folders of runs, each with a summary.json"}
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Writes report.html, table.md and figures/ into each folder; 2 if one is not a run."""
    config = parse(
        Config,
        argv,
        prog="python -m experiments.report",
        description="Rebuild report.html, table.md and figures/ of runs from their files.",
    ).config
    from experiments.lab.report import write_all
    from experiments.lab.runfiles import read_summary

    for folder in config.runs:
        read_summary(folder)  # a mistyped folder stops the command before anything is written
    for folder in config.runs:
        print(write_all(folder)[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
