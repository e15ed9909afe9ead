"""A run's folder as one page: what was asked, what came out, and every number behind it.

The page is rebuilt from files alone (`summary.json` and the arms' folders), so it can be made again
without training, and the same files give the same bytes: no clock, no script, nothing fetched.
Every sentence and word about results is computed here from the summary; none is written by hand.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.lab import plots
from experiments.lab.plots import in_order, label, mean, numbers
from experiments.lab.verdict import paired_interval
from moe.errors import UserError
from sft.run import write_text_atomic

if TYPE_CHECKING:
    from rich.table import Table as RichTable

SCHEMA = 1
MAX_SAMPLES = 5  # per arm; the rest is in samples.jsonl
MAX_TEXT = 1500  # characters of one prompt or completion
MAX_CONFIG = 20_000
MAX_TABLE_STEPS = 11
MAX_TABLE_CELLS = 4000
CURVES_PER_STAGE = 4

METRICS = {
    "gold_reward": "gold reward",
    "proxy_reward": "proxy reward",
    "kl_sequence": "KL (nats / sequence)",
    "win_rate": "win rate",
    "length": "length (tokens)",
    "ended": "share that ends",
    "distinct_2": "distinct-2",
    "reference_perplexity": "reference perplexity",
    "base_perplexity": "base perplexity",
    "tokens_generated": "tokens generated",
    "tokens_trained": "tokens trained",
    "seconds": "seconds",
    "peak_mib": "peak MiB",
}
ROUTING = {
    "load_entropy": "load entropy (1: even)",
    "max_vio": "MaxVio (0: even)",
    "max_vio_floor": "MaxVio by chance",
    "dead_experts": "dead experts per layer",
    "dropped_share": "dropped share",
    "jaccard_from_sft": "Jaccard with SFT (1: same)",
    "jsd_from_sft": "JS divergence from SFT (bits)",
}
DRIFT = {
    "jaccard_from_sft": "Jaccard with SFT (1: same)",
    "jsd_from_sft": "JS divergence from SFT (0: same)",
}
# One curve for each kind of metric, in this order, so that one stage's many losses leave room.
CURVES = (
    r"^reward/score$",
    r"^(train|eval|val)?/?loss$",
    r"accuracy$",
    r"kl(_sequence)?$",
    r"max_vio$",
    r"loss",
    r"reward",
)
ANSWERED_FIRST = ("dpo", "ppo", "best_of_n", "sft", "few_shot", "base")

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first `num_names` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A drawn figure, what it says in words, and its numbers.

    `section` is the heading it stands under, `name` its file name without ending.
    """

    section: str
    name: str
    alt: str
    caption: str
    svg: str
    table: Table


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


# --- Reading ----------------------------------------------------------------------------------


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


# --- Words and numbers ------------------------------------------------------------------------


def show(value: object, *, signed: bool = False) -> str:
    """A number for a reader: at least two digits that count; "-" for a missing one."""
    found = numbers([value]) if not isinstance(value, bool) else []
    if not found:
        return "-"
    number = found[0]
    if number == 0:
        return "0"
    sign = "+" if signed and number > 0 else ""
    if abs(number) < 1e-4:
        return f"{sign}{number:.1e}"
    if number.is_integer() and not signed:
        return f"{number:,.0f}"
    return f"{sign}{number:,.{_decimals(number)}f}"


def _decimals(number: float) -> int:
    size = abs(number)
    if 0 < size < 0.0995:
        return 1 - math.floor(math.log10(size))
    return 0 if size >= 99.95 else 1 if size >= 9.995 else 2


def show_interval(interval: Sequence[float] | None) -> str:
    """Both ends with the decimals of the finer one."""
    if not interval:
        return "no interval"
    decimals = min(max(_decimals(end) for end in interval), 4)
    return f"[{interval[0]:,.{decimals}f}, {interval[1]:,.{decimals}f}]"


def count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def metrics_of(summary: Summary) -> list[str]:
    """Metrics of the arms: the known ones in a fixed order, then the others as they come."""
    found = list(dict.fromkeys(m for arm in summary.get("arms", {}).values() for m in arm))
    return [name for name in METRICS if name in found] + [n for n in found if n not in METRICS]


def main_metric(summary: Summary) -> str | None:
    """What the run is about: the verdict's metric, gold reward, or what is compared first."""
    metrics = metrics_of(summary)
    compared = [row["metric"] for row in summary.get("comparisons") or ()]
    asked = [(summary.get("verdict") or {}).get("metric"), "gold_reward"]
    return next((m for m in [*asked, *compared, *metrics] if m in {*metrics, *compared}), None)


def baseline(summary: Summary) -> str | None:
    """The arm that most comparisons are against."""
    against = Counter(row["against"] for row in summary.get("comparisons") or ())
    return against.most_common(1)[0][0] if against else None


def comparison(summary: Summary, arm: str, metric: str) -> Row | None:
    """The comparison of an arm with the baseline, if it was made."""
    rows = summary.get("comparisons") or ()
    wanted = (arm, baseline(summary), metric)
    return next((r for r in rows if (r["arm"], r["against"], r["metric"]) == wanted), None)


def sentences(summary: Summary) -> list[str]:
    """Up to three sentences that answer the question, from the main metric's comparisons."""
    metric, base = main_metric(summary), baseline(summary)
    rows = [row for row in summary.get("comparisons") or () if row["metric"] == metric]
    known = {arm: place for place, arm in enumerate(ANSWERED_FIRST)}
    rows.sort(key=lambda row: (row["against"] != base, known.get(row["arm"], -1)))
    if rows:
        return [_sentence(row) for row in rows[:3]]
    verdict = summary.get("verdict") or {}
    if verdict.get("word"):
        return [f"The verdict is {verdict['word']}."]
    return ["Nothing was compared."]


def _sentence(row: Row) -> str:
    arm, against = label(row["arm"]), label(row["against"])
    if not row["n"]:
        return f"{arm} cannot be compared with {against} in {row['metric']}: no seed has both."
    found = show(row["mean_difference"], signed=True)
    interval = row.get("interval95")
    found += f" {show_interval(interval)}" if interval else ", no interval"
    found += f", {count(row['n'], 'seed')}."
    if row["word"] in ("BETTER", "WORSE"):
        return f"{arm} is {row['word']} than {against} in {row['metric']}: {found}"
    if row["word"] == "EQUIVALENT":
        within = f" (within +-{row['margin']:g})" if numbers([row.get("margin")]) else ""
        return f"{arm} is EQUIVALENT to {against} in {row['metric']}{within}: {found}"
    return f"{arm} against {against} in {row['metric']} is {row['word']}: {found}"


# --- Tables -----------------------------------------------------------------------------------


def main_table(summary: Summary) -> Table:
    """The main metric: mean, 95 % interval, difference from the baseline, word, n."""
    metric, base = main_metric(summary), baseline(summary)
    against = [f"minus {label(base)}", "its 95 % interval", "word"] if base else []
    header = ["arm", "seeds", METRICS.get(str(metric), str(metric)), "95 % interval", *against]
    rows = []
    for arm in in_order(summary.get("arms", {})):
        values = numbers(summary["arms"][arm].get(metric) or ())
        interval = show_interval(paired_interval(values)) if values else "-"
        cells = [label(arm), str(len(values)), show(mean(values)) if values else "-", interval]
        row = comparison(summary, arm, str(metric))
        if base and row:
            gap = show(row["mean_difference"], signed=True)
            cells += [gap, show_interval(row.get("interval95")), row["word"]]
        elif base:
            cells += ["-", "-", "baseline" if arm == base else "not compared"]
        rows.append(tuple(cells))
    return Table(header=tuple(header), rows=tuple(rows))


def metrics_table(summary: Summary) -> Table:
    """A row per other metric: each arm's mean, with the word against the baseline if computed."""
    arms = in_order(summary.get("arms", {}))
    rows = []
    for metric in metrics_of(summary):
        if metric == main_metric(summary):
            continue
        cells = [METRICS.get(metric, metric)]
        for arm in arms:
            values = numbers(summary["arms"][arm].get(metric) or ())
            row = comparison(summary, arm, metric)
            word = f" {row['word']}" if row and values else ""
            cells.append((show(mean(values)) if values else "-") + word)
        rows.append(tuple(cells))
    return Table(header=("metric", *map(label, arms)), rows=tuple(rows))


def table_markdown(summary: Summary) -> str:
    """The answer and its tables as Markdown, for `table.md`."""
    base = baseline(summary)
    parts = ["\n".join(f"- {sentence}" for sentence in sentences(summary))]
    if summary.get("arms"):
        parts.append(_markdown(main_table(summary)))
    if metrics_table(summary).rows:
        words = f"; words compare with {label(base)}, paired by seed" if base else ""
        parts.append(f"Other metrics (mean over seeds{words}):")
        parts.append(_markdown(metrics_table(summary)))
    if summary.get("claims"):
        parts.append(_markdown(claims_table(summary)))
    verdict = summary.get("verdict") or {}
    if verdict.get("word"):
        rule = f" Rule: {_cell(verdict['rule'])}." if verdict.get("rule") else ""
        parts.append(f"Verdict: **{_cell(verdict['word'])}**.{rule}")
    return "\n\n".join(parts) + "\n"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|") if str(text).strip() else ""


def _markdown(table: Table) -> str:
    rule = [":--" if i < table.num_names else "--:" for i in range(len(table.header))]
    lines = [[_cell(c) for c in table.header], rule, *([_cell(c) for c in r] for r in table.rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def console_table(summary: Summary) -> RichTable:
    """What fits a terminal of 80 columns: the main metric, its word, KL and win rate."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    metric, base = main_metric(summary), baseline(summary)
    known = metrics_of(summary)
    short = {"kl_sequence": "KL", "win_rate": "win\nrate"}
    others = [m for m in short if m in known and m != metric]
    colors = {"BETTER": "green", "WORSE": "red", "EQUIVALENT": "cyan", "UNRESOLVED": "yellow"}
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
    against = [f"minus {label(base)} [95 %]", "word"] if base else []
    name = METRICS.get(str(metric), str(metric)).replace(" ", "\n")
    for i, head in enumerate(("arm", "seeds", name, *against, *(short[m] for m in others))):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=True)
    for arm in in_order(summary.get("arms", {})):
        values = {m: numbers(v) for m, v in summary["arms"][arm].items()}
        found = values.get(str(metric), [])
        cells = [label(arm), str(len(found)), show(mean(found)) if found else "-"]
        row = comparison(summary, arm, str(metric))
        if base and row:
            gap = show(row["mean_difference"], signed=True)
            cells += [f"{gap} {show_interval(row.get('interval95'))}", row["word"]]
        elif base:
            cells += ["", ""]
        cells += [show(mean(values[m])) if values.get(m) else "-" for m in others]
        table.add_row(*(Text(cell, style=colors.get(cell, "")) for cell in cells))
    return table


def seeds_table(summary: Summary, metrics: Iterable[str] | None = None) -> Table:
    """Values of every arm, seed by seed, of all metrics or of these."""
    seeds = summary.get("seeds") or ()
    rows = [
        (label(arm), METRICS.get(metric, metric), *(show(v) for v in values))
        for arm in in_order(summary.get("arms", {}))
        for metric in (metrics_of(summary) if metrics is None else metrics)
        if (values := summary["arms"][arm].get(metric))
    ]
    header = ("arm", "metric", *(f"seed {seed}" for seed in seeds))
    return Table(header=header, rows=tuple(rows), num_names=2)


def comparisons_table(summary: Summary) -> Table:
    """Every comparison that was made."""
    rows = [
        (
            label(row["arm"]),
            label(row["against"]),
            METRICS.get(row["metric"], row["metric"]),
            row["word"],
            str(row["n"]),
            show(row["mean_difference"], signed=True),
            show_interval(row.get("interval95")),
            show(row.get("margin")),
            " ".join(show(value, signed=True) for value in row.get("per_seed") or ()),
        )
        for row in summary.get("comparisons") or ()
    ]
    header = (
        "arm,against,metric,word,seeds,mean difference,95 % interval,margin,difference per seed"
    )
    return Table(header=tuple(header.split(",")), rows=tuple(rows), num_names=4)


def claims_table(summary: Summary) -> Table:
    """Published claims beside ours."""
    keys = ("claim", "published", "ours", "verdict")
    rows = tuple(
        tuple(_claim_cell(claim.get(key)) for key in keys) for claim in summary.get("claims") or ()
    )
    return Table(header=keys, rows=rows, num_names=4)


def _claim_cell(value: object) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_claim_cell(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_claim_cell(item) for item in value)
    return show(value)


def reward_model_table(summary: Summary) -> Table | None:
    """What the learned reward is worth, seed by seed, where one was learned."""
    found = summary.get("reward_model") or {}
    rows = tuple(
        (_reward_name(name), *(_reward_cell(value) for value in values))
        for name, values in found.items()
    )
    header = ("measure", *(f"seed {seed}" for seed in summary.get("seeds") or ()))
    return Table(header=header, rows=rows) if rows else None


def _reward_name(name: str) -> str:
    words = name.removeprefix("num_").replace("_interval95", ", 95 % interval")
    return words.replace("_", " ")


def _reward_cell(value: object) -> str:
    return show_interval(value) if isinstance(value, list) and len(value) == 2 else show(value)


def stage_seconds(timings: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Seconds per seed for each stage; nested names are joined, memory (`peak`, bytes) left out.

    `{"sft": [3.1, 2.9], "dpo": {"train": [..]}}` gives the stages `sft` and `dpo/train`.
    """
    found: dict[str, list[float | None]] = {}
    for key, value in timings.items():
        if re.search(r"peak|bytes|mib|gib", key):
            continue
        if isinstance(value, Mapping):
            for name, values in stage_seconds(value).items():
                outer = key in ("seconds", "stages", "stage_seconds")
                found[name if outer else f"{key}/{name}"] = values
        elif isinstance(value, list | tuple):
            found[key] = list(value)
        elif numbers([value]):
            found["whole run" if key == "seconds" else key] = [value]
    return {key: values for key, values in found.items() if numbers(values)}


# --- Figures ----------------------------------------------------------------------------------


def build_figures(run: RunFiles, *, png_folder: Path | None = None) -> list[ReportFigure]:
    """Every figure that the run's files allow, in the report's order; PNGs too if asked."""

    def png(name: str) -> Path | None:
        return png_folder / f"{name}.png" if png_folder else None

    figures = [_bars_figure(run, png("metric"))]
    for stage, name in _curves(run):
        file = re.sub(r"[^a-z0-9_]+", "-", f"curve-{stage}-{name}".lower())
        figures.append(_curve_figure(run, stage, name, file=file, png=png(file)))
    figures.append(_frontier_figure(run, png("frontier")))
    figures.append(_experts_figure(run, png("experts")))
    figures.append(_drift_figure(run, png("drift")))
    figures.append(_minutes_figure(run, png("minutes")))
    return [figure for figure in figures if figure is not None]


def _bars_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    metric = main_metric(run.summary)
    arms = {arm: v.get(metric) or [] for arm, v in run.summary.get("arms", {}).items()}
    arms = {arm: values for arm, values in arms.items() if numbers(values)}
    if not arms or metric is None:
        return None
    title = METRICS.get(metric, metric)
    said = "; ".join(f"{label(arm)} {show(mean(numbers(arms[arm])))}" for arm in in_order(arms))
    return ReportFigure(
        section="Answer",
        name="metric",
        alt=f"Bar chart of {title} per arm. Means: {said}.",
        caption="Each whisker is of its arm alone. The words above rest on differences paired by "
        "seed, which can be sure even where whiskers overlap.",
        svg=plots.bars(arms, metric=title, png=png),
        table=seeds_table(run.summary, [metric]),
    )


def _curves(run: RunFiles) -> list[tuple[str, str]]:
    """(stage, metric name) of the curves worth drawing: few per stage, of different kinds."""
    steps: dict[tuple[str, str], set[float]] = {}
    for row in (r for seeds in run.metrics.values() for rows in seeds.values() for r in rows):
        name = str(row.get("name", ""))
        if "/layer_" not in name and numbers([row.get("value"), row.get("step")]):
            steps.setdefault((str(row.get("stage") or ""), name), set()).add(row["step"])
    chosen = []
    for stage in in_order(stage for stage, _ in sorted(steps)):
        names = sorted(n for s, n in steps if s == stage and len(steps[s, n]) > 1)
        picks = [next((n for n in names if re.search(kind, n)), None) for kind in CURVES]
        kept = list(dict.fromkeys(name for name in picks if name)) or names
        chosen += [(stage, name) for name in kept[:CURVES_PER_STAGE]]
    return chosen


def _curve_figure(
    run: RunFiles, stage: str, name: str, *, file: str, png: Path | None
) -> ReportFigure:
    arms = {
        arm: {
            seed: [r for r in rows if (r.get("stage") or "") == stage and r.get("name") == name]
            for seed, rows in seeds.items()
        }
        for arm, seeds in run.metrics.items()
    }
    arms = {arm: seeds for arm, seeds in arms.items() if any(seeds.values())}
    splits = plots.splits_of(arms, name)
    rows, ends = [], []
    for arm in arms:
        for split in splits:
            line = plots.curve(arms[arm].values(), name, split=split)
            if not line.x:
                continue
            who = f"{label(arm)}, {split}" if split and len(splits) > 1 else label(arm)
            ends.append(f"{who} goes from {show(line.mean[0])} to {show(line.mean[-1])}")
            for i in _spread(len(line.x), MAX_TABLE_STEPS):
                numbers_ = (line.x[i], line.mean[i], line.low[i], line.high[i])
                rows.append((who, *map(show, numbers_)))
    title = f"{label(stage)}: {name}" if stage else name
    return ReportFigure(
        section="Learning curves",
        name=file,
        alt=f"Line chart of {title} over optimizer steps. {'; '.join(ends)}.",
        caption="",
        svg=plots.learning_curves(arms, name, title=title, png=png),
        table=Table(header=("line", "step", "mean", "min", "max"), rows=tuple(rows)),
    )


def _spread(length: int, most: int) -> list[int]:
    """At most `most` places of a list, evenly spread, first and last among them."""
    if length <= most:
        return list(range(length))
    return [round(i * (length - 1) / (most - 1)) for i in range(most)]


def _frontier_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    seeds_by_arm = {a: s for a, s in (run.summary.get("frontier") or {}).items() if any(s or ())}
    if not seeds_by_arm:
        return None
    rows, said = [], []
    for arm in in_order(seeds_by_arm):
        points = plots.frontier_mean(seeds_by_arm[arm])
        rows += [
            (label(arm), *map(show, (p.step, p.kl, p.gold, p.proxy)), str(p.n))
            for p in (points[i] for i in _spread(len(points), 2 * MAX_TABLE_STEPS))
        ]
        golds = [point for point in points if point.gold is not None]
        if golds:
            best, last = max(golds, key=lambda p: p.gold or 0.0), golds[-1]
            said.append(
                f"{label(arm)}: gold is highest, {show(best.gold)}, at KL {show(best.kl)}"
                + (f", and ends at {show(last.gold)}, KL {show(last.kl)}" if best != last else "")
            )
    header = ("arm", "step", "KL", "gold reward", "proxy reward", "seeds")
    return ReportFigure(
        section="Reward against KL",
        name="frontier",
        alt=f"Two line charts, gold and proxy reward against KL. {'; '.join(said)}.",
        caption="Faint: seeds. Strong: mean at equal steps; the large mark is the last step. "
        "Over-optimisation is the left falling while the right rises. " + "; ".join(said) + ".",
        svg=plots.frontier(seeds_by_arm, png=png),
        table=Table(header=header, rows=tuple(rows)),
    )


def _loads(run: RunFiles) -> tuple[int, dict[str, Sequence[Sequence[float | None]]]]:
    """The first seed's place with loads, and its load / fair share [layer][expert] per stage."""
    routing = run.summary.get("routing") or {}
    per_stage = {stage: metrics.get("load_share") or [] for stage, metrics in routing.items()}
    for place in range(max((len(seeds) for seeds in per_stage.values()), default=0)):
        loads = {s: seeds[place] for s, seeds in per_stage.items() if len(seeds) > place}
        loads = {s: load for s, load in loads.items() if any(load or ())}
        if loads:
            return place, {stage: loads[stage] for stage in in_order(loads)}
    return 0, {}


def _experts_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    place, loads = _loads(run)
    if not loads:
        return None
    seed = f"seed {_seed(run.summary, place)}"
    num_experts = max(len(row or ()) for load in loads.values() for row in load)
    said, rows = [], []
    cells = sum(len(load) for load in loads.values()) * num_experts
    for stage, load in loads.items():
        flat = numbers(value for row in load for value in row or ())
        dead = sum(value < plots.DEAD_SHARE for value in flat)
        said.append(f"{label(stage)} {show(min(flat))} to {show(max(flat))}, {dead} dead")
        for layer, row in enumerate(load):
            known = numbers(row or ())
            extremes = (min(known), max(known)) if known else (None, None)
            values = [*(row or ()), *[None] * (num_experts - len(row or ()))]
            shown = extremes if cells > MAX_TABLE_CELLS else values
            rows.append((label(stage), str(layer), *map(show, shown)))
    names = ["lowest", "highest"] if cells > MAX_TABLE_CELLS else map(str, range(num_experts))
    return ReportFigure(
        section="Experts",
        name="experts",
        alt=f"Heat maps of expert load over fair share, layer by expert, {seed}. "
        f"{'; '.join(said)}.",
        caption=f"Load of each expert over its fair share, {seed}: 1 is fair, below 0.1 is dead. "
        "Stages of one seed share their experts; experts of two seeds need not correspond, so "
        "seeds are not averaged here.",
        svg=plots.heat_map(loads, title=seed, png=png),
        table=Table(header=("stage", "layer", *names), rows=tuple(rows), num_names=2),
    )


def _seed(summary: Summary, place: int) -> object:
    seeds = summary.get("seeds") or ()
    return seeds[place] if place < len(seeds) else place


def routing_table(summary: Summary) -> Table | None:
    """Mean over layers and seeds of each routing metric, per stage."""
    routing = summary.get("routing") or {}
    found = [m for m in ROUTING if any(stage.get(m) for stage in routing.values())]
    rows = []
    for stage in in_order(routing):
        cells = [label(stage)]
        for metric in found:
            values = numbers(v for seed in routing[stage].get(metric) or () for v in seed or ())
            cells.append(show(mean(values)) if values else "-")
        rows.append(tuple(cells))
    header = ("stage", *(ROUTING[metric] for metric in found))
    return Table(header=header, rows=tuple(rows)) if found else None


def _drift_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    routing = run.summary.get("routing") or {}
    panels, rows = {}, []
    for metric, title in DRIFT.items():
        stages = {
            stage: seeds
            for stage in in_order(routing)
            if stage != "sft"  # its distance from itself
            and (seeds := routing[stage].get(metric))
            and numbers(value for seed in seeds for value in seed or ())
        }
        if not stages:
            continue
        panels[title] = stages
        for stage, seeds in stages.items():
            for layer in range(max(len(seed or ()) for seed in seeds)):
                here = numbers(seed[layer] for seed in seeds if seed and layer < len(seed))
                cells = (mean(here), min(here), max(here)) if here else (None,) * 3
                rows.append((title, label(stage), str(layer), *map(show, cells)))
    if not panels:
        return None
    names = ", ".join(label(stage) for stage in in_order(s for p in panels.values() for s in p))
    return ReportFigure(
        section="Routing drift",
        name="drift",
        alt=f"Line charts of routing drift per layer from the SFT model, for {names}.",
        caption="How far each layer's choice of experts moved from the SFT model on the same "
        "texts. Lines: mean over seeds; bands: from the lowest to the highest seed.",
        svg=plots.drift(panels, png=png),
        table=Table(
            header=("metric", "stage", "layer", "mean", "min", "max"),
            rows=tuple(rows),
            num_names=3,
        ),
    )


def _minutes_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    stages = stage_seconds(run.summary.get("timings") or {})
    if not stages:
        return None
    minutes = {stage: [s / 60 for s in numbers(stages[stage])] for stage in in_order(stages)}
    total = sum(sum(values) for values in minutes.values())
    rows = [
        (label(stage), show(mean(values)), show(min(values)), show(max(values)), str(len(values)))
        for stage, values in minutes.items()
    ]
    said = "; ".join(f"{label(stage)} {show(mean(values))}" for stage, values in minutes.items())
    return ReportFigure(
        section="Minutes per stage",
        name="minutes",
        alt=f"Bar chart of minutes per stage. Means: {said}.",
        caption=f"Wall time; {show(total)} minutes in all.",
        svg=plots.stage_minutes(stages, png=png),
        table=Table(header=("stage", "mean", "min", "max", "seeds"), rows=tuple(rows)),
    )


# --- The page ---------------------------------------------------------------------------------

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
.BETTER, .REPRODUCED { color: var(--good); } .WORSE, .NOT { color: var(--bad); }
.EQUIVALENT { color: var(--calm); } .UNRESOLVED, .INCONCLUSIVE { color: var(--open); }
.scroll { overflow-x: auto; margin: .7rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
td { white-space: nowrap; }
.prose td { white-space: normal; }
.wrap td:not(.name) { white-space: normal; } .wrap .word { display: block; font-size: .72rem; }
th.name, td.name { text-align: left; }
figure { margin: .9rem 0; }
.card { background: #ffffff; border: 1px solid var(--line); border-radius: 8px; padding: 10px; }
.card svg { display: block; width: 100%; height: auto; }
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
    write_text_atomic(path, page(run, build_figures(run)))
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
    figures = build_figures(run, png_folder=folder)
    written = [run.folder / "report.html"]
    write_text_atomic(written[0], page(run, figures))
    if run.summary.get("arms") or not (run.folder / "table.md").exists():
        written.append(run.folder / "table.md")
        write_text_atomic(written[-1], table_markdown(run.summary))
    for figure in figures:
        write_text_atomic(folder / f"{figure.name}.svg", figure.svg)
        written += [folder / f"{figure.name}.svg", folder / f"{figure.name}.png"]
    return written


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
    first = re.sub(r"[^A-Z]", "", str(word).split(" ")[0])
    return f'<span class="word {first}">{_e(word)}</span>'


def _with_words(text: str) -> str:
    words = r"\b(NOT REPRODUCED|REPRODUCED|INCONCLUSIVE|BETTER|WORSE|EQUIVALENT|UNRESOLVED)\b"
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
        ("Threshold", verdict.get("threshold")),
    ]
    shown = "\n".join(
        f"<li>{_e(name)}: {_e(value)}</li>" for name, value in lines if value not in (None, "")
    )
    status = str(summary.get("status") or "done")
    banner = f'<p class="banner">This run is not complete: {_e(status)}.</p>\n'
    body = f"{'' if status == 'done' else banner}<ul>\n{shown}\n</ul>"
    return _section("What was asked", body)


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
    return _section("Notes", _list([*(run.summary.get("notes") or ()), *run.notes]))


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
    if rows := summary.get("comparisons"):
        found.append(
            f"{count(len(rows), 'comparison')}, each at 95 % on its own: if nothing differed, "
            f"about {show(len(rows) / 20)} would still exclude zero."
        )
    for arm in in_order(summary.get("arms", {})):
        for metric, values in summary["arms"][arm].items():
            gone = [str(_seed(summary, i)) for i, v in enumerate(values) if not numbers([v])]
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
