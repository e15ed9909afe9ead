"""The numbers of a run as words and tables, for the page, for `table.md` and for the console.

A table is text before it has a form: the page, Markdown and the console show the same cells, so a
number cannot read differently in two places. All of it is computed from the summary alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from experiments.lab.plots import in_order, label, mean, numbers
from experiments.lab.runfiles import Row, Summary
from experiments.lab.verdict import paired_interval

if TYPE_CHECKING:
    from rich.table import Table as RichTable

METRICS = {
    "gold_reward": "gold reward",
    "proxy_reward": "proxy reward",
    "kl_sequence": "KL (nats / sequence)",
    "win_rate": "win rate",
    "length": "length (tokens)",
    "ended": "share that ends",
    "distinct_2": "distinct-2",
    "reference_perplexity": "reference perplexity",
    "original_perplexity": "original perplexity",
    "base_perplexity": "base perplexity",
    "routing_change": "routing change",
    "from_base": "routing change from base",
    "token_kl": "KL (nats / token)",
    "accuracy": "held-out accuracy",
    "wilson_low": "Wilson interval, low",
    "wilson_high": "Wilson interval, high",
    "accuracy_before": "accuracy before training",
    "train_accuracy": "accuracy on training pairs",
    "implicit_margin_before": "implicit margin before (nats)",
    "implicit_margin": "implicit margin (nats)",
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
    "expert_distance": "distance between experts (0: copies)",
    "domain_jsd": "JS divergence between domains (bits)",
    "domain_jsd_by_chance": "the same by chance",
    "change_from_start": "choices changed from the start",
    "change_between_seeds": "changed between two seeds",
    "jsd_from_start": "JS divergence from the start (bits)",
    "chosen_rejected_jsd": "JS divergence, chosen from rejected (bits)",
    "chosen_rejected_jsd_by_chance": "that by chance",
}
NEXT_ROW = "minus the next row [95 %]"
ANSWERED_FIRST = ("dpo", "ppo", "best_of_n", "sft", "few_shot", "base")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text; the first `num_names` columns are words, the others numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_names: int = 1


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


def own_pairs(summary: Summary) -> dict[str, Row]:
    """Arm -> its comparison in the main metric, where every arm has an other of its own.

    Empty where arms share a baseline, or where one that others are held against is itself compared.
    """
    metric = main_metric(summary)
    rows = [row for row in summary.get("comparisons") or () if row["metric"] == metric]
    names = [row[side] for row in rows for side in ("arm", "against")]
    alone = len(rows) > 1 and len(set(names)) == len(names)
    return {row["arm"]: row for row in rows} if alone else {}


def baseline(summary: Summary) -> str | None:
    """The arm that most comparisons are against; None where each has its own."""
    if own_pairs(summary):
        return None
    against = Counter(row["against"] for row in summary.get("comparisons") or ())
    return against.most_common(1)[0][0] if against else None


def comparison(summary: Summary, arm: str, metric: str) -> Row | None:
    """The comparison of an arm with the baseline, if it was made."""
    rows = summary.get("comparisons") or ()
    wanted = (arm, baseline(summary), metric)
    return next((r for r in rows if (r["arm"], r["against"], r["metric"]) == wanted), None)


def seed_at(summary: Summary, place: int) -> object:
    """The seed whose values stand at this place; the place itself where seeds are not told."""
    seeds = summary.get("seeds") or ()
    return seeds[place] if place < len(seeds) else place


def sentences(summary: Summary) -> list[str]:
    """Up to three sentences that answer the question, from the main metric's comparisons.

    Then one for each arm whose gain comes with broken text, where the run looked for that.
    """
    if summary.get("answers"):
        return list(summary["answers"])
    metric, base = main_metric(summary), baseline(summary)
    rows = [row for row in summary.get("comparisons") or () if row["metric"] == metric]
    known = {arm: place for place, arm in enumerate(ANSWERED_FIRST)}
    rows.sort(key=lambda row: (row["against"] != base, known.get(row["arm"], -1)))
    if rows:
        broken = (summary.get("degenerate") or {}).items()
        called_out = [f"{label(arm)} is DEGENERATE: {reason}." for arm, reason in broken]
        return [*(_sentence(row) for row in rows[:3]), *called_out]
    verdict = summary.get("verdict") or {}
    if verdict.get("word"):
        return [f"The verdict is {verdict['word']}."]
    return ["Nothing was compared."]


def _sentence(row: Row) -> str:
    arm, against = label(row["arm"]), label(row["against"])
    metric = METRICS.get(row["metric"], row["metric"])
    if not row["n"]:
        return f"{arm} cannot be compared with {against} in {metric}: no seed has both."
    found = show(row["mean_difference"], signed=True)
    interval = row.get("interval95")
    found += f" {show_interval(interval)}" if interval else ", no interval"
    found += f", {count(row['n'], 'seed')}."
    if row["word"] in ("BETTER", "WORSE", "HIGHER", "LOWER"):
        return f"{arm} is {row['word']} than {against} in {metric}: {found}"
    if row["word"] == "EQUIVALENT":
        within = f" (within +-{row['margin']:g})" if numbers([row.get("margin")]) else ""
        return f"{arm} is EQUIVALENT to {against} in {metric}{within}: {found}"
    return f"{arm} against {against} in {metric} is {row['word']}: {found}"


def main_table(summary: Summary) -> Table:
    """The main metric: mean, 95 % interval, difference from the baseline, word, n."""
    if pairs := own_pairs(summary):
        return _pairs_table(summary, pairs)
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
            cells += [gap, show_interval(row.get("interval95")), _main_word(summary, row)]
        elif base:
            cells += ["-", "-", "baseline" if arm == base else "not compared"]
        rows.append(tuple(cells))
    return Table(header=tuple(header), rows=tuple(rows))


def _pairs_table(summary: Summary, pairs: Mapping[str, Row]) -> Table:
    """The main metric of each arm and, in the next row, of what it alone is held against."""
    metric = str(main_metric(summary))
    rows = []
    for arm in in_order(pairs):
        row = pairs[arm]
        differs = str(row.get("against_is") or "")
        told = (_gap(row), _main_word(summary, row))
        rows.append((label(arm), "", *_mean_cells(summary, arm, metric), *told))
        cells = _mean_cells(summary, row["against"], metric)
        rows.append((label(row["against"]), differs, *cells, "", ""))
    header = ("arm", "what differs", "seeds", METRICS.get(metric, metric), NEXT_ROW, "word")
    return Table(header=header, rows=tuple(rows), num_names=2)


def _gap(row: Row) -> str:
    """The difference and, in brackets, its 95 % interval."""
    return f"{show(row['mean_difference'], signed=True)} {show_interval(row.get('interval95'))}"


def _in_pairs(pairs: Mapping[str, Row]) -> list[str]:
    """Each arm and, after it, what it is held against."""
    return [name for arm in in_order(pairs) for name in (arm, pairs[arm]["against"])]


def _mean_cells(summary: Summary, arm: str, metric: str) -> tuple[str, str]:
    values = numbers(summary["arms"][arm].get(metric) or ())
    return str(len(values)), show(mean(values)) if values else "-"


def metrics_table(summary: Summary) -> Table:
    """A row per other metric: each arm's mean, with the word against the baseline if computed."""
    arms = in_order(own_pairs(summary) or summary.get("arms", {}))
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
    pairs = own_pairs(summary)
    others = [m for m in short if m in known and m != metric and not pairs]
    colors = {"BETTER": "green", "WORSE": "red", "EQUIVALENT": "cyan", "UNRESOLVED": "yellow"}
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
    minus = NEXT_ROW if pairs else f"minus {label(base)} [95 %]" if base else ""
    against = [minus, "word"] if minus else []
    name = METRICS.get(str(metric), str(metric)).replace(" ", "\n")
    for i, head in enumerate(("arm", "seeds", name, *against, *(short[m] for m in others))):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=True)
    for arm in _in_pairs(pairs) or in_order(summary.get("arms", {})):
        values = {m: numbers(v) for m, v in summary["arms"][arm].items()}
        found = values.get(str(metric), [])
        cells = [label(arm), str(len(found)), show(mean(found)) if found else "-"]
        row = pairs.get(arm) or comparison(summary, arm, str(metric))
        if row:
            cells += [_gap(row), _main_word(summary, row)]
        elif minus:
            cells += ["", ""]
        cells += [show(mean(values[m])) if values.get(m) else "-" for m in others]
        table.add_row(*(Text(cell, style=_color(cell, colors)) for cell in cells))
    return table


def _main_word(summary: Summary, row: Row) -> str:
    """The word of a comparison in the main metric, and whether the gain is one of broken text."""
    return (
        f"{row['word']}, DEGENERATE" if row["arm"] in summary.get("degenerate", {}) else row["word"]
    )


def _color(cell: str, colors: Mapping[str, str]) -> str:
    return "red" if cell.endswith("DEGENERATE") else colors.get(cell, "")


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
