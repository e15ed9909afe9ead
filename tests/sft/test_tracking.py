"""The record survives kills and resumes; the W&B copy is complete, and can never stop a run."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy
import pytest

from moe.errors import UserError
from sft.tracking import Tracker, _heat_colours, _mirror_mode, read_metrics

LABELS = {"group": "compare", "job_type": "ppo", "name": "ppo-s1", "config": {}}


def plain_tracker(folder: Path, **more: object) -> Tracker:
    options = {**LABELS, "mirror": "none", "console": None, **more}
    return Tracker(folder, **options)  # type: ignore[arg-type]


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()


# --- The record ---


def test_one_line_per_metric_with_its_count(tmp_path: Path) -> None:
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"loss/total": 0.5, "kl/policy": (0.1, 7.0)}, step=3, stage="ppo", split="val")
    head = '{"step": 3, "stage": "ppo", "split": "val", '
    assert lines(tmp_path) == [
        head + '"name": "loss/total", "value": 0.5, "count": 1}',
        head + '"name": "kl/policy", "value": 0.1, "count": 7}',
    ]


def test_a_row_is_on_disk_before_the_tracker_is_closed(tmp_path: Path) -> None:
    tracker = plain_tracker(tmp_path)
    tracker.log({"loss/total": 0.5}, step=1, stage="sft")
    assert len(lines(tmp_path)) == 1
    tracker.close()
    tracker.close()
    with pytest.raises(ValueError, match="is closed"):
        tracker.log({"loss/total": 0.5}, step=2, stage="sft")


def test_values_that_json_lacks_are_null_in_the_file_and_floats_again_for_readers(
    tmp_path: Path,
) -> None:
    with plain_tracker(tmp_path) as tracker:
        values = {"a/nan": math.nan, "a/inf": math.inf, "a/less": -math.inf}
        tracker.log(values, step=1, stage="sft")
    rows = [json.loads(line) for line in lines(tmp_path)]
    assert [row["value"] for row in rows] == [None] * 3
    assert [row["nonfinite"] for row in rows] == ["nan", "inf", "-inf"]
    read = [row["value"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert math.isnan(read[0]) and read[1:] == [math.inf, -math.inf]


def test_numbers_of_other_libraries_are_taken(tmp_path: Path) -> None:
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"a/b": numpy.float32(0.5), "a/c": numpy.int64(2)}, step=1, stage="sft")
    assert [json.loads(line)["value"] for line in lines(tmp_path)] == [0.5, 2.0]


@pytest.mark.parametrize(
    "key", ["loss", "Loss/total", "loss/total/3", "loss/total/layer_3", "a/b/c/d", "a b/c", "/a"]
)
def test_a_key_of_another_form_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with plain_tracker(tmp_path) as tracker, pytest.raises(ValueError, match=f"'{key}'"):
        tracker.log({"loss/total": 1.0, key: 1.0}, step=1, stage="sft")
    assert lines(tmp_path) == []  # the batch is refused whole


def test_a_layer_may_end_a_key(tmp_path: Path) -> None:
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"experts/max_load/layer_03": 1.2}, step=1, stage="sft")
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["name"] == "experts/max_load/layer_03"


@pytest.mark.parametrize("torn", ['{"step": 2, "sta', '{"step": 2, "stage": "sft"}', "{{{\n"])
def test_a_torn_last_line_is_ignored_by_readers_and_cut_off_on_resuming(
    tmp_path: Path, torn: str
) -> None:
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"loss/total": 0.5}, step=1, stage="sft")
    path = tmp_path / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert [row["step"] for row in read_metrics(path)] == [1]
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"loss/total": 0.4}, step=2, stage="sft")
    assert [json.loads(line)["step"] for line in lines(tmp_path)] == [1, 2]


def test_a_kill_leaves_every_row_that_was_logged(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sft.tracking import Tracker\n"
        "t = Tracker(Path(sys.argv[1]), group='g', job_type='j', name='n', config={}, "
        "mirror='none', console=None)\n"
        "for step in range(5): t.log({'a/b': 1.0}, step=step, stage='sft')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert ended.returncode == -9
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3, 4]


def test_resuming_drops_later_rows_of_that_stage_alone(tmp_path: Path) -> None:
    with plain_tracker(tmp_path) as tracker:
        for step in range(4):
            tracker.log({"loss/total": 0.5}, step=step, stage="sft")
            tracker.log({"loss/total": 0.6}, step=step, stage="ppo")
    before = lines(tmp_path)
    with plain_tracker(tmp_path, resume_step={"ppo": 1}) as tracker:
        for step in (2, 3):
            tracker.log({"loss/total": 0.6}, step=step, stage="ppo")
    assert sorted(lines(tmp_path)) == sorted(before)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]  # no temporary file stays


def test_a_line_broken_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with plain_tracker(tmp_path) as tracker:
        tracker.log({"loss/total": 0.5}, step=1, stage="sft")
    row = path.read_text(encoding="utf-8")
    path.write_text(f"{row}oops\n{row}", encoding="utf-8")
    with pytest.raises(UserError, match="line 2 is not a metric row"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        plain_tracker(tmp_path)
    with pytest.raises(UserError, match="No metrics in"):
        read_metrics(tmp_path / "absent" / "metrics.jsonl")


def test_the_console_shows_the_first_metrics_of_each_stage_and_then_waits(tmp_path: Path) -> None:
    said: list[str] = []
    with plain_tracker(tmp_path, console=said.append, console_seconds=1e9) as tracker:
        for step in range(3):
            metrics = {"loss/total": 0.12345, "experts/load/layer_00": 1.0}
            tracker.log(metrics, step=step, stage="sft")
        tracker.log({"loss/total": 2.0}, step=0, stage="ppo", split="val")
    assert said == ["sft step 0  loss/total 0.1235", "ppo/val step 0  loss/total 2"]


# --- Which mode ---


@pytest.mark.parametrize(
    ("environ", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "x" * 40}, "online"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "online"}, "offline"),  # no key: W&B would ask and wait
        ({"WANDB_MODE": "of"}, "offline"),
    ],
)
def test_the_mode_never_asks_and_never_raises(
    tmp_path: Path, environ: dict[str, str], mode: str
) -> None:
    found, remark = _mirror_mode({"NETRC": str(tmp_path / "absent"), **environ})
    assert found == mode
    assert (remark is None) == (environ.get("WANDB_MODE") not in ("online", "of"))


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("machine api.wandb.ai login user password abc\n", "online"),
        ("machine example.org login user password abc\n", "offline"),
        ("default login user password abc\n", "offline"),
        ("machine\n", "offline"),
    ],
)
def test_a_netrc_key_counts_only_for_its_server(tmp_path: Path, text: str, mode: str) -> None:
    file = tmp_path / "netrc"
    file.write_text(text, encoding="utf-8")
    assert _mirror_mode({"NETRC": str(file)})[0] == mode


def test_disabled_writes_the_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with Tracker(tmp_path, **LABELS, console=None) as tracker:
        tracker.log({"loss/total": 1.0}, step=1, stage="sft")
        tracker.heat_map("sft", [[1.0]])
        tracker.samples("sft", [{"prompt": "a"}])
        tracker.summary({"verdict": "BETTER"})
    assert (tracker.mode, tracker.sync_command) == ("disabled", None)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


class FakeRun:
    """A W&B run whose calls fail, or are counted."""

    def __init__(self, folder: str, *, broken: bool) -> None:
        self.settings = types.SimpleNamespace(sync_dir=folder + "/wandb/offline-run-1")
        self.broken = broken
        self.logged: list[dict[str, object]] = []
        self.summary: dict[str, object] = {}

    def define_metric(self, *args: object, **kwargs: object) -> None:
        if self.broken:
            raise ConnectionError("the service is gone")

    def log(self, values: dict[str, object]) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        if self.broken:
            raise ConnectionError("the service is gone")


class FakeWandb(types.ModuleType):
    """Stands in for wandb: online raises, offline gives a FakeRun."""

    def __init__(self, *, broken: bool = False, absent: bool = False) -> None:
        super().__init__("wandb")
        self.broken, self.absent = broken, absent
        self.calls: list[dict[str, object]] = []
        self.Settings = lambda **settings: settings

    def init(self, **options: object) -> FakeRun:
        if any(call["id"] == options["id"] for call in self.calls):
            raise RuntimeError(f"run ID {options['id']} is in use")  # as wandb 0.31 does
        self.calls.append(options)
        os.environ["WANDB_SERVICE"] = "somewhere"
        if self.absent or options["mode"] == "online":
            raise ConnectionError("no route")
        return FakeRun(str(options["dir"]), broken=self.broken)


def test_an_unreachable_server_costs_one_line_and_logging_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, said = FakeWandb(), []
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    tracker = Tracker(tmp_path, **LABELS, console=said.append)
    assert said == ["W&B unreachable, logging offline"]
    assert [call["mode"] for call in fake.calls] == ["online", "offline"]
    assert fake.calls[0]["settings"]["init_timeout"] == 10  # type: ignore[index]
    assert tracker.mode == "offline" and "wandb sync" in str(tracker.sync_command)
    tracker.close()


def test_the_real_client_falls_back_to_offline_when_nothing_answers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import sft.tracking as tracking\n"
        "tracking._ONLINE_SECONDS = 1.0\n"
        "with tracking.Tracker(Path(sys.argv[1]), group='g', job_type='j', name='n', config={}) "
        "as t:\n    t.log({'a/b': 1.0}, step=1, stage='sft')\n"
        "print(t.mode, len(list((t.folder / 'wandb').glob('offline-run-*'))))\n"
    )
    environ = {key: text for key, text in os.environ.items() if not key.startswith("WANDB_")}
    environ |= {"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environ)
    assert done.stdout.splitlines() == [
        "W&B unreachable, logging offline",
        "sft step 1  a/b 1",
        "offline 1",
    ]
    assert done.stderr == ""


def test_a_failing_mirror_prints_one_line_and_the_record_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker(tmp_path, **LABELS, console=said.append, console_seconds=1e9) as tracker:
        for step in range(3):
            tracker.log({"loss/total": 1.0}, step=step, stage="sft")
        tracker.heat_map("sft", [[1.0]])
        tracker.samples("sft", [{"prompt": object()}])
    assert len(lines(tmp_path)) == 3
    assert [text for text in said if "W&B" in text] == [
        "W&B is incomplete (ConnectionError: the service is gone); metrics.jsonl is not affected"
    ]


def test_without_any_working_wandb_the_record_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(absent=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Tracker(tmp_path, **LABELS, console=None) as tracker:
        tracker.log({"loss/total": 1.0}, step=1, stage="sft")
    assert (tracker.mode, tracker.sync_command, len(lines(tmp_path))) == ("none", None, 1)


def test_a_matrix_is_asked_for_by_the_heat_map(tmp_path: Path) -> None:
    with plain_tracker(tmp_path) as tracker:
        for wrong in ([1.0, 2.0], [], [[]], [[1.0], [1.0, 2.0]]):
            with pytest.raises(ValueError, match="heat_map"):
                tracker.heat_map("sft", wrong)


def test_heat_colours_are_white_when_fair_blue_when_dead_orange_when_double() -> None:
    cells = _heat_colours([[1.0, 0.0, 2.0, 5.0, math.nan]])[0]
    middle = [tuple(int(v) for v in cells[16 + 32 * i]) for i in range(5)]
    assert middle[:3] == [(255, 255, 255), (0, 90, 181), (230, 97, 0)]
    assert middle[3] == middle[2] and middle[4] == (128, 128, 128)


# --- A real offline run, read back by W&B's own reader ---


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    environ, hooks = dict(os.environ), (sys.exit, sys.excepthook)
    config = {"lr": 3e-4, "hub_token": "open sesame", "eos_token": "</s>", "seeds": (0, 1)}
    labels = {**LABELS, "config": config}
    for resume_step in (None, {"ppo": 1}):
        with Tracker(folder, **labels, console=None, resume_step=resume_step) as tracker:
            for step in (1, 2):
                metrics = {"loss/total": step / 4, "loss/worst": math.nan}
                tracker.log(metrics, step=step, stage="ppo")
            tracker.log({"loss/total": 0.125}, step=2, stage="ppo", split="val")
            tracker.heat_map("ppo", numpy.array([[1.0, 0.0], [2.0, math.nan]]))
            tracker.samples("ppo", [{"prompt": "a", "reward": 1.0}, {"prompt": "b", "tags": ["x"]}])
            tracker.summary({"verdict": {"word": "BETTER"}, "api_key": "open sesame"})
    left = dict(os.environ) == environ and (sys.exit, sys.excepthook) == hooks
    patch.undo()
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(runs[0])]
    told = subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout
    records = [json.loads(line) for line in told.splitlines()]
    history: dict[str, object] = {}
    summary: dict[str, object] = {}
    for record in records:
        history |= record.get("history", {}).get("item", {})
        summary |= record.get("summary", {}).get("update", {})
    return {
        "folder": folder,
        "runs": runs,
        "text": told,
        "run": next(record["run"] for record in records if "run" in record),
        "items": [record["history"]["item"] for record in records if "history" in record],
        "history": history,
        "summary": summary,
        "tracker": tracker,
        "left_nothing": left,
    }


def test_offline_has_group_job_type_name_and_config_without_secrets(offline: dict) -> None:
    run = offline["run"]
    assert (run["run_group"], run["job_type"], run["display_name"]) == ("compare", "ppo", "ppo-s1")
    config = run["config"]["update"]
    assert (config["lr"], config["seeds"], config["eos_token"]) == (3e-4, [0, 1], "</s>")
    assert config["hub_token"] == "<redacted>" and "open sesame" not in offline["text"]
    assert run["host"] == "-"


def test_offline_has_every_metric_on_the_axis_of_its_stage(offline: dict) -> None:
    first = offline["items"][0]
    assert (first["ppo/loss/total"], first["ppo/loss/worst"], first["ppo/step"]) == (0.25, "NaN", 1)
    assert offline["history"]["ppo/val/loss/total"] == 0.125


def test_offline_has_the_heat_map_as_image_and_as_table(offline: dict) -> None:
    history, files = offline["history"], offline["runs"][0] / "files"
    assert history["ppo/experts/heat_map._type"] == "image-file"
    assert (files / history["ppo/experts/heat_map.path"]).stat().st_size > 0
    table = json.loads((files / history["ppo/experts/load_table.path"]).read_text(encoding="utf-8"))
    assert table["columns"] == ["layer", "expert", "load_over_fair_share"]
    assert table["data"] == [[0, 0, 1.0], [0, 1, 0.0], [1, 0, 2.0], [1, 1, None]]


def test_offline_has_the_samples_as_a_table(offline: dict) -> None:
    path = offline["runs"][0] / "files" / offline["history"]["ppo/samples.path"]
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["columns"] == ["prompt", "reward", "tags"]
    assert table["data"] == [["a", 1.0, None], ["b", None, '["x"]']]


def test_offline_has_the_verdict_in_its_summary(offline: dict) -> None:
    assert offline["summary"]["verdict"] == {"word": "BETTER"}
    assert offline["summary"]["status"] == "done"


def test_offline_leaves_no_trace_in_the_process_and_none_outside_the_folder(offline: dict) -> None:
    assert offline["left_nothing"]
    assert str(offline["folder"] / "wandb" / "data") in offline["text"]  # where tables are staged


def test_a_resumed_run_keeps_its_id_and_its_steps_are_unique(offline: dict) -> None:
    run_id = (offline["folder"] / "wandb" / "run_id").read_text(encoding="utf-8").strip()
    assert len(offline["runs"]) == 2 and all(run_id in run.name for run in offline["runs"])
    rows = read_metrics(offline["folder"] / "metrics.jsonl")
    keys = [(row["step"], row["split"], row["name"]) for row in rows if row["step"] > 1]
    assert len(keys) == len(set(keys))


def test_the_sync_command_names_the_offline_run(offline: dict) -> None:
    command = offline["tracker"].sync_command
    assert command.startswith("wandb sync ") and offline["runs"][1].name in command
