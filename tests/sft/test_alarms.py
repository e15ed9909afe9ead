"""Alarms: windows by count, readings in a row, told once, kept over a resume, in a training."""

import json
import math
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from torch import Tensor, nn

from sft.alarms import (
    COMMON,
    SUPERVISED,
    Alarm,
    AlarmWatch,
    Read,
    Ring,
    Window,
)
from sft.command import TrainingConfig, in_force
from sft.loss import LossOutput
from sft.session import Stopped, open_session
from sft.settings import TrainSettings
from sft.tracking import METRICS_FILE, Tracker, read_metrics
from sft.trainer import SFTTrainer, StageTrainer, StoppedByAlarm

RISE = Alarm(
    name="rise",
    reads=(Read(metric="policy/kl", units=4),),
    measure=lambda windows: windows["policy/kl"].now - windows["policy/kl"].start,
    statistic="policy/kl now less the start",
    threshold=1.0,
    readings=2,
    source="a test",
    remedy="Do something.",
)


def rung(
    alarms: tuple[Alarm, ...], rows: list[dict[str, Any]], *, through_json: bool = False
) -> list[Ring]:
    """The alarms that ring over these rows of metrics, steps from 1; perhaps resumed at each."""
    watch = AlarmWatch(alarms)
    for step, row in enumerate(rows, start=1):
        watch.read(row, step=step)
        if through_json:
            state = json.loads(json.dumps(watch.state_dict(), allow_nan=False))
            watch = AlarmWatch(alarms)
            watch.load_state_dict(state)
    return watch.rings


def names(rings: list[Ring]) -> list[str]:
    return [ring.name for ring in rings]


def kl(*values: float, count: float = 2.0) -> list[dict[str, Any]]:
    return [{"policy/kl": (value, count)} for value in values]


# --- the machinery


def test_windows_are_made_of_counts_and_not_of_rows() -> None:
    # Windows of 4 units: rows 1, 2 are the start; 3, 4 the first reading; 4, 5 the second.
    assert rung((RISE,), kl(0, 1, 1.5, 1.4)) == []
    assert rung((RISE,), kl(0, 1, 1.5, 1.5)) == []  # one reading of exactly 1
    (ring,) = rung((RISE,), kl(0, 1, 1.5, 1.5, 1.6))
    assert (ring.step, ring.value) == (5, pytest.approx(1.05))
    (large,) = rung((RISE,), kl(0.5, 1.5, 1.5, count=4))
    assert (large.step, large.value) == (3, 1.0)


def test_a_window_weights_rows_by_their_counts() -> None:
    rows = [{"policy/kl": pair} for pair in ((0.0, 3), (4.0, 1), (5.0, 1), (1.0, 3), (1.0, 1))]
    assert rung((RISE,), rows) == []  # start 1; now 2 (rise 1), then 1 of rows 4 and 5
    rows[4] = {"policy/kl": (5.0, 1)}
    (ring,) = rung((RISE,), rows)
    assert ring.value == pytest.approx((1 * 3 + 5 * 1) / 4 - 1)


def test_readings_past_the_threshold_count_only_one_after_another() -> None:
    assert rung((RISE,), kl(0, 0, 0, 9, 0, 0, 9, count=4)) == []
    assert names(rung((RISE,), kl(0, 0, 0, 9, 9, 0, count=4))) == ["rise"]


def test_an_alarm_rings_once_and_is_logged_from_then_on() -> None:
    watch = AlarmWatch((RISE,))
    found = [watch.read(row, step=i)[0] for i, row in enumerate(kl(0, 9, 9, 0, 9, 9, count=4))]
    assert found == [{}, {}, {"alarm/rise": 1}, {"alarm/rise": 0}, {"alarm/rise": 0}, *found[5:]]
    assert found[5] == {"alarm/rise": 1}
    assert [(ring.name, ring.step) for ring in watch.rings] == [("rise", 2)]


def test_a_row_without_the_metric_is_no_reading() -> None:
    rows = kl(0, 9, count=4) + [{"policy/other": 1.0}] * 5
    assert rung((RISE,), rows) == []
    assert names(rung((RISE,), rows + kl(9, count=4))) == ["rise"]


def test_the_line_says_what_where_how_far_and_what_to_do() -> None:
    (ring,) = rung((RISE,), kl(0, 2, 2, count=4))
    assert ring.line == (
        "ALARM rise at step 3: 2, from 1 on (policy/kl now less the start). Do something."
    )


def test_the_state_goes_through_json_at_every_row_without_a_difference() -> None:
    rng = random.Random(0)
    rows = [{"policy/kl": (rng.gauss(i / 9, 1.0), rng.randrange(1, 4))} for i in range(40)]
    once = rung((RISE,), rows)
    assert names(once) == ["rise"]
    assert rung((RISE,), rows, through_json=True) == once


def test_numbers_that_are_none_stay_out_of_windows_and_ring_by_themselves() -> None:
    rows = kl(0, math.nan, 0, math.inf, 0, count=4)
    (ring,) = rung((*COMMON, RISE), rows)
    assert (ring.name, ring.step, ring.value) == ("not_finite", 2, 1.0)
    assert rung((RISE,), kl(0, 1e300, -1e300, 0, count=4), through_json=True) == []


def test_two_alarms_cannot_read_one_metric_in_windows_of_two_sizes() -> None:
    other = Alarm(**{**vars(RISE), "name": "b", "reads": (Read(metric="policy/kl", units=5),)})
    with pytest.raises(ValueError, match="policy/kl is read in windows of two sizes"):
        AlarmWatch((RISE, other))


def test_noise_is_the_standard_error_of_a_difference_without_the_trend() -> None:
    seen: list[Window] = []
    watched = Alarm(**{**vars(RISE), "measure": lambda w: seen.append(w["policy/kl"])})
    rung((watched,), kl(0, 2, 0, 2, 0, 2, 0))
    # Jumps of 2: variance 2**2 / 2 = 2; two rows against two rows: sqrt(2 * (1/2 + 1/2)).
    assert seen[-1].noise == pytest.approx(math.sqrt(2.0))
    assert seen[0].noise == math.inf  # three jumps
    assert (seen[-1].start, seen[-1].now, seen[-1].lowest) == (1.0, 1.0, 1.0)


# --- the alarms of every stage


def router_rows(
    *layers: list[float], vio: float = 1.0, floor: float = 0.05, dead: float = 0.0
) -> list[dict[str, float]]:
    """One row per place of the lists, which are each layer's load entropy."""
    rows = []
    for entropies in zip(*layers, strict=True):
        row = {"router/load_entropy": sum(entropies) / len(entropies), "router/max_vio": vio}
        row |= {f"router/load_entropy/layer_{i:02d}": x for i, x in enumerate(entropies)}
        row |= {f"router/max_vio/layer_{i:02d}": vio for i in range(len(entropies))}
        rows.append({**row, "router/max_vio_floor": floor, "router/dead_experts": dead})
    return rows


FALLING = [0.95] * 6 + [0.6] * 8


def test_the_collapse_of_one_layer_rings_though_the_mean_hardly_falls() -> None:
    steady = [[0.95] * len(FALLING)] * 7
    (ring,) = rung(COMMON, router_rows(FALLING, *steady))
    assert (ring.name, ring.value) == ("router_collapse", pytest.approx(0.35))
    assert rung(COMMON, router_rows(*steady)) == []


def test_unevenness_that_chance_alone_would_give_is_no_collapse() -> None:
    assert rung(COMMON, router_rows(FALLING, vio=1.0, floor=0.4)) == []


def test_experts_that_die_ring_and_those_dead_at_the_start_do_not() -> None:
    steady = [0.9] * 12
    dying = router_rows(steady[:5], dead=1.0) + router_rows(steady, dead=2.5)
    assert names(rung(COMMON, dying)) == ["dead_experts"]
    assert rung(COMMON, router_rows(steady * 2, dead=3.0)) == []
    few_tokens = [{**row, "router/max_vio_floor": 1.5} for row in dying]
    assert rung(COMMON, few_tokens) == []


def losses(values: list[float]) -> list[dict[str, Any]]:
    return [{"train/loss": (value, 300)} for value in values]


def test_a_loss_that_climbs_from_its_lowest_rings_and_one_that_falls_noisily_does_not() -> None:
    rng = random.Random(0)
    falling = [3.0 * 0.97**i + rng.gauss(0, 0.1) for i in range(80)]
    assert rung(SUPERVISED, losses(falling)) == []
    (ring,) = rung(SUPERVISED, losses(falling + [1.5 + 0.1 * i for i in range(10)]))
    assert ring.name == "loss_divergence"
    # As noisy as that: ten times the deviation leaves a climb of 0.7 within 4 standard errors.
    loud = [1.5 + rng.gauss(0, 1.0) for _ in range(300)]
    assert rung(SUPERVISED, losses(loud)) == []


# --- in a training


class Streamed(StageTrainer):
    """Logs a made-up metric: 0 in the first three steps, then 5. Learns something beside it."""

    alarms = (*COMMON, RISE)

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return len(batch["x"])

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        loss = model(batch["x"]).square().sum()
        count = torch.tensor(len(batch["x"]))
        value = 0.0 if self.state.global_step < 3 else 5.0
        return LossOutput(
            loss_sum=loss,
            count=count,
            metrics={"policy/kl": (torch.tensor(value * len(batch["x"])), count)},
        )


def collate(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    x = torch.tensor([[row["x"]] for row in rows])
    return {"x": x, "attention_mask": torch.ones_like(x)}


def streamed(folder: Path, **options: Any) -> Streamed:
    torch.manual_seed(0)
    settings = TrainSettings(max_steps=8, batch_size=4, log_steps=1, save_steps=4, lr=1e-3)
    rows = [{"x": i / 10} for i in range(12)]
    model = nn.Linear(1, 1)
    return Streamed(
        model, settings, rows=rows, collator=collate, folder=folder, stage="sft", **options
    )


def alarm_rows(trainer: Streamed) -> dict[int, float]:
    history = trainer.state.log_history
    return {row["step"]: row["alarm/rise"] for row in history if "alarm/rise" in row}


def test_a_training_tells_once_logs_from_the_ring_on_and_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with Tracker(
        tmp_path, group="g", job_type="sft", name="n", config={}, mirror="none", console=None
    ) as tracker:
        made = streamed(tmp_path / "checkpoints", say=said.append, tracker=tracker)
        made.fit()
    assert made.state.global_step == 8
    (line,) = said
    assert line.startswith("ALARM rise at step 5: 5, from 1 on")
    assert alarm_rows(made) == {5: 1.0, 6: 1.0, 7: 1.0, 8: 1.0}
    rows = [row for row in read_metrics(tmp_path / METRICS_FILE) if row["name"] == "alarm/rise"]
    assert [(row["step"], row["value"], row["count"]) for row in rows] == [
        (step, 1.0, 1) for step in range(5, 9)
    ]


def test_a_resumed_training_rings_as_the_uninterrupted_one_and_tells_only_what_is_new(
    tmp_path: Path,
) -> None:
    whole = streamed(tmp_path / "whole", say=lambda text: None)
    whole.fit()
    # One reading past the threshold lies before the checkpoint of step 4, one after it.
    for kept, new in (("checkpoint-4", ["rise"]), ("checkpoint-8", [])):
        shutil.copytree(tmp_path / "whole" / kept, tmp_path / kept / kept)
        said: list[str] = []
        again = streamed(tmp_path / kept, say=said.append)
        again.fit(resume=True)
        assert again.state.log_history == whole.state.log_history
        assert again.alarm_watch.state_dict() == whole.alarm_watch.state_dict()
        assert [line.split()[1] for line in said] == new


def test_on_alarm_stop_ends_the_training_after_the_row_is_written(tmp_path: Path) -> None:
    made = streamed(tmp_path, say=lambda text: None, on_alarm="stop")
    with pytest.raises(StoppedByAlarm, match="stage sft, step 5: stopped by alarm rise"):
        made.fit()
    assert made.state.global_step == 5
    assert alarm_rows(made) == {5: 1.0}


def test_a_training_without_trouble_logs_nothing_more(tmp_path: Path) -> None:
    class Calm(Streamed):
        alarms = COMMON

    calm: Any = Calm
    settings = TrainSettings(max_steps=8, batch_size=4, log_steps=1, lr=1e-3)
    made = calm(
        nn.Linear(1, 1), settings, rows=[{"x": 0.1}] * 4, collator=collate, folder=tmp_path,
        stage="sft",
    )  # fmt: skip
    made.fit()
    assert not any(key.startswith("alarm/") for row in made.state.log_history for key in row)
    assert SFTTrainer.alarms == SUPERVISED


def command_run(folder: Path, **options: Any) -> None:
    """What a command does with a session, around the made-up training."""
    config = TrainingConfig(model="m", data=Path("d.jsonl"), out=folder, mirror="none", **options)
    state = PartialState(cpu=True)
    with open_session(
        config, in_force(config, {}), experiment="sft", stage="sft", command="sft.train",
        state=state, fingerprints={},
    ) as session:  # fmt: skip
        given = session.trainer_options()
        kept = {name: given[name] for name in ("tracker", "on_alarm", "say")}
        seconds = session.fit(streamed(given["folder"], **kept), resume=False)
        session.leave({"steps": 8}, samples=[], seconds=seconds)
        session.conclude(["done"], where=folder)


def test_a_run_says_in_its_summary_and_at_its_end_what_rang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command_run(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["alarms"] == [
        {
            "name": "rise",
            "step": 5,
            "value": 5.0,
            "threshold": 1.0,
            "statistic": "policy/kl now less the start",
            "remedy": "Do something.",
        }
    ]
    said = capsys.readouterr().out
    assert said.count("ALARM rise at step 5") == 1
    assert "alarms that rang: rise (step 5)" in said


def test_a_run_that_an_alarm_stops_ends_with_code_3_and_names_its_checkpoint(
    tmp_path: Path,
) -> None:
    with pytest.raises(Stopped) as stopped:
        command_run(tmp_path / "run", on_alarm="stop")
    assert stopped.value.exit_code == 3
    assert "stopped by alarm rise" in str(stopped.value)
    assert "checkpoint-4" in str(stopped.value)
    # Whether a run stops early is no part of what it is: it is resumed without the option.
    stored = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "on_alarm" not in stored
