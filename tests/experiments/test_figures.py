"""The figures of a run: which there are, what each says, and its numbers as a table."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from experiments.lab.figures import CURVES_PER_STAGE, build_figures, stage_seconds
from experiments.lab.runfiles import Row, RunFiles, Summary

SUMMARY: Summary = {
    "seeds": [3, 4],
    "arms": {"sft": {"gold_reward": [1.0, 1.5]}, "ppo": {"gold_reward": [2.0, None]}},
    "frontier": {
        "ppo": [
            [
                {"step": step, "kl": 0.1 * step, "gold": gold, "proxy": 1.0 + step}
                for step, gold in ((0, 1.0), (10, 3.0), (20, 2.0))
            ]
        ]
    },
    "routing": {
        "sft": {"load_share": [[], [[1.0, 1.0], [0.05, 1.95]]]},
        "ppo": {"jaccard_from_sft": [[0.9, 0.8], [0.7, 0.6]], "load_share": [[], [[0.5, 1.5]]]},
    },
    "timings": {"seconds": {"sft": [60.0, 120.0]}},
}


def run_of(summary: Summary, metrics: Mapping[str, Sequence[Row]] | None = None) -> RunFiles:
    """Files with this summary and one seed's metrics per arm."""
    return RunFiles(
        folder=Path("run"),
        summary=summary,
        metrics={arm: {0: rows} for arm, rows in (metrics or {}).items()},
        samples={},
        config="",
        environment={},
        notes=(),
    )


def rows_of(*names: str) -> list[Row]:
    return [
        {"step": step, "stage": "ppo", "split": "train", "name": name, "value": 0.5 * step}
        for name in names
        for step in (1, 2)
    ]


def test_a_run_has_the_figures_that_its_files_allow_in_the_order_of_the_page() -> None:
    figures = build_figures(run_of(SUMMARY, {"ppo": rows_of("train/loss")}))
    assert [(figure.section, figure.name) for figure in figures] == [
        ("Answer", "metric"),
        ("Learning curves", "curve-ppo-train-loss"),
        ("Reward against KL", "frontier"),
        ("Experts", "experts"),
        ("Routing drift", "drift"),
        ("Minutes per stage", "minutes"),
    ]
    assert build_figures(run_of({})) == []


def test_every_figure_says_what_it_shows_and_has_its_numbers() -> None:
    figures = build_figures(run_of(SUMMARY, {"ppo": rows_of("train/loss")}))
    said = {figure.name: figure.alt for figure in figures}
    assert said["metric"] == "Bar chart of gold reward per arm. Means: SFT 1.25; PPO 2."
    assert "PPO goes from 0.50 to 1." in said["curve-ppo-train-loss"]
    assert "PPO: gold is highest, 3, at KL 1, and ends at 2, KL 2" in said["frontier"]
    assert "SFT 0.050 to 1.95, 1 dead" in said["experts"]
    assert said["minutes"] == "Bar chart of minutes per stage. Means: SFT 1.50."
    for figure in figures:
        assert figure.svg.startswith("<svg ")
        assert {len(row) for row in figure.table.rows} == {len(figure.table.header)}


def test_loads_are_of_the_first_seed_that_has_them() -> None:
    (experts,) = [f for f in build_figures(run_of(SUMMARY)) if f.name == "experts"]
    assert "seed 4" in experts.alt
    assert experts.table.rows == (
        ("SFT", "0", "1", "1"),
        ("SFT", "1", "0.050", "1.95"),
        ("PPO", "0", "0.50", "1.50"),
    )


def test_drift_is_the_mean_and_range_over_seeds_per_layer() -> None:
    (drift,) = [f for f in build_figures(run_of(SUMMARY)) if f.name == "drift"]
    assert [row[2:] for row in drift.table.rows] == [
        ("0", "0.80", "0.70", "0.90"),
        ("1", "0.70", "0.60", "0.80"),
    ]


def test_a_stage_shows_few_curves_of_different_kinds() -> None:
    names = ("loss/a", "loss/b", "reward/score", "kl", "entropy", "train/loss", "reward/x")
    figures = build_figures(run_of({}, {"ppo": rows_of(*names)}))
    assert len(figures) == CURVES_PER_STAGE
    assert [figure.name.removeprefix("curve-ppo-") for figure in figures] == [
        "reward-score",
        "train-loss",
        "kl",
        "loss-a",
    ]


def test_a_large_heat_map_tells_the_extremes_of_a_layer_instead_of_every_cell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("experiments.lab.figures.MAX_TABLE_CELLS", 5)
    routing = {"sft": {"load_share": [[[0.5, 1.0, 1.5], [2.0, 0.4, 0.6]]]}}
    (experts,) = build_figures(run_of({"routing": routing}))
    assert experts.table.header == ("stage", "layer", "lowest", "highest")
    assert experts.table.rows == (("SFT", "0", "0.50", "1.50"), ("SFT", "1", "0.40", "2"))


def test_timings_are_read_nested_or_flat_and_without_memory() -> None:
    timings = {"seconds": {"sft": [1.0, None]}, "dpo": {"train": [2.0]}, "rm": 3, "peak_bytes": 9}
    assert stage_seconds(timings) == {"sft": [1.0, None], "dpo/train": [2.0], "rm": [3]}
    assert stage_seconds({"sft": [None], "ppo": {"peak_mib": [1.0]}}) == {}
