"""How a run of any experiment ends, and how a stopped one takes up its own options again.

The decision to know: what is printed, drawn and mirrored at the end is read from `summary.json`
alone, so every experiment ends alike and `experiments.report` can make all of it again.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sft.run import Run
from sft.tracking import Tracker

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def end_run(
    folder: Path,
    summary: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    mirror: Literal["wandb", "none"] = "none",
) -> None:
    """Table, figures and report into the folder, the verdict to the mirror, the last lines."""
    from experiments.lab.report import write_all

    with Tracker(
        folder / "report",
        group=summary["experiment"],
        job_type="report",
        name="verdict",
        config=dict(config),
        mirror=mirror,
        console=None,
    ) as tracker:
        tracker.summary({"verdict": summary["verdict"]["word"], "rule": summary["verdict"]["rule"]})
        sync = tracker.sync_command
    path = write_all(folder)[0]
    show(summary)
    print(f"\nreport  {path}")
    if sync:
        print(f"W&B     {sync.rsplit('/report/', 1)[0]}/*/wandb/offline-run-*   (offline copy)")


def show(summary: Mapping[str, Any]) -> None:
    """The table of a summary on the console; what it means, once the run is done."""
    from rich.console import Console

    from experiments.lab.tables import console_table, sentences

    console = Console(width=None if sys.stdout.isatty() else 140)
    done = summary["status"] == "done"
    if not done:
        console.print(f"\nfirst table, seed {summary['seeds'][0]} alone")
    console.print(console_table(summary))
    if done:
        for sentence in (*sentences(summary), *summary.get("world", {}).get("sentences", ())):
            console.print(sentence)
        for claim in summary.get("claims", ()):
            console.print(f"{claim['verdict']}: {claim['claim']}")
        console.print(f"verdict: {summary['verdict']['word']}")


def as_stored(
    config: ConfigT,
    resume: Path,
    *,
    given: Collection[str],
    except_for: Collection[str] = (),
    paths: Collection[str] = (),
) -> ConfigT:
    """`--resume RUN` takes the run's own options; `Run.open` refuses what is given against them.

    except_for: options that are of the start, not of the run; paths: those that name files.
    """
    stored = Run.open(resume).config
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in stored.items()
        if name not in given and name not in except_for
    }
    for name in paths:
        if values.get(name) is not None:
            values[name] = Path(values[name])
    return replace(config, **values)
