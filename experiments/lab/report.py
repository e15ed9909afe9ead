"""A run's folder as one page: what was asked, what came out, and every number behind it.

The page is rebuilt from files alone (`summary.json` and the arms' folders), so it can be made again
without training, and the same files give the same bytes: no clock, no script, nothing fetched.
Every sentence and word about results is computed from the summary; none is written by hand.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from experiments.lab.expert_figures import EXPERIMENT as EXPERT_USE
from experiments.lab.expert_figures import expert_figures
from experiments.lab.figures import ReportFigure, build_figures
from experiments.lab.plots import in_order, label, numbers
from experiments.lab.runfiles import Row, RunFiles, read_run
from experiments.lab.tables import (
    METRICS,
    Table,
    baseline,
    claims_table,
    comparisons_table,
    count,
    main_table,
    metrics_of,
    metrics_table,
    reward_model_table,
    routing_table,
    seed_at,
    seeds_table,
    sentences,
    show,
    table_markdown,
)
from sft.alarms import PREFIX
from sft.run import write_text_atomic

MAX_SAMPLES = 5  # per arm; the rest is in samples.jsonl
MAX_TEXT = 1500  # characters of one prompt or completion
MAX_CONFIG = 20_000

STYLE = """
:root { --ground: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #5b6570; --line: #dcdfe3;
  --accent: #005a8f; --good: #00664a; --bad: #a33f00; --calm: #005a8f; --open: #5b6570;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ground: #16191d; --card: #1e2227; --ink: #e6e8eb;
  --soft: #a3acb6; --line: #363c44; --accent: #6cc0f5; --good: #4fd1a5; --bad: #ff9d5c;
  --calm: #6cc0f5; --open: #a3acb6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC",
  "Microsoft YaHei", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .7rem; padding-top: .5rem;
  border-top: 1px solid var(--line); }
p { margin: .5rem 0; }
.soft, figcaption { color: var(--soft); font-size: .875rem; }
.banner { border-left: 4px solid var(--bad); padding: .4rem .8rem; background: var(--card); }
ul.answer { list-style: none; margin: .6rem 0; padding: 0; }
ul.answer li { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; margin: .45rem 0; font-size: 1.05rem; }
.word { font-weight: 650; white-space: nowrap; }
.BETTER, .REPRODUCED { color: var(--good); }
.WORSE, .NOT, .DEGENERATE { color: var(--bad); }
.EQUIVALENT { color: var(--calm); } .UNRESOLVED, .INCONCLUSIVE { color: var(--open); }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
.prose td { white-space: normal; min-width: 8rem; }
.wrap .word { display: block; font-size: .72rem; } .wrap .UNRESOLVED { font-weight: 400; }
th.name, td.name { text-align: left; }
figure { margin: .9rem 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: 10px;
  overflow-x: auto; }
.card svg { display: block; width: 100%; height: auto; }
section > figure .card svg { min-width: 34rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr));
  gap: 0 16px; align-items: start; }
figcaption { margin-top: .4rem; }
details { margin: .35rem 0; } summary { cursor: pointer; color: var(--accent);
  font-size: .875rem; }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; margin: .6rem 0; }
.sample .pair { display: grid; gap: .4rem 1.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 280px), 1fr)); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; }
code { overflow-wrap: anywhere; }
pre code { white-space: pre-wrap; }
""".strip()

# With no script on the page this changes nothing, unless a text slips through unescaped.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(run_folder: Path) -> Path:
    """Writes `report.html` into the run's folder, from its files alone; gives its path.

    Raises:
        UserError: if the folder is not a run with a summary, or a file in it is broken.
    """
    run = read_run(Path(run_folder))
    path = run.folder / "report.html"
    write_text_atomic(path, page(run, _drawn(run)))
    return path


def write_all(run_folder: Path) -> list[Path]:
    """Writes `report.html`, `table.md` and `figures/*.svg|png`; gives the paths.

    An experiment without arms has a table of its own kind, so its `table.md` is left as it is.

    Raises:
        UserError: as `write_report`.
    """
    run = read_run(Path(run_folder))
    folder = run.folder / "figures"
    folder.mkdir(exist_ok=True)
    figures = _drawn(run, png_folder=folder)
    written = [run.folder / "report.html"]
    write_text_atomic(written[0], page(run, figures))
    if run.summary.get("arms") or not (run.folder / "table.md").exists():
        written.append(run.folder / "table.md")
        write_text_atomic(written[-1], table_markdown(run.summary))
    for figure in figures:
        write_text_atomic(folder / f"{figure.name}.svg", figure.svg)
        written += [folder / f"{figure.name}.svg", folder / f"{figure.name}.png"]
    return written


def _drawn(run: RunFiles, *, png_folder: Path | None = None) -> list[ReportFigure]:
    # A look at one model has no arms and seeds, so its figures are of another kind.
    looks = run.summary.get("experiment") == EXPERT_USE
    return (expert_figures if looks else build_figures)(run, png_folder=png_folder)


def page(run: RunFiles, figures: Sequence[ReportFigure]) -> str:
    """The whole page; sections without material are left out."""
    title = str(run.summary.get("question") or run.summary.get("experiment") or run.folder.name)
    sections = [
        _asked(run),
        _answer(run, figures),
        _section("Learning curves", _figures(figures, "Learning curves", grid=True), _BANDS),
        _reward_model(run),
        _section("Reward against KL", _figures(figures, "Reward against KL")),
        _section("Experts", _figures(figures, "Experts") + _routing(run)),
        _section("Routing drift", _figures(figures, "Routing drift")),
        _samples(run),
        _section("Minutes per stage", _figures(figures, "Minutes per stage")),
        _notes(run),
        _rerun(run),
        _section("Limits", _list(limits(run))),
    ]
    body = "\n".join(section for section in sections if section)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_e(title)}</title>\n<style>\n{STYLE}\n</style>\n</head>\n"
        f"<body>\n<main>\n<header>\n<h1>{_e(title)}</h1>\n</header>\n{body}\n</main>\n</body>\n"
        "</html>\n"
    )


_BANDS = "Lines: mean over seeds. Bands: from the lowest to the highest seed."


def _e(value: object) -> str:
    return html.escape(str(value), quote=True)


def _word(word: object) -> str:
    known = "UNRESOLVED" if word == "NOT DISTINGUISHED" else str(word)  # no bad news
    first = re.sub(r"[^A-Z]", "", known.split(" ")[0])
    return f'<span class="word {first}">{_e(word)}</span>'


def _with_words(text: str) -> str:
    verdicts = "NOT REPRODUCED|REPRODUCED|INCONCLUSIVE|NOT DISTINGUISHED|MOVED"
    words = rf"\b({verdicts}|BETTER|WORSE|EQUIVALENT|UNRESOLVED|DEGENERATE)\b"
    return re.sub(words, lambda found: _word(found.group()), _e(text))


def _section(title: str, body: str, note: str = "") -> str:
    if not body:
        return ""
    told = f'\n<p class="soft">{_e(note)}</p>' if note else ""
    return f"<section>\n<h2>{_e(title)}</h2>{told}\n{body}\n</section>"


def _list(items: Iterable[object]) -> str:
    lines = "\n".join(f"<li>{_e(item)}</li>" for item in items)
    return f"<ul>\n{lines}\n</ul>" if lines else ""


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        parts = []
        for i, cell in enumerate(cells):
            name = ' class="name"' if i < table.num_names else ""
            scope = ' scope="col"' if tag == "th" else ""
            text = _with_words(cell) if tag == "td" and i else _e(cell)
            parts.append(f"<{tag}{name}{scope}>{text}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(row(cells, "td") for cells in table.rows)
    head = row(table.header, "th")
    return (
        f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_e(title)}</summary>\n{body}\n</details>"


def _figures(figures: Iterable[ReportFigure], section: str, *, grid: bool = False) -> str:
    parts = [_figure(figure) for figure in figures if figure.section == section]
    body = "\n".join(parts)
    return f'<div class="grid">\n{body}\n</div>' if grid and parts else body


def _figure(figure: ReportFigure) -> str:
    svg = figure.svg.replace("<svg ", f'<svg role="img" aria-label="{_e(figure.alt)}" ', 1)
    caption = f"<figcaption>{_e(figure.caption)}</figcaption>\n" if figure.caption else ""
    numbers_ = _details("The numbers", _table(figure.table))
    return f'<figure>\n<div class="card">{svg}</div>\n{caption}{numbers_}\n</figure>'


def _asked(run: RunFiles) -> str:
    summary = run.summary
    arms = ", ".join(label(arm) for arm in in_order(summary.get("arms", {})))
    seeds = summary.get("seeds") or ()
    verdict = summary.get("verdict") or {}
    lines = [
        ("Experiment", summary.get("experiment")),
        ("Run", run.folder.name),
        ("Arms", arms),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Rule, fixed before the run", verdict.get("rule")),
        ("Threshold", _plain(verdict.get("threshold"))),
    ]
    shown = "\n".join(
        f"<li>{_e(name)}: {_e(value)}</li>" for name, value in lines if value not in (None, "")
    )
    status = str(summary.get("status") or "done")
    banner = f'<p class="banner">This run is not complete: {_e(status)}.</p>\n'
    body = f"{'' if status == 'done' else banner}<ul>\n{shown}\n</ul>"
    return _section("What was asked", body)


def _plain(value: object) -> object:
    """A chosen number as it was chosen: 0.05 stays 0.05, and 0.0 is 0."""
    found = numbers([value])
    return f"{found[0]:g}" if found else value


def _answer(run: RunFiles, figures: Sequence[ReportFigure]) -> str:
    summary = run.summary
    answer = "\n".join(f"<li>{_with_words(text)}</li>" for text in sentences(summary))
    parts = [f'<ul class="answer">\n{answer}\n</ul>']
    verdict = summary.get("verdict") or {}
    if verdict.get("word") and summary.get("comparisons"):  # else the sentence says it
        parts.append(f"<p>Verdict: {_word(verdict['word'])}</p>")
    if summary.get("arms"):
        parts.append(_table(main_table(summary)))
        parts.append(_figures(figures, "Answer"))
        other = metrics_table(summary)
        if other.rows:
            base = baseline(summary)
            note = f"Words compare with {label(base)}, paired by seed." if base else ""
            parts.append(f'<p class="soft">Other metrics, mean over seeds. {_e(note)}</p>')
            parts.append(f'<div class="wrap">{_table(other)}</div>')
        parts.append(_details("Every value, seed by seed", _table(seeds_table(summary))))
    if summary.get("comparisons"):
        parts.append(_details("Every comparison", _table(comparisons_table(summary))))
    if summary.get("claims"):
        parts.append(f'<div class="prose">{_table(claims_table(summary))}</div>')
    return _section("Answer", "\n".join(part for part in parts if part))


def _reward_model(run: RunFiles) -> str:
    table = reward_model_table(run.summary)
    return _section("Reward model", _table(table)) if table else ""


def _routing(run: RunFiles) -> str:
    table = routing_table(run.summary)
    if table is None:
        return ""
    note = '\n<p class="soft">Mean over layers and seeds.</p>\n'
    return note + _table(table)


def _samples(run: RunFiles) -> str:
    parts = []
    for arm, seeds in run.samples.items():
        for seed, rows in seeds.items():
            if not rows:
                continue
            shown = "\n".join(_sample(row) for row in rows[:MAX_SAMPLES])
            told = f"the first {min(len(rows), MAX_SAMPLES)} of {count(len(rows), 'prompt')}"
            parts.append(_details(f"{label(arm)}, seed {seed}: {told}", shown))
            break  # one seed per arm; the files have the others
    note = "The first prompts of the file, not chosen by result; all are in samples.jsonl."
    return _section("Samples before and after", "\n".join(parts), note)


def _sample(row: Row) -> str:
    sides = []
    for side in ("before", "after"):
        gold = row.get(f"gold_{side}")
        reward = f" (gold {show(gold)})" if gold is not None else ""
        text = f'<div class="text">{_e(_cut(row.get(side)))}</div>'
        sides.append(f'<div><span class="soft">{side}{_e(reward)}</span>\n{text}</div>')
    return (
        f'<div class="sample">\n<div class="soft">prompt</div>\n'
        f'<div class="text">{_e(_cut(row.get("prompt")))}</div>\n'
        f'<div class="pair">\n{"".join(sides)}\n</div>\n</div>'
    )


def _cut(value: object, most: int = MAX_TEXT) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    if len(text) <= most:
        return text
    return f"{text[:most]} ... ({len(text) - most:,} more characters in the file)"


def _notes(run: RunFiles) -> str:
    return _section("Notes", _list([*(run.summary.get("notes") or ()), *run.notes, *_alarms(run)]))


def _alarms(run: RunFiles) -> list[str]:
    """What rang in whose training; a metric `alarm/NAME` is logged from its first ring on."""
    first: dict[tuple[str, int, str, str], int] = {}
    for arm, seeds in run.metrics.items():
        for seed, rows in seeds.items():
            for row in rows:
                if row["name"].startswith(PREFIX):
                    name = row["name"].removeprefix(PREFIX)
                    first.setdefault((arm, seed, row["stage"], name), row["step"])
    return [
        f"Alarm {name} in {label(arm)}, seed {seed}, stage {stage}, at step {step}."
        for (arm, seed, stage, name), step in first.items()
    ]


def _rerun(run: RunFiles) -> str:
    summary, environment = run.summary, dict(run.environment)
    command = environment.pop("command", None)
    if isinstance(command, list | tuple):
        command = " ".join(map(str, command))
    again = f"python -m experiments.{summary.get('experiment')} --config config.yaml"
    facts = {
        "commit": summary.get("commit"),
        "configuration": summary.get("config_hash"),
        **environment,
    }
    rows = tuple(
        (str(key), ", ".join(f"{k} {v}" for k, v in value.items()))
        if isinstance(value, Mapping)
        else (str(key), str(value))
        for key, value in facts.items()
        if value not in (None, "")
    )
    parts = [f"<pre><code>{_e(command or again)}</code></pre>"]
    if command:
        parts.append(f'<p class="soft">Again from its own file: <code>{_e(again)}</code></p>')
    if run.config:
        body = f"<pre>{_e(_cut(run.config, MAX_CONFIG))}</pre>"
        parts.append(_details("Configuration (config.yaml)", body))
    if rows:
        lines = "\n".join(f"<li>{_e(key)}: {_e(value)}</li>" for key, value in rows)
        parts.append(_details("Environment", f"<ul>\n{lines}\n</ul>"))
    return _section("How to run it again", "\n".join(parts))


def limits(run: RunFiles) -> list[str]:
    """What the numbers cannot carry, computed from the run."""
    summary = run.summary
    seeds = summary.get("seeds") or ()
    found = []
    if seeds and len(seeds) < 3:
        found.append(f"{count(len(seeds), 'seed')}: no interval and no word below three.")
    elif seeds and len(seeds) < 5:
        found.append(
            f"{len(seeds)} seeds: intervals this short of data are wide, and rest on differences "
            "being roughly normal; five or more seeds say much more."
        )
    if rows := [row for row in summary.get("comparisons") or () if row.get("interval95")]:
        found.append(
            f"{count(len(rows), 'comparison')}, each at 95 % on its own: if nothing differed, "
            f"about {show(len(rows) / 20)} would still exclude zero."
        )
    for arm in in_order(summary.get("arms", {})):
        for metric, values in summary["arms"][arm].items():
            gone = [str(seed_at(summary, i)) for i, v in enumerate(values) if not numbers([v])]
            if gone and len(gone) < len(values):
                found.append(
                    f"{label(arm)} has no {METRICS.get(metric, metric)} for seed "
                    f"{', '.join(gone)}: left out in pairs, which flatters an arm that fails."
                )
    if "gold_reward" in metrics_of(summary):
        found.append(
            "Gold reward is a rule that this world was built with; no person judged the texts."
        )
    if summary.get("arms"):
        found.append("The models are small: what holds here need not hold at another size.")
    return found
