"""The chassis under every stage: Hugging Face's loop, our denominators, balance and checkpoints.

Losses are sums divided once by the units of the whole optimizer step (all micro-batches, all
processes), so splitting a batch changes nothing. The overridden `Trainer` methods are those below
the line "Hugging Face's loop"; transformers is bounded to the minor versions they were tested with.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from moe.balance import expert_counts
from moe.errors import UserError
from moe.freeze import freeze_router as freeze
from moe.record import has_router, record_routing
from moe.stats import RouterStats
from sft.alarms import COMMON, SUPERVISED, Alarm, AlarmWatch, OnAlarm
from sft.balancing import Passes, StepBalance
from sft.checkpoint import (
    PREFIX,
    Checkpoint,
    checkpoints,
    fingerprint_tensors,
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    rotate,
    write_checkpoint,
)
from sft.loss import LossOutput, language_model_loss
from sft.order import StepOrder
from sft.settings import BalancePolicy, TrainSettings, training_arguments
from sft.state import (
    Change,
    changes_between,
    flattened,
    load_optimizer,
    load_rng_state,
    load_schedule,
    optimizer_state,
    rng_state,
    state_document,
)
from sft.tracking import Tracker

# Settings that say when to write, not what is computed: they may differ when a run is resumed.
RESUMABLE_SETTINGS = ("log_steps", "save_steps", "keep_checkpoints")
FORMAT = 2  # of what a trainer puts into a checkpoint; 1 had no device and one process's metrics


class Diverged(RuntimeError):
    """The loss or a gradient is not finite; nothing was written after the last good step."""


class StoppedByAlarm(Diverged):
    """An alarm rang where one was to stop the training."""


@dataclass
class _Denominators:
    """Of the optimizer step at hand, over all micro-batches and processes."""

    units: float = 1.0
    tokens: float = 1.0


@dataclass
class _Sums:
    """Diagnostics since the last log: sums with counts, maxima, router statistics."""

    sums: dict[str, list[float]] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    stats: RouterStats | None = None

    def add(self, output: LossOutput) -> None:
        for name, (total, count) in output.metrics.items():
            held = self.sums.setdefault(name, [0.0, 0.0])
            held[0] += float(total)
            held[1] += float(count)
        for name, value in output.maxima.items():
            self.maxima[name] = max(self.maxima.get(name, float("-inf")), float(value))

    def add_loss(self, output: LossOutput) -> None:
        held = self.sums.setdefault("train/loss", [0.0, 0.0])
        held[0] += float(output.loss_sum.detach())
        held[1] += float(output.count)

    def add_stats(self, stats: RouterStats) -> None:
        self.stats = stats if self.stats is None else self.stats.merge(stats)

    def document(self) -> dict[str, Any]:
        """As JSON; float64 survives it exactly. Pairs, because order is the metrics' order."""
        stats = None if self.stats is None else asdict(self.stats)
        return {
            "sums": list(self.sums.items()),
            "maxima": list(self.maxima.items()),
            "stats": stats and {k: v if k == "top_k" else v.tolist() for k, v in stats.items()},
        }

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> "_Sums":
        held = document["stats"]
        stats = None
        if held:
            sums: dict[str, Any] = {
                k: torch.tensor(v, dtype=torch.float64) for k, v in held.items() if k != "top_k"
            }
            stats = RouterStats(**sums, top_k=held["top_k"])
        return cls(sums=dict(document["sums"]), maxima=dict(document["maxima"]), stats=stats)


class _Watch(TrainerCallback):
    """Counts real optimizer steps, reports progress, logs and saves the last step."""

    def __init__(self, trainer: "StageTrainer") -> None:
        self.trainer = trainer

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.optimizer_steps += 1
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer.step_balance.forget_step()
        self.trainer.step_balance.end_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.trainer.on_progress is not None:
            self.trainer.on_progress(state.global_step, state.max_steps)
        # The last step is always logged and, where checkpoints are kept, saved.
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_save = self.trainer.settings.save_steps > 0
        return control


class StageTrainer(Trainer):
    """One stage of training: give it rows, a collator and an objective.

    Subclasses say what a unit is (`count_units`) and what a micro-batch costs (`objective`). Takes
    our model or any Hugging Face model. Raises `Diverged` rather than stepping on a non-finite
    loss.
    """

    loss_is_scaled_for_ga = True  # sums over the step's denominators, see compute_loss
    alarms: tuple[Alarm, ...] = COMMON  # what a stage watches

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        *,
        rows: Sequence[Mapping[str, Any]],
        collator: Callable[[list[Any]], dict[str, Tensor]],
        folder: Path,
        stage: str,
        balance: BalancePolicy | None = None,
        tracker: Tracker | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        fingerprints: Mapping[str, str] | None = None,
        routed_part: nn.Module | None = None,
        freeze_router: bool = False,
        allow_changed: Collection[str] = (),
        on_resume: Callable[[int, Sequence[Change]], None] | None = None,
        on_alarm: OnAlarm = "tell",
        say: Callable[[str], None] | None = None,
    ) -> None:
        """`routed_part` is the part whose routers are balanced and observed; default the model.

        freeze_router: take that part's routers out of training; the rest of it learns, and so does
        a selection bias. Raises UserError where there is none, or none that would be trained.
        fingerprints: of what the training rests on (data, tokenizer, model, ...); a resumed one
        must find the same. allow_changed: kinds of change (`sft.state.Change`) that it may find.
        on_resume: is told the step that is gone on from and what is changed, before any step.
        on_alarm: whether an alarm that rings is only told or also stops the training
        (StoppedByAlarm). say: tells it; by default the tracker's console, which may be silent, or
        print without a tracker.
        """
        if not rows:
            raise UserError(f"stage {stage}: there are no rows to train on.")
        self.settings = settings
        self.rows = rows
        self.stage = stage
        self.tracker = tracker
        self.on_progress = on_progress
        self.fingerprints = dict(fingerprints or {})
        self.allow_changed = frozenset(allow_changed)
        self.on_resume = on_resume
        self.on_alarm = on_alarm
        self.say = say or (print if tracker is None else tracker.say)
        self.alarm_watch = AlarmWatch(self.alarms)
        self._frozen: dict[str, str] | None = None
        self._changes: list[Change] = []
        self.balance = balance if balance is not None else BalancePolicy(scope="off")
        self.routed_part = model if routed_part is None else routed_part
        self.routed = has_router(self.routed_part)
        self.freeze_router = freeze_router
        if freeze_router and not freeze(self.routed_part).were_trainable:
            raise UserError(
                "freeze_router has no effect: no router's weights would be trained here, as with "
                "adapters on other parts; leave it out."
            )
        if self.balance.on and not self.routed:
            rate = self.balance.bias_update_rate  # kept, so that it is refused
            self.balance = BalancePolicy(scope="off", bias_update_rate=rate)
        self.step_balance = StepBalance(self.balance, self.routed_part, all_sum=self._all_sum)
        self.first_pass_seconds = 0.0  # of this process, for balance over the optimizer step
        self.optimizer_steps = 0  # counted where they are made, in this process of the training
        self.steps_before = 0  # those of the checkpoint that this training continues
        self._step = _Denominators()
        self._sums = _Sums()
        self._resumed: Checkpoint | None = None
        super().__init__(
            model=model,
            args=training_arguments(settings, folder),
            train_dataset=rows,
            data_collator=collator,
        )
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.add_callback(_Watch(self))
        self.model_accepts_loss_kwargs = False

    # What a stage defines.

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        """Units of a micro-batch that its loss is a sum over, known before the forward pass."""
        raise NotImplementedError

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        """The summed loss of a micro-batch."""
        raise NotImplementedError

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the objective needs beside the batch, computed without gradients and unobserved."""
        return batch

    def own_settings(self) -> dict[str, Any]:
        """What the stage computes by beside `TrainSettings`; a resumed run must agree with it."""
        return {}

    def frozen_models(self) -> Mapping[str, nn.Module]:
        """Models that the stage computes with, never trains, and makes anew when it is resumed.

        They are not in a checkpoint, where each would double it; their fingerprints are.
        """
        return {}

    def extra_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the stage adds to a checkpoint: tensors and a JSON document."""
        return {}, {}

    def load_extra_state(self, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
        """Restore what `extra_state` gave."""

    def fit(self, *, resume: bool = False) -> None:
        """Train to the end; `resume` continues from the newest checkpoint that verifies, if any.

        Raises UserError for a checkpoint of another training, and when a training that is not
        resumed would write over the checkpoints of an earlier one.
        """
        folder = Path(self.args.output_dir)
        if not resume and self.settings.save_steps and (held := checkpoints(folder)):
            raise UserError(
                f"{folder} holds {held[-1].name} of an earlier training: go on with it (resume), "
                "or choose another folder."
            )
        checkpoint = self._newest(folder) if resume else None
        if resume and checkpoint is None and self.on_resume is not None:
            self.on_resume(0, ())
        self.train(resume_from_checkpoint=checkpoint)

    def _newest(self, folder: Path) -> str | None:
        """The newest whole checkpoint, as the first process finds it; says what it passes over."""
        found: list[Any] = [None]
        if self.is_world_process_zero():
            checkpoint, notes = newest_checkpoint(folder)
            for note in notes:
                print(note, flush=True)
            if notes and checkpoint is None:
                print(f"No checkpoint in {folder} is whole: beginning at step 0.", flush=True)
            found = [None if checkpoint is None else str(checkpoint)]
        if self.accelerator.num_processes > 1:
            found = broadcast_object_list(found)
        newest: str | None = found[0]
        return newest

    # The loss.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = self.prepare(inputs)
        if self.routed:
            with record_routing(self.routed_part, keep_graph=self.balance.on) as trace:
                output = self.objective(model, inputs)
            routings = [forward.routings for forward in trace.forwards]
            loss = output.loss_sum / self._step.units
            if self.balance.on and model.training:
                loss = loss + self._balance_penalty(routings)
            if model.training:
                self.step_balance.count(routings)
            for each in routings:
                self._sums.add_stats(RouterStats.from_routings(each))
        else:
            output = self.objective(model, inputs)
            loss = output.loss_sum / self._step.units
        self._sums.add(output)
        self._sums.add_loss(output)
        if not bool(torch.isfinite(loss)):
            raise Diverged(
                f"stage {self.stage}, step {self.state.global_step + 1}: the loss is "
                f"{float(loss.detach())}; lower lr ({self.settings.lr})."
            )
        # DDP averages gradients over processes; the denominators are already global.
        return loss * self.accelerator.num_processes

    def _balance_penalty(self, passes: Passes) -> Tensor:
        """Balance and z-loss of this micro-batch, weighted by its share of the step's tokens."""
        charge = self.step_balance.charge(passes, step_tokens=self._step.tokens)
        tokens = charge.num_tokens
        self._sums.add(
            LossOutput(
                loss_sum=charge.balance,
                count=tokens,
                metrics={
                    "router/balance_loss": (charge.balance * tokens, tokens),
                    "router/z_loss": (charge.z * tokens, tokens),
                },
            )
        )
        return charge.penalty

    def _all_sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.accelerator.num_processes == 1:
            return value
        return self.accelerator.reduce(value, reduction="sum")

    def measure_step(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Set the denominators of the step that these micro-batches (of this process) make."""
        units = float(sum(self.count_units(batch) for batch in batches))
        tokens = float(sum(int(batch["attention_mask"].sum()) for batch in batches))
        totals = self._all_sum(
            torch.tensor([units, tokens], dtype=torch.float64, device=self.args.device)
        )
        if float(totals[0]) == 0:
            raise UserError(f"stage {self.stage}: a batch has nothing to learn, all is masked out.")
        self._step = _Denominators(units=float(totals[0]), tokens=float(totals[1]))
        count_LE = None
        if self.step_balance.needs_first_pass(len(batches)):
            start = time.perf_counter()
            count_LE = self._counts_without_gradient(batches)
            self.first_pass_seconds += time.perf_counter() - start
        self.step_balance.begin_step(count_LE)

    def _counts_without_gradient(self, batches: Sequence[Mapping[str, Any]]) -> Tensor:
        """Expert counts of a first pass over all micro-batches, with the dropout of the second."""
        total: Tensor | None = None
        prepared = [self.prepare(self._prepare_inputs(dict(batch))) for batch in batches]
        self.model.train()  # a loaded model may still be in eval mode before the first step
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices=devices),
            torch.no_grad(),
            record_routing(self.routed_part) as trace,
        ):
            for batch in prepared:
                self.objective(self.model, batch)
                for forward in trace.forwards:
                    count_LE = torch.stack([expert_counts(r) for r in forward.routings])
                    total = count_LE if total is None else total + count_LE
                trace.clear()
        assert total is not None
        return total

    # Hugging Face's loop.

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        if self._resumed is not None and self._resumed.manifest["step"] == self.state.global_step:
            self._load_rng_state(None)  # the loop's own call comes after the counting pass
        self.measure_step(batches)
        return batches, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return StepOrder(
            len(self.rows),
            num_samples=self.settings.max_steps * self.settings.batch_size,
            seed=self.settings.seed,
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # exact counts are moe.budget's business

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not bool(torch.isfinite(torch.as_tensor(norm))):
            raise Diverged(
                f"stage {self.stage}, step {self.state.global_step + 1}: the gradient's norm is "
                f"{float(norm)}; lower lr ({self.settings.lr})."
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" not in logs:
            return  # the summary that ends a training; `metrics.jsonl` has every row already
        metrics: dict[str, Any] = {"train/learning_rate": logs["learning_rate"]}
        if "grad_norm" in logs:
            metrics["train/grad_norm"] = logs["grad_norm"]
        metrics.update(self._drain())
        alarms, rings = self.alarm_watch.read(metrics, step=self.state.global_step)
        metrics.update(alarms)
        self.state.log_history.append(
            {"step": self.state.global_step, **{k: _value(v) for k, v in metrics.items()}}
        )
        if self.tracker is not None and self.is_world_process_zero():
            self.tracker.log(metrics, step=self.state.global_step, stage=self.stage)
        if self.is_world_process_zero():
            for ring in rings:
                self.say(ring.line)
        if rings and self.on_alarm == "stop":
            raise StoppedByAlarm(
                f"stage {self.stage}, step {self.state.global_step}: stopped by alarm "
                f"{' and '.join(ring.name for ring in rings)}. From a checkpoint, if "
                "there is one, it can go on with on-alarm tell."
            )

    def _drain(self) -> dict[str, Any]:
        """Diagnostics since the last log, reduced over processes; then forgotten."""
        sums, maxima, stats = self._sums.sums, self._sums.maxima, self._sums.stats
        self._sums = _Sums()
        if sums:
            table = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.args.device)
            table = self._all_sum(table)
            pairs = dict(zip(sums, table.tolist(), strict=True))
        else:
            pairs = {}
        metrics: dict[str, Any] = {
            name: (total / count, count) for name, (total, count) in pairs.items() if count
        }
        for name, value in maxima.items():
            held = torch.tensor([value], device=self.args.device)
            metrics[name] = float(self.accelerator.gather(held).max())
        if stats is not None:
            reduced = stats.summed(lambda sums: self._all_sum(sums.to(self.args.device)))
            metrics.update(
                {
                    name: value
                    for name, value in reduced.to_metrics().items()
                    if "/layer_" not in name or "load_entropy" in name or "max_vio/" in name
                }
            )
        return metrics

    # Checkpoints: see sft.checkpoint.

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        generators, words = rng_state(self.args.device)
        everyone = self._gather_objects(
            {"tensors": generators, "words": words, "sums": self._sums.document()}
        )
        extra_tensors, extra_document = self.extra_state()
        if self.is_world_process_zero():
            if self.tracker is not None:
                self.tracker.sync()  # a checkpoint says that the rows before it are written
            optimizer_tensors, optimizer_document = optimizer_state(self.optimizer, self.model)
            folder = Path(self.args.output_dir) / f"{PREFIX}{self.state.global_step}"
            write_checkpoint(
                folder,
                tensors={
                    "model": live_tensors(self.model),
                    "optimizer": optimizer_tensors,
                    "rng": {
                        f"{name}.{rank}": tensor
                        for rank, process in enumerate(everyone)
                        for name, tensor in process["tensors"].items()
                    },
                    **({"extra": extra_tensors} if extra_tensors else {}),
                    **({"balance": balance} if (balance := self.step_balance.state()) else {}),
                },
                documents={
                    "trainer_state": state_document(self.state),
                    "optimizer": optimizer_document,
                    "scheduler": self.lr_scheduler.state_dict(),
                    "rng": [process["words"] for process in everyone],
                    "settings": self._all_settings(),
                    "sums": [process["sums"] for process in everyone],
                    "extra": extra_document,
                    "alarms": self.alarm_watch.state_dict(),
                },
                facts={
                    "format": FORMAT,
                    "step": self.state.global_step,
                    "stage": self.stage,
                    "fingerprints": {**self.fingerprints, **self._frozen_fingerprints()},
                    **self._machine(),
                    "torch": torch.__version__,
                },
            )
            rotate(folder.parent, keep=self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _machine(self) -> dict[str, Any]:
        """What the bits of a result depend on beside code, data and settings."""
        return {
            "num_processes": self.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": self.args.device.type,
        }

    def _frozen_fingerprints(self) -> dict[str, str]:
        if self._frozen is None:
            models = self.frozen_models()
            self._frozen = {name: fingerprint_tensors(model) for name, model in models.items()}
        return self._frozen

    def _gather_objects(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        if self.accelerator.num_processes == 1:
            return [value]
        held: list[Any] = [None] * self.accelerator.num_processes
        torch.distributed.all_gather_object(held, value)
        return held

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint = read_checkpoint(Path(resume_from_checkpoint))
        self._changes = []
        self._check_same_run(checkpoint)
        load_strictly(self.model, checkpoint.tensors["model"], source=resume_from_checkpoint)
        self._check_same_settings(checkpoint)
        extra: Any = checkpoint.documents["extra"]
        self.load_extra_state(checkpoint.tensors.get("extra", {}), extra)
        balance = checkpoint.tensors.get("balance", {})
        self.step_balance.load_state(balance, device=self.args.device)
        sums: Any = checkpoint.documents["sums"]
        # Over another number of processes, the metrics since the last log begin anew.
        alike = len(sums) == self.accelerator.num_processes
        self._sums = _Sums.of_document(sums[self.accelerator.process_index]) if alike else _Sums()
        alarms: Any = checkpoint.documents.get("alarms")
        if alarms is not None:  # a checkpoint from before there were any watches from here on
            self.alarm_watch.load_state_dict(alarms)
        self.steps_before = int(str(checkpoint.manifest["step"]))
        self._resumed = checkpoint
        if self.on_resume is not None:
            self.on_resume(self.steps_before, tuple(self._changes))

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        held: Any = checkpoint.manifest
        if held.get("format") != FORMAT:
            raise UserError(
                f"{checkpoint.folder} was written by another version of this code (format "
                f"{held.get('format', 1)}, this is {FORMAT}): go on with that one, or begin anew."
            )
        machine = self._machine()
        prints = {**self.fingerprints, **self._frozen_fingerprints()}
        self._agree(checkpoint, {"stage": held["stage"]}, {"stage": self.stage}, kind=None)
        self._agree(checkpoint, {k: held.get(k) for k in machine}, machine, kind="machine")
        models = {"model", "reward_model", *self._frozen_fingerprints()}
        for name in sorted({*prints, *held["fingerprints"]}):
            self._agree(
                checkpoint,
                {f"fingerprint of {name}": held["fingerprints"].get(name)},
                {f"fingerprint of {name}": prints.get(name)},
                kind="model" if name in models else "tokenizer" if name == "tokenizer" else "data",
            )

    def _all_settings(self) -> dict[str, Any]:
        whole = {
            **asdict(self.settings),
            "balance": asdict(self.balance),
            "freeze_router": self.freeze_router,
            **self.own_settings(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(whole))  # as a checkpoint gives it back
        return plain

    def _check_same_settings(self, checkpoint: Checkpoint) -> None:
        held: Any = checkpoint.documents["settings"]
        # A checkpoint from before an option of routers existed was trained with its default.
        held = {
            "freeze_router": False,
            **held,
            "balance": {**asdict(BalancePolicy()), **held["balance"]},
        }
        now = flattened(self._all_settings())
        for name in RESUMABLE_SETTINGS:
            del now[name]
        then = flattened(held)
        self._agree(checkpoint, {name: then.get(name) for name in now}, now, kind="settings")

    def _agree(
        self,
        checkpoint: Checkpoint,
        then: Mapping[str, object],
        now: Mapping[str, object],
        *,
        kind: str | None,
    ) -> None:
        """Raises UserError for the first difference, unless this kind of change is allowed."""
        found = changes_between(then, now, kind=kind)
        if found and kind not in self.allow_changed:
            change = found[0]
            way = f" --allow-changed {kind} goes on all the same." if kind is not None else ""
            raise UserError(
                f"{checkpoint.folder} cannot be resumed: {change.what} was {change.was}, is "
                f"{change.now}; the result would not be that of the uninterrupted run.{way}"
            )
        self._changes += found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        changed = any(change.kind == "settings" for change in self._changes)
        document: Any = self._resumed.documents["optimizer"]
        load_optimizer(
            self.optimizer,
            self.model,
            self._resumed.tensors["optimizer"],
            document,
            own_options=changed,
        )
        schedule: Any = self._resumed.documents["scheduler"]
        load_schedule(self.lr_scheduler, schedule, own_options=changed)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            return
        rank = self.accelerator.process_index
        words: Any = self._resumed.documents["rng"]
        if rank >= len(words):
            return  # a process that the checkpoint knows nothing of
        end = f".{rank}"
        tensors = {
            name.removesuffix(end): tensor
            for name, tensor in self._resumed.tensors["rng"].items()
            if name.endswith(end)
        }
        load_rng_state(tensors, words[rank], device=self.args.device)


def _value(metric: Any) -> float:
    return metric[0] if isinstance(metric, tuple) else metric


class SFTTrainer(StageTrainer):
    """Cross-entropy on the labelled tokens: pretraining when all are, SFT when answers are."""

    alarms = SUPERVISED

    def __init__(self, model: nn.Module, settings: TrainSettings, **kwargs: Any) -> None:
        kwargs.setdefault("stage", "sft")
        kwargs.setdefault("balance", BalancePolicy.of_model(model))
        super().__init__(model, settings, **kwargs)

    def count_units(self, batch: Mapping[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def objective(self, model: nn.Module, batch: Mapping[str, Tensor]) -> LossOutput:
        outputs = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        )
        return language_model_loss(outputs.logits, batch["labels"])
