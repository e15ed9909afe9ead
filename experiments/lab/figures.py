"""The figures of a run, each with what it says in words and its numbers as a table.

A figure never stands alone: whoever cannot see it has its alternative text and its table. Which
figures there are follows from what the run left; how they are drawn is `plots`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.lab import plots, routing_plots
from experiments.lab.plots import in_order, label, mean, numbers
from experiments.lab.routing_plots import Moved
from experiments.lab.runfiles import RunFiles
from experiments.lab.tables import METRICS, Table, main_metric, seed_at, seeds_table, show

MAX_TABLE_STEPS = 11
MAX_TABLE_CELLS = 4000
CURVES_PER_STAGE = 4
STRONGEST_PAIRS = 3  # per layer, in the table

DRIFT = {
    "jaccard_from_sft": "Jaccard with SFT (1: same)",
    "jsd_from_sft": "JS divergence from SFT (0: same)",
    "change_from_start": "changed from the start",
    "change_between_seeds": "changed between seeds",
    "chosen_rejected_jsd": "chosen, rejected (bits)",
}
CHANGES = ("change_from_start", "change_between_seeds")  # held against each other: one y axis
# One curve for each kind of metric, in this order, so that one stage's many losses leave room.
CURVES = (
    r"^reward/score$",
    r"^(train|eval|val)?/?loss$",
    r"accuracy$",
    r"kl(_sequence)?$",
    r"router/max_vio$",
    r"loss",
    r"reward",
)


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
    figures.append(_settled_figure(run, png("settled")))
    figures.append(_repeats_figure(run, png("repeats")))
    figures.append(_partners_figure(run, png("coactivation")))
    figures.append(_drift_figure(run, png("drift")))
    figures.append(_change_figure(run, png("change_against_kl")))
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
    seed = f"seed {seed_at(run.summary, place)}"
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


def _settled_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    seeds = [seed for seed in run.summary.get("saturation") or () if seed]
    if not seeds:
        return None
    marks = seeds[0]["marks"]
    share_SML, chance_SML = [s["share"] for s in seeds], [s["by_usage"] for s in seeds]
    rows, said = [], []
    for layer in range(len(share_SML[0][0])):
        told = []
        for place, mark in enumerate(marks):
            here = numbers(share_ML[place][layer] for share_ML in share_SML)
            chance = numbers(chance_ML[place][layer] for chance_ML in chance_SML)
            cells = (mean(here), min(here), max(here)) if here else (None,) * 3
            rows.append(
                (
                    str(layer),
                    f"{mark * 100:g} %",
                    *map(show, cells),
                    show(mean(chance) if chance else None),
                )
            )
            told.append(show(cells[0]))
        said.append(f"layer {layer} {', '.join(told)}")
    at = ", ".join(f"{mark * 100:g}" for mark in marks)
    return ReportFigure(
        section="Experts",
        name="settled",
        alt=f"Line chart of the share of a token's final experts that it already has, at {at} % of "
        f"the training, a line per layer. {'; '.join(said)}.",
        caption="Share of a token's final experts that it already has. Lines: mean over seeds; "
        "bands: from the lowest to the highest seed. Dashed: what independent tokens of the same "
        "use of experts would share.",
        svg=routing_plots.settled(share_SML, chance_SML, marks=marks, png=png),
        table=Table(
            header=("layer", "of the training", "mean", "min", "max", "by use alone"),
            rows=tuple(rows),
            num_names=2,
        ),
    )


def _repeats_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    routing = run.summary.get("routing") or {}
    found, chance = (
        {arm: seeds for arm in in_order(routing) if (seeds := routing[arm].get(name))}
        for name in ("repeat_first", "repeat_first_shuffled")
    )
    found = {arm: seeds for arm, seeds in found.items() if arm in chance}
    if not found:
        return None
    rows, said = [], []
    for arm, seeds in found.items():
        told = []
        for layer in range(len(seeds[0])):
            pairs = [(s[layer], c[layer]) for s, c in zip(seeds, chance[arm], strict=True)]
            gaps = [rate - null for rate, null in pairs]
            means = [mean(side) for side in zip(*pairs, strict=True)]
            cells = (*means, mean(gaps), min(gaps), max(gaps))
            rows.append((label(arm), str(layer), *map(show, cells)))
            told.append(f"{show(means[0])} against {show(means[1])}")
        said.append(f"{label(arm)}, layer by layer: {', '.join(told)}")
    return ReportFigure(
        section="Experts",
        name="repeats",
        alt="Dot charts per layer: how often the next token has the same first choice, against "
        f"shuffled rows. {'; '.join(said)}.",
        caption="Share of neighbouring tokens with the same first choice, beside what the same "
        "tokens in any other order within their row give. Dots: seeds; bars: their means; a line "
        "joins the two of one seed.",
        svg=routing_plots.beside_chance(
            found,
            chance,
            name="repeats",
            found="next token has the same first choice",
            chance="in shuffled rows",
            png=png,
        ),
        table=Table(
            header=("arm", "layer", "repeats", "shuffled", "difference", "min", "max"),
            rows=tuple(rows),
            num_names=2,
        ),
    )


def _partners_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    seeds = (run.summary.get("coactivation") or {}).get("trained") or ()
    place = next((place for place, seed in enumerate(seeds) if seed), None)
    if place is None:
        return None
    seed = f"seed {seed_at(run.summary, place)}"
    share_LEE, null_LEE = seeds[place]["conditional"], seeds[place]["by_usage"]
    rows, said = [], []
    for layer, (share_EE, null_EE) in enumerate(zip(share_LEE, null_LEE, strict=True)):
        pairs = [
            (share, null, of, to)
            for of, both in enumerate(zip(share_EE, null_EE, strict=True))
            for to, (share, null) in enumerate(zip(*both, strict=True))
            if of != to and len(numbers([share, null])) == 2
        ]
        strongest = sorted(pairs, reverse=True)[:STRONGEST_PAIRS]
        rows += [(*map(str, (layer, of, to)), show(p), show(q)) for p, q, of, to in strongest]
        said += [f"layer {layer}, {to} with {of}, {show(p)}" for p, _, of, to in strongest[:1]]
    return ReportFigure(
        section="Experts",
        name="coactivation",
        alt=f"Heat maps of co-activation after training, expert by expert, one per layer, {seed}. "
        f"Strongest: {'; '.join(said)}.",
        caption=f"After training, {seed}: of the tokens that chose the row's expert, the share "
        "that also chose the column's; even use without preference gives "
        f"{show(seeds[place]['uniform'])}. The colour compares with what the loads alone give. "
        "Experts of two seeds need not correspond, so seeds are not averaged here.",
        svg=plots.pair_maps(
            {f"layer {layer}": share_EE for layer, share_EE in enumerate(share_LEE)},
            {f"layer {layer}": null_EE for layer, null_EE in enumerate(null_LEE)},
            title=f"trained, {seed}",
            png=png,
        ),
        table=Table(
            header=("layer", "expert", "with", "share", "by the loads alone"),
            rows=tuple(rows),
            num_names=3,
        ),
    )


def _drift_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    routing = run.summary.get("routing") or {}
    panels, rows = {}, []
    for metric, title in DRIFT.items():
        stages = {
            stage: seeds
            for stage in in_order(routing)
            if not (stage == "sft" and metric.endswith("_from_sft"))  # its distance from itself
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
        alt=f"Line charts of routing drift per layer, for {names}.",
        caption="How far each layer's choice of experts moved on the same texts. Lines: mean over "
        "seeds; bands: from the lowest to the highest seed.",
        svg=plots.drift(panels, one_scale=[DRIFT[metric] for metric in CHANGES], png=png),
        table=Table(
            header=("metric", "stage", "layer", "mean", "min", "max"),
            rows=tuple(rows),
            num_names=3,
        ),
    )


def _change_figure(run: RunFiles, png: Path | None) -> ReportFigure | None:
    arms = run.summary.get("arms") or {}
    points: dict[str, list[Moved]] = {}
    rows, said = [], []
    for stage in in_order(arms):
        changes = arms[stage].get("routing_change") or ()
        if "token_kl" not in arms[stage] or not numbers(changes):
            continue
        kls = arms[stage]["token_kl"]
        nulls = arms.get(f"{stage}_reseeded", {}).get("routing_change") or [None] * len(changes)
        for place, seed in enumerate(zip(kls, changes, nulls, strict=True)):
            rows.append((label(stage), str(seed_at(run.summary, place)), *map(show, seed)))
            if numbers(seed[1:2]):
                points.setdefault(stage, []).append(Moved(*seed))
        means = [mean(v) if (v := numbers(side)) else None for side in (kls, changes, nulls)]
        at = "without KL" if means[0] is None else f"at KL {show(means[0])}"
        said.append(
            f"{label(stage)} {show(means[1])} {at}, between its two trainings {show(means[2])}"
        )
    if not numbers(point.kl for seeds in points.values() for point in seeds):
        return None
    return ReportFigure(
        section="Routing drift",
        name="change_against_kl",
        alt="Scatter chart of the share of chosen experts that changed from a stage's start, "
        f"against KL from that start per token. Means: {'; '.join(said)}.",
        caption="Filled: a seed's change from the start of the stage, mean over layers. Hollow, at "
        "the same KL: the change between two trainings of the stage from that start, its null. A "
        "stage without a next token has no KL and stands apart.",
        svg=routing_plots.change_against_kl(points, png=png),
        table=Table(
            header=("stage", "seed", "KL per token", "changed", "between its two trainings"),
            rows=tuple(rows),
            num_names=2,
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
