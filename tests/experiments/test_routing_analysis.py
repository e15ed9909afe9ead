"""The experiment `routing_analysis` at debug scale: marks, measures, and its rule."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lab import grid
from experiments.lab.begun import keep_settings
from experiments.lab.question import Options
from experiments.lab.routing_measures import ARMS, high
from experiments.lab.routing_text import MARKS, SCALES, SHARES, at_mark, prepare, train_job
from experiments.lab.rules import combined
from experiments.routing_analysis import (
    EARLY,
    METRIC,
    QUESTION,
    above_chance,
    arm_metrics,
    conditions,
    gather,
    labs,
    plan,
    run,
    smallest_rise,
)
from sft.run import Run

OPTIONS = Options(seeds=(0,), scale="debug", processes=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The jobs run here, one by one; the command then finds them done and goes on to the report."""
    folder = tmp_path_factory.mktemp("routing_analysis") / "run"
    Run.create(folder, "routing_analysis", OPTIONS.identity, out=folder)
    keep_settings(folder, QUESTION.settings)
    for job in plan(OPTIONS, folder):
        job.function(*job.arguments)
    run(replace(OPTIONS, resume=folder))
    return folder


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    return found


def test_a_run_leaves_summary_table_report_and_pictures(
    finished: Path, summary: dict[str, Any]
) -> None:
    for name in ("summary.json", "table.md", "report.html", "figures/experts.svg"):
        assert (finished / name).is_file(), name
    gathered = json.loads(json.dumps(gather(OPTIONS, finished)))
    assert gathered == {key: summary[key] for key in gathered}
    assert summary["verdict"]["word"] == "INCONCLUSIVE"  # one seed decides nothing
    assert summary["verdict"]["metric"] == METRIC in summary["arms"]["trained"]


def test_every_measure_is_told_per_layer_beside_its_chance_level(summary: dict[str, Any]) -> None:
    for arm in ARMS:
        routing = summary["routing"][arm]
        for name in ("repeat_first", "repeat_first_two"):
            assert {f"{name}_shuffled", f"{name}_by_usage", f"{name}_p"} <= set(routing)
        for name in ("domain_jsd", "vocabulary_jsd"):
            for mean, top in zip(
                routing[f"{name}_by_chance"][0], routing[f"{name}_high"][0], strict=True
            ):
                assert 0 <= mean <= top
        assert all(len(layers[0]) == 4 for layers in routing.values())
        first, both = routing["repeat_first"][0], routing["repeat_first_two"][0]
        assert all(a <= b for a, b in zip(first, both, strict=True))


def test_pairs_of_experts_are_told_in_full(summary: dict[str, Any]) -> None:
    for layer in summary["coactivation"]["trained"][0]["conditional"]:
        assert len(layer) == 8
        for expert, row in enumerate(layer):
            assert row[expert] in (0.0, 1.0)  # 0: an expert that nobody chose
            assert sum(row) == pytest.approx(2.0 * row[expert])


def test_the_last_mark_is_the_final_model_and_the_first_the_initial_one(
    finished: Path, summary: dict[str, Any]
) -> None:
    (settled,) = summary["saturation"]
    assert settled["share"][MARKS.index(1.0)] == [1.0] * 4
    assert settled["uniform"] == 2 / 8
    (lab,) = labs(OPTIONS, finished)
    text = prepare(lab)
    states = [at_mark(lab, text, share).state_dict() for share in (0.0, 0.5, 1.0)]
    names = [name for name in states[0] if "gate.weight" in name]
    assert len(names) == 4
    for before, after in zip(states, states[1:], strict=False):
        assert all(not torch.equal(before[name], after[name]) for name in names)


def test_at_laptop_scale_every_mark_is_a_step_of_its_own() -> None:
    steps = [round(share * SCALES["laptop"].steps) for share in MARKS]
    assert len(set(steps)) == len(MARKS) and EARLY in MARKS


def test_no_row_is_read_twice_and_a_row_is_of_one_domain(finished: Path) -> None:
    (lab,) = labs(OPTIONS, finished)
    text = prepare(lab)
    assert len(text.train) == lab.sizes.steps * lab.sizes.batch
    assert {row["domain"] for row in text.held_out} == set(SHARES)
    assert {row["sample_id"] for row in text.train} == set(range(len(text.train)))


class Interruption(Exception):
    pass


class Interrupting:
    """A place for progress reports at which the job dies when it tells of this step."""

    def put(self, told: tuple[str, str, int, int]) -> None:
        if told[1:3] == ("train", 6):
            raise Interruption


def test_an_interrupted_training_keeps_the_same_marks(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = labs(OPTIONS, finished)
    (lab,) = labs(OPTIONS, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(grid, "_reports", Interrupting())
        with pytest.raises(Interruption):
            train_job(lab, "job")
    assert (lab.stage / "training" / "checkpoint-4").is_dir()
    train_job(lab, "job")
    text = prepare(lab)
    for share in MARKS:
        mine, other = at_mark(lab, text, share), at_mark(whole, text, share)
        pairs = zip(mine.state_dict().values(), other.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), share
    logs = [held.arm_folder("trained") / "metrics.jsonl" for held in (lab, whole)]
    assert logs[0].read_bytes() == logs[1].read_bytes()


# --- the rule ------------------------------------------------------------------------------------


def routing_of(
    first: list[float], *, domain: float, before: list[float] | None = None, at_start: float = 0.005
) -> dict[str, Any]:
    """Three seeds alike: rates per layer over a shuffled 0.15, a divergence over 0.01."""
    levels = {"trained": (first, domain), "initial": (before or [0.15] * 4, at_start)}
    return {
        arm: {
            "repeat_first": [rates] * 3,
            "repeat_first_shuffled": [[0.15] * 4] * 3,
            "domain_jsd": [[jsd] * 4] * 3,
            "domain_jsd_high": [[0.01] * 4] * 3,
        }
        for arm, (rates, jsd) in levels.items()
    }


def settled(
    early: list[float], *, after: float = 0.8, start: float = 0.3, use: float = 0.25
) -> list[dict[str, Any]]:
    rows = [[start] * 4, [0.4] * 4, [0.45] * 4, early, [after] * 4, [0.9] * 4, [1.0] * 4]
    return [{"share": rows, "by_usage": [[use] * 4] * len(MARKS), "uniform": 0.25}] * 3


MIDDLE = [0.16, 0.2, 0.2, 0.17]
EARLIER = [0.5, 0.6, 0.6, 0.6]


def word(routing: dict[str, Any], seeds: list[dict[str, Any]]) -> str:
    return combined([condition.word for condition in conditions(routing, seeds)])


@pytest.mark.parametrize(
    ("first", "domain", "early", "after", "expected"),
    [
        (MIDDLE, 0.1, EARLIER, 0.8, "REPRODUCED"),
        ([0.16, 0.17, 0.17, 0.17], 0.1, EARLIER, 0.8, "INCONCLUSIVE"),
        ([0.3, 0.2, 0.2, 0.2], 0.1, EARLIER, 0.8, "NOT REPRODUCED"),
        (MIDDLE, 0.004, EARLIER, 0.8, "NOT REPRODUCED"),
        (MIDDLE, 0.1, [0.6, 0.6, 0.6, 0.5], 0.8, "NOT REPRODUCED"),
        (MIDDLE, 0.1, [0.46, 0.47, 0.47, 0.47], 0.8, "INCONCLUSIVE"),
        (MIDDLE, 0.1, EARLIER, 0.5, "NOT REPRODUCED"),
    ],
)
def test_the_verdict_follows_its_rule(
    first: list[float], domain: float, early: list[float], after: float, expected: str
) -> None:
    assert word(routing_of(first, domain=domain), settled(early, after=after)) == expected


def test_what_an_untrained_router_has_too_is_not_the_trainings() -> None:
    same = routing_of(MIDDLE, domain=0.1, before=MIDDLE, at_start=0.1)
    found = {
        c.claim.split(",")[0].split(" (")[0]: c.word for c in conditions(same, settled(EARLIER))
    }
    unmoved = ("First choices repeat in the middle layers", "Domains use experts differently")
    assert [found[claim] for claim in unmoved] == ["INCONCLUSIVE", "INCONCLUSIVE"]
    assert word(routing_of(MIDDLE, domain=0.1, at_start=0.2), settled(EARLIER)) == "NOT REPRODUCED"


def test_what_is_settled_is_over_the_start_and_over_the_use_of_experts() -> None:
    (held, *_) = settled(EARLIER, start=0.3, use=0.25)
    assert above_chance(held) == pytest.approx(0.575 - 0.3)
    (held, *_) = settled(EARLIER, start=0.3, use=0.5)
    assert above_chance(held) == pytest.approx(0.575 - 0.5)
    trained = routing_of(MIDDLE, domain=0.1)
    assert word(trained, settled(EARLIER, use=0.5)) == "INCONCLUSIVE"
    assert word(trained, settled(EARLIER, use=0.7)) == "NOT REPRODUCED"


def test_the_smallest_rise_leaves_the_untrained_model_out() -> None:
    assert smallest_rise([[0.9], [0.1], [0.4], [0.5]]) == pytest.approx(0.1)


def test_an_excess_is_over_the_shuffled_rows_and_the_middle_leaves_the_ends_out() -> None:
    layers = {"repeat_first": MIDDLE, "repeat_first_shuffled": [0.15, 0.15, 0.17, 0.15]}
    two = {"repeat_first_two": [0.5] * 4, "repeat_first_two_shuffled": [0.4] * 4}
    rest = ("domain_jsd", "domain_jsd_by_chance", "vocabulary_jsd", "vocabulary_jsd_by_chance")
    others = {name: [0.1] * 4 for name in (*rest, "strongest_partner", "max_vio", "dead_experts")}
    found = arm_metrics([{"routing": {**layers, **two, **others}, "metrics": {}}])
    assert found[METRIC] == [pytest.approx((0.05 + 0.03) / 2)]
    assert found["repeat_excess_layer_0"] == [pytest.approx(0.01)]
    assert found["repeat_excess_first_two"] == [pytest.approx(0.1)]


def test_the_high_end_lies_above_all_but_one_in_a_hundred() -> None:
    shuffled_PL = torch.arange(100.0)[:, None] / 100
    assert high(shuffled_PL).tolist() == [pytest.approx(0.99)]
    assert high(torch.arange(200.0)[:, None]).tolist() == [pytest.approx(198.0)]
