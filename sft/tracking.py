"""One tracker writes what a run measures: console, metrics.jsonl, and a mirror in W&B.

Decision to know: metrics.jsonl is the record, W&B is a copy. Whatever W&B does (no key, no network,
no package, a prompt, an exception) costs one printed line and never the run. This is the only file
that imports wandb, and it does so when a tracker opens its mirror.
"""

import contextlib
import json
import math
import netrc
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from moe.errors import UserError
from sft.run import plain, redact, write_text_atomic

__all__ = ["METRICS_FILE", "Tracker", "read_metrics", "redact"]

METRICS_FILE = "metrics.jsonl"

Mode = Literal["online", "offline", "disabled", "none"]

_KEY = re.compile(r"[a-z][a-z0-9_]*/[a-z][a-z0-9_]*(/layer_\d{2,})?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_COLUMNS = {"step", "stage", "split", "name", "value", "count"}
_PROJECT = "switchyard"
_ONLINE_SECONDS = 10.0  # to reach the server at the start
_UPLOAD_SECONDS = 60.0  # to send what is left at the end
_SHOWN_METRICS = 5


# --- The record: metrics.jsonl ----------------------------------------------------------------


def _rows_of(lines: Sequence[bytes], path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each complete line with its row; a torn last line, the trace of a kill, is left out."""
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if isinstance(row, dict) and row.keys() >= _COLUMNS:
            yield line, row
        elif number < len(lines):
            raise UserError(
                f"{path} line {number} is not a metric row; mend or delete this line "
                "(only a last line can be torn by a killed run)."
            )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, for plots and tables; works while the run still writes.

    Each row has step, stage, split, name, value, count. A value that was NaN or infinite is again
    that float (and the row says so under `nonfinite`), so that every value is a float.

    Raises:
        UserError: if there is no such file, or a line other than the last is broken.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No metrics in {path.parent}: {path.name} is not there.")
    rows = [row for _, row in _rows_of(path.read_bytes().splitlines(keepends=True), path)]
    for row in rows:
        if "nonfinite" in row:
            row["value"] = float(row["nonfinite"])
    return rows


def _cut_back(path: Path, resume_step: Mapping[str, int]) -> None:
    """Drops a torn last line and the rows that the resumed stages will write again.

    A stage that `resume_step` does not name keeps all its rows.
    """
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [
        line
        for line, row in _rows_of(lines, path)
        if row["step"] <= resume_step.get(row["stage"], math.inf)
    ]
    if kept != lines:
        write_text_atomic(path, b"".join(kept).decode("utf-8"))


def _row(name: str, value: float, count: float) -> dict[str, object]:
    """The part of a row that differs within one batch; JSON has no NaN, so null stands for it."""
    number, weight = float(value), float(count)
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name}: the count is {weight}; it must be 0 or more")
    row: dict[str, object] = {
        "name": name,
        "value": number if math.isfinite(number) else None,
        "count": int(weight) if weight == int(weight) else weight,
    }
    if not math.isfinite(number):
        row["nonfinite"] = str(number)  # nan, inf or -inf
    return row


def _check_names(metrics: Mapping[str, object], stage: str, split: str) -> None:
    for word, text in (("stage", stage), ("split", split)):
        if not _WORD.fullmatch(text):
            raise ValueError(f"{word} {text!r} is not a word of letters, digits, '_', '-' and '.'")
    for key in metrics:
        if not _KEY.fullmatch(key):
            raise ValueError(f"metric key {key!r} is not of the form area/quantity[/layer_03]")


# --- The mirror: W&B --------------------------------------------------------------------------


def _has_key(environ: Mapping[str, str]) -> bool:
    """Whether W&B would find a key without asking for one; the key itself is not read."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            # Not authenticators(): a `default` entry would count as a key for W&B.
            if host in netrc.netrc(str(file.expanduser())).hosts:
                return True
    return False


def _mirror_mode(environ: Mapping[str, str]) -> tuple[Mode, str | None]:
    """The mode that neither asks nor raises (online, offline, disabled), and a remark to print."""
    asked = environ.get("WANDB_MODE", "").strip().lower()
    mode = {"dryrun": "offline", "run": "online"}.get(asked, asked)
    if mode == "disabled":
        return "disabled", None
    if mode == "offline":
        return "offline", None
    if mode not in ("", "online"):
        return "offline", f"WANDB_MODE={asked} is not online, offline or disabled: logging offline"
    if _has_key(environ):
        return "online", None
    # Online without a key would wait for somebody to type one.
    remark = "WANDB_MODE=online, but there is no W&B key: logging offline" if mode else None
    return "offline", remark


@contextlib.contextmanager
def _nothing_left_behind(**variables: str) -> Iterator[None]:
    """Sets variables for the block, then undoes every change to WANDB_* and to sys's hooks.

    wandb leaves WANDB_SERVICE to child processes and puts itself into sys.exit and sys.excepthook.
    """
    before = {key: text for key, text in os.environ.items() if key.startswith("WANDB_")}
    leave, hook = sys.exit, sys.excepthook
    os.environ.update(variables)
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("WANDB_") and key not in before]:
            del os.environ[key]
        os.environ.update(before)
        sys.exit, sys.excepthook = leave, hook


def _heat_colours(load_LE: Sequence[Sequence[float]]) -> Any:
    """RGB cells, uint8 (L * cell, E * cell, 3): white fair, blue dead, orange twice fair or more.

    Blue and orange are told apart with every common kind of colour blindness; grey is no number.
    """
    import numpy

    ratio_LE = numpy.asarray(load_LE, dtype=numpy.float64)
    away_LE1 = numpy.clip(ratio_LE - 1.0, -1.0, 1.0)[:, :, None]
    white, blue, orange = (numpy.array(c) for c in ((255, 255, 255), (0, 90, 181), (230, 97, 0)))
    end = numpy.where(away_LE1 < 0, blue, orange)
    colour = numpy.nan_to_num(white + numpy.abs(away_LE1) * (end - white), nan=128.0)
    cell = max(4, min(32, 640 // max(ratio_LE.shape)))
    return colour.round().astype(numpy.uint8).repeat(cell, axis=0).repeat(cell, axis=1)


class _Mirror:
    """A W&B run that cannot hurt: every call is guarded, and the first failure prints one line."""

    def __init__(self, folder: Path, *, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.say = say
        self.mode: Mode = "none"
        self.directory: Path | None = None
        self.unsent = False
        self._run: Any = None
        self._wandb: Any = None
        self._stages: set[str] = set()
        self._complained = False

    def open(self, *, group: str, job_type: str, name: str, config: Mapping[str, object]) -> None:
        self.mode, remark = _mirror_mode(os.environ)
        if remark:
            self.say(remark)
        if self.mode == "disabled":
            return
        labels = {"group": group, "job_type": job_type, "name": name, "config": redact(config)}
        with _nothing_left_behind(**self._quiet()):
            try:
                self._start(labels, self._stored_id() or _new_id())
            except Exception:
                if self.mode == "online":
                    self.say("W&B unreachable, logging offline")
                self.mode = "offline"
                self._start_offline(labels)

    def _start_offline(self, labels: dict[str, Any]) -> None:
        """The second attempt; W&B holds the id of a failed one, so it takes a new id."""
        try:
            self._start(labels, _new_id())
        except Exception as error:
            self.mode = "none"
            self._complain(error)

    @staticmethod
    def _quiet() -> dict[str, str]:
        """No lines of W&B's own, and no crash reports unless the user has decided otherwise."""
        reporting = os.environ.get("WANDB_ERROR_REPORTING", "false")
        return {"WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": reporting}

    def _start(self, labels: dict[str, Any], run_id: str) -> None:
        import wandb

        assert self.mode != "none"
        settings = wandb.Settings(
            silent=True,
            console="off",
            init_timeout=_ONLINE_SECONDS,
            finish_timeout=_UPLOAD_SECONDS,
            finish_timeout_raises=True,
            # environment.json has the machine and the command line, without secrets or host name.
            host="-",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            dir=str(self.folder),
            mode=self.mode,
            id=run_id,
            resume="allow",
            reinit="create_new",  # several trackers may be open in one process
            settings=settings,
            **labels,
        )
        self._wandb = wandb
        self.directory = Path(self._run.settings.sync_dir)
        self._id_file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._id_file, run_id + "\n")

    @property
    def _id_file(self) -> Path:
        return self.folder / "wandb" / "run_id"

    def _stored_id(self) -> str | None:
        """The same W&B run before and after a resume, even when both were offline."""
        file = self._id_file
        return file.read_text(encoding="utf-8").strip() if file.is_file() else None

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            what = " ".join(f"{type(error).__name__}: {error}".split())[:160]
            self.say(f"W&B is incomplete ({what}); {METRICS_FILE} is not affected")

    def _guarded(self, action: Callable[[], None]) -> None:
        if self._run is None:
            return
        # Tables are staged in W&B's data folder, by default in the home folder; a later
        # `wandb sync` needs them, so they belong to the run.
        with _nothing_left_behind(WANDB_DATA_DIR=str((self.folder / "wandb" / "data").absolute())):
            try:
                action()
            except Exception as error:
                self._complain(error)

    def log(self, values: Mapping[str, object], *, stage: str, step: int) -> None:
        """One history row; each stage has its own step axis, so that stages may all begin at 0."""

        def send() -> None:
            axis = f"{stage}/step"
            if stage not in self._stages:
                self._stages.add(stage)
                self._run.define_metric(axis)
                self._run.define_metric(f"{stage}/*", step_metric=axis)
            self._run.log({axis: step, **values})

        self._guarded(send)

    def heat_map(self, load_LE: Sequence[Sequence[float]], *, stage: str, step: int) -> None:
        def send() -> None:
            rows = [
                [layer, expert, ratio if math.isfinite(ratio) else None]
                for layer, row in enumerate(load_LE)
                for expert, ratio in enumerate(row)
            ]
            caption = "load / fair share; rows are layers, columns experts; white 1, blue 0"
            self.log(
                {
                    f"{stage}/experts/heat_map": self._wandb.Image(
                        _heat_colours(load_LE), caption=f"{caption}, orange 2 or more"
                    ),
                    f"{stage}/experts/load_table": self._wandb.Table(
                        columns=["layer", "expert", "load_over_fair_share"], data=rows
                    ),
                },
                stage=stage,
                step=step,
            )

        self._guarded(send)

    def table(self, key: str, rows: Sequence[Mapping[str, Any]], *, stage: str, step: int) -> None:
        def send() -> None:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            table = self._wandb.Table(columns=columns, data=data, allow_mixed_types=True)
            self.log({key: table}, stage=stage, step=step)

        self._guarded(send)

    def summary(self, values: Mapping[str, object]) -> None:
        self._guarded(lambda: self._run.summary.update(redact(values)))

    def close(self, status: str) -> None:
        def finish() -> None:
            try:
                self._run.finish(exit_code=0 if status == "done" else 1)
            except Exception:
                self.unsent = True
                raise

        self.summary({"status": status})
        self._guarded(finish)
        self._run = None


def _new_id() -> str:
    return uuid.uuid4().hex[:8]


def _cell(value: object) -> object:
    value = plain(value)
    return value if value is None or isinstance(value, bool | int | float) else _text(value)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# --- The tracker ------------------------------------------------------------------------------


class Tracker:
    """Writes the metrics of one arm and seed; a context manager.

    Every number goes to `<folder>/metrics.jsonl` as a row {step, stage, split, name, value, count};
    the console gets a line now and then; W&B gets a copy. W&B keys are `<stage>/<metric>`, and
    `<stage>/<split>/<metric>` for splits other than train.
    """

    def __init__(
        self,
        folder: Path,
        *,
        group: str,
        job_type: str,
        name: str,
        config: Mapping[str, object],
        mirror: Literal["wandb", "none"] = "wandb",
        resume_step: Mapping[str, int] | None = None,
        console: Callable[[str], None] | None = print,
        console_seconds: float = 10.0,
    ) -> None:
        """Opens the record, going on with the one that is there, and the mirror.

        Args:
            folder: where metrics.jsonl stands or will stand; W&B writes below `folder/wandb`.
            group, job_type, name: experiment, stage, and arm with seed, as W&B arranges runs.
            config: shown by W&B, with secrets redacted.
            resume_step: for each stage that is resumed, the last step that is kept; later rows
                of that stage are dropped, so that no step appears twice.
            console: takes one line of text; None is silent.
            console_seconds: a stage prints its first metrics, then at most one line in this time;
                infinite prints no metrics, only what the mirror has to say.

        Raises:
            UserError: if an existing metrics.jsonl is broken before its last line.
        """
        self.folder = Path(folder)
        self.path = self.folder / METRICS_FILE
        self.say = console or (lambda text: None)
        self._console_seconds = console_seconds
        self._last_said: dict[str, float] = {}
        self._step: dict[str, int] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _cut_back(self.path, resume_step or {})
        # Unbuffered: each write is one system call, and a killed process leaves nothing behind.
        self._file = self.path.open("ab", buffering=0)
        self._mirror = _Mirror(self.folder, say=self.say)
        if mirror == "wandb":
            self._mirror.open(group=group, job_type=job_type, name=name, config=config)

    @property
    def mode(self) -> Mode:
        """What the mirror is doing: online, offline, disabled, or none."""
        return self._mirror.mode

    @property
    def sync_command(self) -> str | None:
        """The command that sends an offline mirror to W&B; None when nothing waits to be sent."""
        directory = self._mirror.directory
        if directory is None or (self.mode == "online" and not self._mirror.unsent):
            return None
        with contextlib.suppress(ValueError):
            directory = directory.relative_to(Path.cwd())
        return f"wandb sync {shlex.quote(str(directory))}"

    def log(
        self,
        metrics: Mapping[str, float | tuple[float, float]],
        *,
        step: int,
        stage: str,
        split: str = "train",
    ) -> None:
        """Writes the metrics of one step.

        Args:
            metrics: `area/quantity[/layer_03]` to a value, or to (value, count) where value is an
                average over count things, so that readers can average further.

        Raises:
            ValueError: for a key, stage or split of another form, or after `close`.
        """
        _check_names(metrics, stage, split)
        if self._file.closed:
            raise ValueError(f"{self.path} is closed; log before close()")
        head = {"step": int(step), "stage": stage, "split": split}
        rows = [
            _row(key, *(value if isinstance(value, tuple) else (value, 1)))
            for key, value in metrics.items()
        ]
        text = "".join(json.dumps({**head, **row}, allow_nan=False) + "\n" for row in rows)
        self._file.write(text.encode("utf-8"))
        self._step[stage] = int(step)
        prefix = stage if split == "train" else f"{stage}/{split}"
        values = {str(row["name"]): _float(row) for row in rows}
        self._mirror.log(
            {f"{prefix}/{name}": value for name, value in values.items()}, stage=stage, step=step
        )
        self._print(values, f"{prefix} step {step}", stage)

    def _print(self, values: Mapping[str, float], head: str, stage: str) -> None:
        now = time.monotonic()
        if math.isinf(self._console_seconds):
            return
        if values and now - self._last_said.get(stage, -math.inf) >= self._console_seconds:
            self._last_said[stage] = now
            shown = [
                f"{name} {value:.4g}" for name, value in values.items() if "layer_" not in name
            ]
            self.say("  ".join([head, *shown[:_SHOWN_METRICS]]))

    def heat_map(self, stage: str, load_LE: Any) -> None:
        """Shows in W&B, as an image and as a table, how evenly each layer uses its experts.

        Args:
            load_LE: load / fair share, (layers, experts), as rows of numbers, array or tensor;
                1.0 is fair, 0.0 dead, NaN where a layer has no such expert.

        Raises:
            ValueError: if it is not a matrix.
        """
        rows = plain(load_LE)
        if not (isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)):
            raise ValueError("heat_map takes a matrix: layers x experts")
        if len({len(row) for row in rows}) != 1 or not rows[0]:
            raise ValueError(f"heat_map: rows of {sorted({len(row) for row in rows})} experts")
        self._mirror.heat_map(rows, stage=stage, step=self._step.get(stage, 0))

    def samples(self, stage: str, rows: Sequence[Mapping[str, object]]) -> None:
        """Shows texts in W&B as one table; columns are the rows' keys, in order of appearance."""
        if rows:
            step = self._step.get(stage, 0)
            self._mirror.table(f"{stage}/samples", rows, stage=stage, step=step)

    def summary(self, values: Mapping[str, object]) -> None:
        """Puts end results, such as the verdict, into the W&B summary."""
        self._mirror.summary(values)

    def sync(self) -> None:
        """Returns when what is logged so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self, status: str = "done") -> None:
        """Ends the record and the mirror; a second call does nothing.

        Args:
            status: as in `Run.status`; anything but `done` marks the W&B run as failed.
        """
        if self._file.closed:
            return
        os.fsync(self._file.fileno())
        self._file.close()
        self._mirror.close(status)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close("done")
        elif isinstance(error, KeyboardInterrupt):
            self.close("interrupted")
        else:
            self.close(f"failed: {type(error).__name__}")


def _float(row: Mapping[str, object]) -> float:
    return float(str(row["nonfinite"] if row["value"] is None else row["value"]))
