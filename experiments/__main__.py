"""`python -m experiments`: the questions that can be asked; `--index` lists the answers so far.

The list is read from the docstrings of the experiments' files, which must name Question, Published,
Arms, Cost and Verdict rule; a test holds them to it.
"""

import ast
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.flags import main_guard, parse
from sft.run import write_text_atomic

HERE = Path(__file__).parent
# Files here that are commands about runs, not questions.
TOOLS = ("__init__", "__main__", "report")
FIELDS = ("Question", "Published", "Arms", "Cost", "Verdict rule")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options of the listing."""

    index: bool = field(
        default=False, metadata={"help": "write results/README.md from the committed summaries"}
    )


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An experiment as its docstring describes it."""

    name: str
    title: str
    parts: dict[str, str]


def experiments() -> list[Entry]:
    """Every experiment of this folder, in the order of their names."""
    return [describe(path) for path in sorted(HERE.glob("*.py")) if path.stem not in TOOLS]


def describe(path: Path) -> Entry:
    """Title and named parts of a module's docstring; the module is not imported."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    title, _, rest = text.partition("\n\n")
    found = re.split(rf"^({'|'.join(FIELDS)})[^:\n]*:\s*", rest, flags=re.MULTILINE)
    parts = {
        name: " ".join(body.split()) for name, body in zip(found[1::2], found[2::2], strict=True)
    }
    return Entry(name=path.stem, title=" ".join(title.split()), parts=parts)


def listing(entries: Sequence[Entry]) -> str:
    lines = ["python -m experiments.NAME --help shows an experiment's options.", ""]
    for entry in entries:
        lines += [f"{entry.name}", f"    {entry.title}", f"    Cost: {entry.parts['Cost']}", ""]
    return "\n".join(lines).rstrip()


def finished_runs(results: Path) -> list[tuple[Path, dict[str, Any]]]:
    """(folder, summary) of every run under `results` that has a finished summary, by path."""
    found = []
    for path in sorted(results.glob("*/*/summary.json")):
        if path.parent.is_symlink():
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary.get("status") == "done" and "verdict" in summary:
            found.append((path.parent, summary))
    return found


def index(results: Path) -> str:
    """results/README.md: one row a finished run, all of it read from the summaries."""
    lines = [
        "# Findings",
        "",
        "Written by `python -m experiments --index` from the runs' own `summary.json`.",
        "",
        "| run | question | seeds | verdict | rule |",
        "|---|---|---|---|---|",
    ]
    for folder, summary in finished_runs(results):
        link = folder.relative_to(results).as_posix()
        verdict = summary["verdict"]
        seeds = len(summary.get("seeds", [])) or "-"
        cells = [f"[{link}]({link}/)", summary["question"], seeds, verdict["word"], verdict["rule"]]
        lines.append("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines) + "\n"


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parsed = parse(
        Config, arguments, prog="python -m experiments", description="List the experiments."
    )
    if parsed.config.index:
        results = Path("results")
        write_text_atomic(results / "README.md", index(results))
        print(results / "README.md")
    else:
        print(listing(experiments()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
