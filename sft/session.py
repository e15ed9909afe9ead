"""A training command at work: its processes, its run folder, what it prints and what it leaves.

The decision to know: every process computes everything, also evaluations, so that sharded models
work; only the first one makes folders, writes files and prints.
"""

import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.utils import logging as transformers_logging

from moe.balance import has_selection_bias
from moe.errors import UserError
from moe.generation import sample
from moe.record import has_router
from sft.adapt import is_adapted
from sft.alarms import OnAlarm, Ring
from sft.checkpoint import PREFIX, newest_checkpoint
from sft.command import TrainingConfig, is_first_process, kind_of_option
from sft.examples import Examples
from sft.rows import PromptRow
from sft.run import Run, redact, write_text_atomic
from sft.settings import BalancePolicy, TrainSettings
from sft.state import Change, changes_between
from sft.text import TextPath, pad_batch
from sft.tracking import METRICS_FILE, Tracker, read_metrics
from sft.trainer import Diverged, StageTrainer

RESULTS = Path("results")
CHECKPOINTS = "checkpoints"
LINE_SECONDS = 10.0
_SHOWN = (
    "train/loss",
    "lm/accuracy",
    "preference/accuracy",
    "preference/margin",
    "reward/score",
    "policy/kl_sequence",
    "policy/entropy",
    "rollout/length",
    "router/max_vio",
)


class Stopped(UserError):
    """A training that cannot go on (it diverged, or a check of its own failed): exit code 3."""

    exit_code = 3


def join_processes() -> PartialState:
    """Meet the processes that a launcher started; alone without one. CPU where there is no GPU."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return PartialState(cpu=not torch.cuda.is_available())


def describe_device(state: PartialState) -> str:
    kind = "cpu"
    if torch.cuda.is_available():
        kind = torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    text = f"{kind}, float32, {threads} thread{'s' if threads > 1 else ''}"
    return text + (f", {state.num_processes} processes" if state.num_processes > 1 else "")


class Display:
    """Speaks on the first process; progress is a bar on a terminal, else a line now and then."""

    def __init__(self, stage: str, *, quiet: bool) -> None:
        self.stage = stage
        self.on = is_first_process() and not quiet
        self.trainer: StageTrainer | None = None
        self._bar: Any = None
        self._task: Any = None
        self._start: tuple[float, int] | None = None
        self._last_line = -math.inf

    def say(self, text: str) -> None:
        if self.on:
            print(text, flush=True)

    def header(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        self.say(title)
        for name, text in lines:
            self.say(f" {name:<7} {text}" if name else f"         {text}")

    def progress(self, step: int, total: int) -> None:
        if not self.on:
            return
        now = time.monotonic()
        if self._start is None:
            self._start = now, step
        if sys.stdout.isatty():
            self._draw(step, total)
        elif now - self._last_line >= LINE_SECONDS or step == total:
            self._last_line = now
            line = f"{self.stage} {step}/{total}  {self._left(now, step, total)}{self._facts()}"
            print(line.rstrip(), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _left(self, now: float, step: int, total: int) -> str:
        assert self._start is not None
        begun, first = self._start
        if step in (first, total):
            return ""
        seconds = round((now - begun) / (step - first) * (total - step))
        return f"{seconds // 60}:{seconds % 60:02d} left  "

    def _facts(self) -> str:
        last = {} if self.trainer is None else latest(self.trainer)
        shown = [f"{name.split('/')[-1]} {last[name]:.4g}" for name in _SHOWN if name in last]
        return "  ".join(shown[:5])

    def _draw(self, step: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Left

            self._bar = Progress(
                TextColumn(self.stage),
                BarColumn(),
                MofNCompleteColumn(),
                Left(),
                TextColumn("{task.fields[facts]}"),
            )
            self._task = self._bar.add_task(self.stage, total=total, facts="")
            self._bar.start()
        self._bar.update(self._task, completed=step, facts=self._facts())
        if step == total:
            self.close()


@dataclass(kw_only=True)
class Session:
    """One stage of one run. `tracker` is None off the first process.

    values: what config.yaml has to hold. changed_options: those that differ from a resumed run's.
    timings: seconds of parts of the training, and alarms: those that rang, for summary.json.
    """

    stage: str
    run: Run
    state: PartialState
    display: Display
    tracker: Tracker | None
    values: Mapping[str, Any] = field(default_factory=dict)
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    allow_changed: Sequence[str] = ()
    changed_options: Sequence[Change] = ()
    timings: dict[str, float] = field(default_factory=dict)
    on_alarm: OnAlarm = "tell"
    alarms: list[Ring] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.state.device
        return device

    @property
    def first(self) -> bool:
        return is_first_process()

    @property
    def checkpoints(self) -> Path:
        return self.run.folder / CHECKPOINTS

    def trainer_options(self) -> dict[str, Any]:
        return {
            "folder": self.checkpoints,
            "stage": self.stage,
            "tracker": self.tracker,
            "on_progress": self.display.progress,
            "fingerprints": self.fingerprints,
            "allow_changed": self.allow_changed,
            "on_resume": self.note_resume,
            "on_alarm": self.on_alarm,
            "say": self.display.say,
        }

    def note_resume(self, step: int, changes: Sequence[Change]) -> None:
        """Say and record what a resumed run finds changed, before its first step."""
        if not self.first:
            return
        options = {change.what for change in self.changed_options}
        found = [*self.changed_options, *(c for c in changes if c.what not in options)]
        for change in found:
            self.display.say(
                f"from step {step} on with another {change.what}: it was {change.was}, is "
                f"{change.now} (--allow-changed {change.kind})"
            )
        if found:
            self.run.note_changes(step, found, config=self.values)
        elif self.allow_changed:
            self.display.say(f"--allow-changed {' '.join(self.allow_changed)}: nothing is changed")

    def fit(self, trainer: StageTrainer, *, resume: bool) -> float:
        """Train to the end; the seconds it took."""
        self.display.trainer = trainer
        start = time.perf_counter()
        try:
            trainer.fit(resume=resume)
        finally:
            self.display.close()
        seconds = time.perf_counter() - start
        self.alarms += trainer.alarm_watch.rings
        if trainer.first_pass_seconds:
            self.timings["balance_first_pass_seconds"] = trainer.first_pass_seconds
            self.display.say(
                f"balance over the optimizer step: its first passes took "
                f"{trainer.first_pass_seconds:.1f} s of {seconds:.1f} s"
            )
        return seconds

    def log(self, metrics: Mapping[str, tuple[float, float]], *, step: int) -> None:
        """Metrics on held-out rows; those that the run, killed after it, has already stay."""
        if self.tracker is None:
            return
        held = {
            row["name"]
            for row in read_metrics(self.run.folder / METRICS_FILE)
            if (row["stage"], row["split"], row["step"]) == (self.stage, "val", step)
        }
        fresh = {name: value for name, value in metrics.items() if name not in held}
        if fresh:
            self.tracker.log(fresh, step=step, stage=self.stage, split="val")

    def leave(
        self, summary: Mapping[str, Any], *, samples: Sequence[Mapping[str, str]], seconds: float
    ) -> None:
        """Write summary.json and samples.jsonl and show the samples."""
        if not self.first:
            return
        changed = {"resumed_with_changes": held} if (held := self.run.changes) else {}
        rang = {"alarms": [asdict(ring) for ring in self.alarms]} if self.alarms else {}
        whole = {**summary, **changed, **rang, "timings": {"seconds": seconds, **self.timings}}
        self.run.write_json("summary.json", whole)
        if samples:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in samples]
            write_text_atomic(self.run.folder / "samples.jsonl", "".join(lines))
            assert self.tracker is not None
            self.tracker.samples(self.stage, samples)
        for row in samples:
            self.display.say(f"\n prompt  {clip(row['prompt'])}")
            for name in ("before", "after"):
                self.display.say(f" {name:<7} {clip(row[name])}")

    def conclude(self, lines: Sequence[str], *, where: Path) -> None:
        """The result, printed even with --quiet."""
        if not self.first:
            return
        print("")
        for line in lines:
            print(line)
        if self.alarms:
            rang = ", ".join(f"{ring.name} (step {ring.step})" for ring in self.alarms)
            print(f"alarms that rang: {rang}")
        if self.tracker is not None and self.tracker.sync_command and self.display.on:
            print(f"W&B offline; send with: {self.tracker.sync_command}")
        print(f"in {where}", flush=True)


def latest(trainer: StageTrainer) -> dict[str, float]:
    """The newest logged value of each metric; not every log has every metric."""
    values: dict[str, float] = {}
    for entry in trainer.state.log_history:
        values.update(entry)
    return values


def is_sharded() -> bool:
    """Whether the launcher splits the model's weights over the processes."""
    flags = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return any(os.environ.get(flag, "").lower() in ("1", "true") for flag in flags)


def whole_state(trainer: StageTrainer) -> dict[str, torch.Tensor] | None:
    """The weights of a sharded model, gathered from all processes; None where each has them all."""
    if not is_sharded():
        return None
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state


def clip(text: str, width: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 2] + ".."


def already_finished(config: TrainingConfig) -> bool:
    """Whether `--resume` names a run that has come to its end; says so.

    With --allow-changed there may be more to do: further steps, for one.
    """
    if config.resume is None or config.allow_changed or not Run.open(config.resume).finished:
        return False
    if is_first_process():
        print(f"{config.resume} is finished: there is nothing to resume.")
    return True


@contextmanager
def open_session(
    config: TrainingConfig,
    values: Mapping[str, Any],
    *,
    experiment: str,
    stage: str,
    command: str,
    state: PartialState,
    fingerprints: Mapping[str, str],
) -> Iterator[Session]:
    """The run folder and its record, made on the first process and known to all.

    values: what config.yaml holds. Raises UserError on every process when it cannot be made.
    """
    run, changed_options = _shared_run(config, values, experiment=experiment, state=state)
    display = Display(stage, quiet=config.quiet)

    def session(tracker: Tracker | None) -> Session:
        return Session(
            stage=stage,
            run=run,
            state=state,
            display=display,
            tracker=tracker,
            values=values,
            fingerprints=fingerprints,
            allow_changed=config.allow_changed,
            changed_options=changed_options,
            on_alarm=config.on_alarm,
        )

    if not is_first_process():
        try:
            yield session(None)
        except Diverged as error:
            raise Stopped(str(error)) from error
        return
    newest, _ = newest_checkpoint(run.folder / CHECKPOINTS)
    reached = int(newest.name.removeprefix(PREFIX)) if newest else 0
    if config.resume is not None:
        display.say(f"going on with {run.folder} at step {reached}, in the same order of rows")
    with (
        run,
        Tracker(
            run.folder,
            group=experiment,
            job_type=stage,
            name=run.name,
            config=run.config,
            mirror=config.mirror,
            resume_step={stage: reached},
            console=display.say,
            console_seconds=math.inf,
        ) as tracker,
    ):
        try:
            yield session(tracker)
        except Diverged as error:
            display.close()
            good, _ = newest_checkpoint(run.folder / CHECKPOINTS)
            kept = f" The last good checkpoint is {good}." if good else ""
            raise Stopped(f"{error}{kept}") from error
        except BaseException:
            display.close()
            if newest_checkpoint(run.folder / CHECKPOINTS)[0] is not None:
                hint = f"go on with: python -m {command} --resume {run.folder}"
                print(hint, file=sys.stderr, flush=True)
            raise


def _shared_run(
    config: TrainingConfig, values: Mapping[str, Any], *, experiment: str, state: PartialState
) -> tuple[Run, list[Change]]:
    """The run, opened or made by the first process; its folder or its error goes to all.

    With it the options that are allowed to differ from the run's own, and do.
    """
    told: list[Any] = [None, None]
    changes: list[Change] = []
    if is_first_process():
        try:
            if config.resume is not None:
                run, changes = _reopened(config.resume, values, allowed=config.allow_changed)
            else:
                run = Run.create(
                    RESULTS, experiment, values, out=config.out, overwrite=config.overwrite
                )
            told = [str(run.folder), None]
        except UserError as error:
            told = [None, str(error)]
    if state.num_processes > 1:
        told = broadcast_object_list(told)
    folder, error_text = told
    if error_text is not None:
        raise UserError(error_text)
    if is_first_process():
        return run, changes
    return Run(folder=Path(folder), config=redact(values)), []


def _reopened(
    folder: Path, values: Mapping[str, Any], *, allowed: Sequence[str]
) -> tuple[Run, list[Change]]:
    """The run to resume; raises UserError for an option that differs without being allowed to."""
    stored = Run.open(folder).config
    changes = [
        replace(change, kind=kind_of_option(change.what))
        for change in changes_between(stored, redact(values), kind=None)
    ]
    may_differ = [change.what for change in changes if change.kind in allowed]
    try:
        return Run.open(folder, values, ignore=may_differ), changes
    except UserError as error:
        kinds = sorted({str(c.kind) for c in changes if c.what not in may_differ})
        raise UserError(
            f"{error} --allow-changed {' '.join(kinds)} goes on all the same."
        ) from None


def train_settings(
    config: TrainingConfig, *, num_rows: int, state: PartialState, **fixed: Any
) -> TrainSettings:
    """The flags as settings; raises UserError when the batch does not divide."""
    steps = config.max_steps
    if steps is None:
        steps = max(1, round(num_rows * config.epochs / config.batch_size))
    values: dict[str, Any] = {
        "max_steps": steps,
        "batch_size": config.batch_size,
        "micro_batch_size": config.batch_size_per_device,
        "lr": config.lr,
        "lr_schedule": config.lr_schedule,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "log_steps": config.log_steps,
        "save_steps": config.save_steps,
        "keep_checkpoints": config.keep_checkpoints,
        "activation_checkpointing": config.activation_checkpointing,
    }
    settings = TrainSettings(**{**values, **fixed})
    if is_sharded() and settings.save_steps:
        raise UserError(
            "Checkpoints of a model that is sharded over processes are not written: give "
            "--save-steps 0."
        )
    settings.per_process(state.num_processes)
    return settings


def balance_policy(
    config: TrainingConfig, model: nn.Module
) -> tuple[BalancePolicy, dict[str, str]]:
    """The balance that the flags and the model ask for, and the options that are idle with it."""
    if not has_router(model):
        reason = "for this model: it has no router that can be observed"
        names = (
            *("load_balancing_coef", "z_loss_coef", "balance_scope"),
            *("running_decay", "bias_update_rate"),
        )
        return BalancePolicy(scope="off"), dict.fromkeys(names, reason)
    own = BalancePolicy.of_model(model, scope=config.scope)
    policy = BalancePolicy(
        scope=config.scope,
        load_balancing_coef=_either(config.load_balancing_coef, own.load_balancing_coef),
        z_loss_coef=_either(config.z_loss_coef, own.z_loss_coef),
        running_decay=config.running_decay,
        bias_update_rate=config.bias_update_rate,
    )
    idle = {}
    if policy.scope != "off" and not policy.on:
        idle = dict.fromkeys(("balance_scope", "running_decay"), "with both coefficients 0")
    if not has_selection_bias(model):
        idle["bias_update_rate"] = "for this model: its router has no selection bias"
    elif config.lora_rank or is_adapted(model):
        idle["bias_update_rate"] = "with adapters: their files do not hold the selection bias"
    return policy, idle


def _either(given: float | None, own: float) -> float:
    return own if given is None else given


def describe_balance(policy: BalancePolicy, model: nn.Module) -> str:
    if not has_router(model):
        return "no router"
    terms = []
    if policy.on:
        terms += [
            f"load balancing {policy.load_balancing_coef:g}",
            f"z-loss {policy.z_loss_coef:g}",
            f"f over {policy.scope}",
        ]
    if policy.bias_update_rate:
        terms.append(f"selection bias by {policy.bias_update_rate:g} a step")
    return ", ".join(terms) or "routers observed, not balanced"


def describe_log(session: Session) -> str:
    """metrics.jsonl, and what its mirror does."""
    mode = "none" if session.tracker is None else session.tracker.mode
    return "metrics.jsonl" + ("" if mode == "none" else f" + W&B {mode}")


def first_prompts(held_out: Examples, train: Examples, *, count: int) -> tuple[Examples, str]:
    """The examples whose prompts are answered before and after, and a word on where from."""
    if len(held_out):
        return held_out.select(range(min(count, len(held_out)))), "held-out"
    return train.select(range(min(count, len(train)))), "training (--val-set-size 0)"


def answers(
    model: nn.Module,
    prompts: Sequence[PromptRow],
    text_path: TextPath,
    *,
    max_new_tokens: int,
    device: torch.device,
) -> list[str]:
    """The greedy answer to each prompt."""
    if not prompts:
        return []
    ids, mask = pad_batch(
        [row["prompt_ids"] for row in prompts], pad_id=text_path.pad_id, side="left"
    )
    rollout = sample(
        model,
        ids.to(device),
        prompt_mask_BP=mask.to(device),
        max_new_tokens=max_new_tokens,
        temperature=0.0,
        stop_ids=text_path.stop_ids,
        seed=0,
        pad_id=text_path.pad_id,
    )
    return [
        text_path.decode(row[kept].tolist()).strip()
        for row, kept in zip(rollout.response_BR.cpu(), rollout.mask_BR.cpu(), strict=True)
    ]


def before_and_after(
    prompts: Sequence[PromptRow], before: Sequence[str], after: Sequence[str]
) -> list[dict[str, str]]:
    """Rows of samples.jsonl."""
    return [
        {"prompt": row["prompt"], "before": old, "after": new}
        for row, old, new in zip(prompts, before, after, strict=True)
    ]


def leave_processes(state: PartialState) -> None:
    """Wait for the others and part, so that no process is torn away from a collective call."""
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
