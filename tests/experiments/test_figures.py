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


ROUTER: Summary = {
    "seeds": [3, 4],
    "routing": {
        "trained": {
            "repeat_first": [[0.3, 0.5], [0.5, 0.5]],
            "repeat_first_shuffled": [[0.2, 0.5], [0.1, 0.5]],
        },
    },
    "saturation": [
        {"marks": [0.0, 0.5, 1.0], "share": [[0.2], [0.4], [1.0]], "by_usage": [[0.25]] * 3},
        {"marks": [0.0, 0.5, 1.0], "share": [[0.4], [0.8], [1.0]], "by_usage": [[0.35]] * 3},
    ],
    "coactivation": {
        "trained": [
            {
                "conditional": [[[1.0, 0.9, 0.1], [0.6, 1.0, 0.4], [0.2, 0.8, 1.0]]],
                "by_usage": [[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, None, 1.0]]],
                "uniform": 0.5,
            }
        ]
        * 2
    },
}


def test_a_routers_habits_are_drawn_where_the_summary_has_them() -> None:
    figures = {figure.name: figure for figure in build_figures(run_of(ROUTER))}
    assert list(figures) == ["settled", "repeats", "coactivation"]
    assert {figure.section for figure in figures.values()} == {"Experts"}
    for figure in figures.values():
        assert {len(row) for row in figure.table.rows} == {len(figure.table.header)}
    for key in ("saturation", "coactivation"):
        less = {name: value for name, value in ROUTER.items() if name != key}
        assert len(build_figures(run_of(less))) == 2
    alone = {"routing": {"trained": {"repeat_first": [[0.3]]}}}  # without its chance level
    assert build_figures(run_of(alone)) == []


def test_what_is_settled_is_the_mean_and_range_over_seeds_per_mark() -> None:
    settled = build_figures(run_of(ROUTER))[0]
    assert settled.table.rows[1] == ("0", "50 %", "0.60", "0.40", "0.80", "0.30")
    assert "at 0, 50, 100 % of the training" in settled.alt
    assert "layer 0 0.30, 0.60, 1." in settled.alt


def test_repeats_are_held_against_the_shuffled_rows_of_their_own_seed() -> None:
    repeats = build_figures(run_of(ROUTER))[1]
    assert repeats.table.rows[0] == ("trained", "0", "0.40", "0.15", "0.25", "0.10", "0.40")
    assert "trained, layer by layer: 0.40 against 0.15, 0.50 against 0.50." in repeats.alt


def test_partners_are_of_the_first_seed_strongest_first_and_never_an_expert_with_itself() -> None:
    partners = build_figures(run_of(ROUTER))[2]
    assert "seed 3" in partners.caption
    assert "Strongest: layer 0, 1 with 0, 0.90." in partners.alt
    # (2, 1) at 0.8 has no null.
    assert partners.table.rows == (
        ("0", "0", "1", "0.90", "0.50"),
        ("0", "1", "0", "0.60", "0.50"),
        ("0", "1", "2", "0.40", "0.50"),
    )


MOVED: Summary = {
    "seeds": [3, 4],
    "arms": {
        "sft": {"routing_change": [0.5, 0.25], "token_kl": [3.0, 1.0]},
        "sft_reseeded": {"routing_change": [0.25, 0.05]},
        "rm": {"routing_change": [0.5, None], "token_kl": [None, None]},
    },
}


def test_change_stands_against_kl_with_its_null_and_a_stage_without_kl_is_told() -> None:
    (change,) = [f for f in build_figures(run_of(MOVED)) if f.name == "change_against_kl"]
    assert change.section == "Routing drift"
    assert change.table.rows == (
        ("SFT", "3", "3", "0.50", "0.25"),
        ("SFT", "4", "1", "0.25", "0.050"),
        ("RM", "3", "-", "0.50", "-"),
        ("RM", "4", "-", "-", "-"),
    )
    assert "SFT 0.38 at KL 2, between its two trainings 0.15; RM 0.50 without KL" in change.alt


def test_no_change_is_drawn_against_a_kl_that_no_stage_has() -> None:
    for arm in (MOVED["arms"]["rm"], {"routing_change": [0.5]}):
        assert not [
            figure
            for figure in build_figures(run_of({"seeds": [3], "arms": {"rm": arm}}))
            if figure.name == "change_against_kl"
        ]


def test_the_change_from_the_start_and_between_seeds_share_their_y_axis() -> None:
    routing = {"sft": {"change_from_start": [[0.5]], "change_between_seeds": [[40.0]]}}
    (drift,) = build_figures(run_of({"routing": routing}))
    assert drift.svg.count(">40<") == 2
