"""The chassis: denominators, balance, order, divergence, logging and resuming, on tiny models."""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from moe.balance import load_balancing_loss, z_loss
from moe.errors import UserError
from moe.record import record_routing
from moe.stats import RouterStats
from sft.adapt import LoraSpec, add_lora
from sft.checkpoint import MANIFEST, checkpoints, live_tensors, read_checkpoint
from sft.loss import LossOutput
from sft.order import StepOrder
from sft.rows import SupervisedCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.state import Change, load_rng_state, rng_state
from sft.trainer import Diverged, SFTTrainer, StageTrainer

Rows = list[Any]

# Adam divides by the gradient's size, so that where a gradient is nearly zero it steps on rounding
# noise. A larger eps takes that away; what is left between two splits is float32 addition order.
CALM_EPS = 1e-3
SPLIT_TOLERANCE = 1e-5


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "initializer_range": 0.2,  # routers with opinions: at 0.02 a tiny model routes by chance
        "pad_token_id": 0,
        "eos_token_id": 2,
    }
    return MoEForCausalLM(MoEConfig(**{**sizes, **config}))


def some_rows(count: int = 19, *, seed: int = 0) -> Rows:
    """Rows of unequal length of which a varying share is learned."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        ids = [rng.randrange(3, 32) for _ in range(rng.randrange(4, 14))]
        masked = rng.randrange(0, len(ids) - 2)
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:], "sample_id": i})
    return rows


def settings(**changes: Any) -> TrainSettings:
    chosen: dict[str, Any] = {
        "max_steps": 4,
        "batch_size": 8,
        "lr": 1e-2,
        "lr_schedule": "constant",
        "log_steps": 1,
    }
    return TrainSettings(**{**chosen, **changes})


def trainer(
    model: nn.Module,
    folder: Path,
    *,
    kind: type[SFTTrainer] = SFTTrainer,
    rows: Rows | None = None,
    collator: Callable[[list[Any]], dict[str, Tensor]] | None = None,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> SFTTrainer:
    return kind(
        model,
        settings(**changes),
        rows=some_rows() if rows is None else rows,
        collator=collator or SupervisedCollator(pad_id=0),
        folder=folder,
        **(options or {}),
    )


def trained(
    folder: Path, *, seed: int = 0, config: dict[str, Any] | None = None, **more: Any
) -> Any:
    made = trainer(tiny_lm(seed, **(config or {})), folder, **more)
    made.fit()
    return made


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}


def largest_difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(live_tensors(a).values(), live_tensors(b).values(), strict=True)
    return max(float((x - y).detach().abs().max()) for x, y in pairs)


class Gradients(TrainerCallback):
    """The gradients as the first optimizer step sees them."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.held:
            named = kwargs["model"].named_parameters()
            self.held = {n: p.grad.clone() for n, p in named if p.grad is not None}


# --- splitting a batch


def test_splitting_a_batch_changes_nothing_when_balance_counts_over_the_step(
    tmp_path: Path,
) -> None:
    balance = BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5, z_loss_coef=0.1)
    whole, *parts = (
        trained(
            tmp_path / str(micro),
            micro_batch_size=micro,
            adam_eps=CALM_EPS,
            max_grad_norm=1e9,
            options={"balance": balance},
        )
        for micro in (8, 4, 2)
    )
    assert largest_difference(whole.model, tiny_lm()) > 0.01
    for part in parts:
        assert largest_difference(whole.model, part.model) < SPLIT_TOLERANCE
        for one, other in zip(whole.state.log_history, part.state.log_history, strict=True):
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_splitting_a_batch_changes_nothing_without_balance(tmp_path: Path) -> None:
    off = {"balance": BalancePolicy(scope="off")}
    whole, *parts = (
        trained(tmp_path / str(m), micro_batch_size=m, adam_eps=CALM_EPS, options=off)
        for m in (8, 4, 2)
    )
    for part in parts:
        assert largest_difference(whole.model, part.model) < SPLIT_TOLERANCE


def test_splitting_a_batch_changes_the_gradient_when_balance_counts_over_micro_batches(
    tmp_path: Path,
) -> None:
    balance = BalancePolicy(scope="micro_batch", load_balancing_coef=0.5)
    whole, part = (
        trained(
            tmp_path / str(micro),
            micro_batch_size=micro,
            adam_eps=CALM_EPS,
            options={"balance": balance},
        )
        for micro in (8, 2)
    )
    assert largest_difference(whole.model, part.model) > 100 * SPLIT_TOLERANCE


def test_the_counting_pass_of_the_wider_scope_leaves_no_trace_in_the_metrics(
    tmp_path: Path,
) -> None:
    logs = []
    for scope in ("micro_batch", "optimizer_step"):
        made = trained(
            tmp_path / scope,
            max_steps=1,
            micro_batch_size=2,
            options={"balance": BalancePolicy(scope=scope, load_balancing_coef=1e-9)},
        )
        logs.append({k: v for k, v in made.state.log_history[0].items() if "balance" not in k})
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_gives_the_same_weights(tmp_path: Path, lora: bool) -> None:
    made = []
    for checkpointed in (False, True):
        model: nn.Module = tiny_lm()
        if lora:
            spec = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
            torch.manual_seed(1)
            model = add_lora(model, spec)
        made.append(
            trainer(
                model,
                tmp_path / str(checkpointed),
                activation_checkpointing=checkpointed,
                options={"balance": BalancePolicy(load_balancing_coef=0.5, z_loss_coef=0.1)},
            )
        )
        made[-1].fit()
    assert largest_difference(made[0].model, made[1].model) == 0.0
    assert made[0].state.log_history == made[1].state.log_history


# --- the balance loss


def test_a_balance_coefficient_of_zero_is_no_balance_to_the_bit(tmp_path: Path) -> None:
    zero = {"balance": BalancePolicy(scope="micro_batch")}
    off = {"balance": BalancePolicy(scope="off", load_balancing_coef=0.5, z_loss_coef=0.5)}
    a, b = trained(tmp_path / "a", options=zero), trained(tmp_path / "b", options=off)
    assert largest_difference(a.model, b.model) == 0.0
    assert a.state.log_history == b.state.log_history


@pytest.mark.parametrize("scope", ["micro_batch", "optimizer_step"])
def test_balance_is_in_the_gradient_and_not_in_the_logged_loss(tmp_path: Path, scope: Any) -> None:
    rows = some_rows(8)
    gradients, logs = [], []
    for policy in (
        BalancePolicy(scope="off"),
        BalancePolicy(scope=scope, load_balancing_coef=0.7, z_loss_coef=0.3),
    ):
        seen = Gradients()
        made = trainer(
            tiny_lm(), tmp_path / policy.scope, rows=rows, max_steps=1, max_grad_norm=1e9,
            options={"balance": policy},
        )  # fmt: skip
        made.add_callback(seen)
        made.fit()
        gradients.append(seen.held)
        logs.append(made.state.log_history[0])
    assert logs[0]["train/loss"] == logs[1]["train/loss"]
    assert "router/balance_loss" not in logs[0]

    model = tiny_lm().train()
    order = list(StepOrder(8, num_samples=8, seed=0))
    batch = SupervisedCollator(pad_id=0)([rows[i] for i in order])
    with record_routing(model, keep_graph=True) as trace:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    routings = trace.forwards[0].routings
    balance = torch.stack([load_balancing_loss(r) for r in routings]).mean()
    z = torch.stack([z_loss(r) for r in routings]).mean()
    assert logs[1]["router/balance_loss"] == pytest.approx(float(balance.detach()), rel=1e-5)
    assert logs[1]["router/z_loss"] == pytest.approx(float(z.detach()), rel=1e-5)
    (0.7 * balance + 0.3 * z).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        added = gradients[1][name] - gradients[0][name]
        torch.testing.assert_close(added, parameter.grad, rtol=1e-3, atol=1e-6)
        if "gate.weight" in name:
            assert parameter.grad.abs().max() > 1e-3


def test_coefficients_come_from_the_model_unless_given() -> None:
    model = tiny_lm(load_balancing_coef=0.25, z_loss_coef=0.125)
    policy = BalancePolicy.of_model(model, scope="optimizer_step")
    assert policy == BalancePolicy(
        scope="optimizer_step", load_balancing_coef=0.25, z_loss_coef=0.125
    )
    assert policy.on
    assert BalancePolicy.of_model(add_lora(model, LoraSpec(rank=1, alpha=1))) == BalancePolicy(
        load_balancing_coef=0.25, z_loss_coef=0.125
    )
    assert not BalancePolicy.of_model(tiny_lm(load_balancing_coef=0, z_loss_coef=0)).on


# --- the order of the rows


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    long, short = (list(StepOrder(7, num_samples=n, seed=3)) for n in (28, 10))
    assert long[:10] == short
    epochs = [long[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert list(StepOrder(7, num_samples=28, seed=4)) != long
    assert len(StepOrder(7, num_samples=10, seed=3)) == 10


def test_a_training_sees_every_row_once_per_epoch_in_that_order(tmp_path: Path) -> None:
    seen: list[int] = []

    def collator(rows: list[Any]) -> dict[str, Tensor]:
        seen.extend(row["sample_id"] for row in rows)
        return SupervisedCollator(pad_id=0)(rows)

    made = trainer(
        tiny_lm(), tmp_path, rows=some_rows(12), collator=collator, max_steps=6, batch_size=4,
        micro_batch_size=2, seed=5,
    )  # fmt: skip
    made.fit()
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12))
    assert seen == list(StepOrder(12, num_samples=24, seed=5))


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_steps": 0}, "max_steps is 0: it must be at least 1."),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1."),
        ({"micro_batch_size": -2}, "micro_batch_size is -2: it must be at least 0."),
        ({"log_steps": 0}, "log_steps is 0: it must be at least 1."),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0: it must be at least 1."),
        ({"lr": 0.0}, "lr 0.0 must be above 0."),
        ({"lr": float("nan")}, "lr nan must be above 0."),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(**changes)
    assert str(caught.value) == sentence


def test_a_batch_that_does_not_divide_is_refused_with_what_would(tmp_path: Path) -> None:
    assert settings(batch_size=12, micro_batch_size=3).per_process(2) == (3, 2)
    assert settings(batch_size=12).per_process(1) == (12, 1)
    with pytest.raises(UserError, match="batch_size 9 does not divide over 2 processes"):
        settings(batch_size=9).per_process(2)
    with pytest.raises(UserError) as caught:
        trainer(tiny_lm(), tmp_path, batch_size=8, micro_batch_size=3)
    assert str(caught.value) == (
        "batch_size 8 over 1 processes is 8 rows each, not a multiple of micro_batch_size 3: try "
        "one of [1, 2, 4, 8]."
    )


def test_a_stage_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage sft: there are no rows to train on"):
        trainer(tiny_lm(), tmp_path, rows=[])


def test_a_batch_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in some_rows(8)]
    with pytest.raises(UserError, match="stage sft: a batch has nothing to learn, all is masked"):
        trained(tmp_path, rows=rows)
    # A first token has no prediction, so learning only that one is nothing either.
    rows = [{**r, "labels": r["input_ids"][:1] + r["labels"][1:]} for r in rows]
    with pytest.raises(UserError, match="nothing to learn"):
        trained(tmp_path, rows=rows)


def test_one_row_with_something_to_learn_is_enough(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in some_rows(8)]
    rows[3]["labels"] = rows[3]["input_ids"]
    made = trained(tmp_path, rows=rows, micro_batch_size=2, max_steps=2)
    assert all(math.isfinite(row["train/loss"]) for row in made.state.log_history)
    assert largest_difference(made.model, tiny_lm()) > 0


# --- divergence


class NotANumber(SFTTrainer):
    """From the third step on, the loss is not a number."""

    def objective(self, model: nn.Module, batch: Any) -> LossOutput:
        output = super().objective(model, batch)
        factor = float("nan") if self.state.global_step >= 2 else 1.0
        return LossOutput(loss_sum=output.loss_sum * factor, count=output.count)


class BrokenGradient(SFTTrainer):
    """From the third step on, a finite loss whose gradient is not a number: d sqrt(x) at 0 * 0."""

    def objective(self, model: nn.Module, batch: Any) -> LossOutput:
        output = super().objective(model, batch)
        broken = (next(model.parameters()).sum() * 0.0).sqrt()
        loss_sum = output.loss_sum + broken if self.state.global_step >= 2 else output.loss_sum
        return LossOutput(loss_sum=loss_sum, count=output.count)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (NotANumber, "stage sft, step 3: the loss is nan; lower lr (0.01)."),
        (BrokenGradient, "stage sft, step 3: the gradient's norm is nan; lower lr (0.01)."),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_divergence_stops_the_run_before_any_weight_moves(
    tmp_path: Path, kind: type[SFTTrainer], sentence: str, max_grad_norm: float
) -> None:
    made = trainer(
        tiny_lm(), tmp_path, kind=kind, save_steps=1, max_grad_norm=max_grad_norm,
        micro_batch_size=4,
    )  # fmt: skip
    with pytest.raises(Diverged) as caught:
        made.fit()
    assert str(caught.value) == sentence
    assert made.optimizer_steps == 2
    newest = checkpoints(tmp_path)[-1]
    assert newest.name == "checkpoint-2"
    saved = read_checkpoint(newest).tensors["model"]
    for name, tensor in live_tensors(made.model).items():
        assert torch.equal(tensor, saved[name]), name


# --- what is logged


class Counted(StageTrainer):
    """A made-up objective: n units in a batch, each of loss 10 n, one of them right."""

    def count_units(self, batch: Any) -> int:
        return int(batch["units"])

    def objective(self, model: nn.Module, batch: Any) -> LossOutput:
        units = batch["units"].float()
        nothing = 0.0 * next(model.parameters()).sum()
        return LossOutput(
            loss_sum=nothing + 10.0 * units * units,
            count=units,
            metrics={"made/right": (torch.tensor(1.0), units)},
            maxima={"made/largest": units},
        )


class FakeTracker:
    def __init__(self) -> None:
        self.rows: list[tuple[int, str, dict[str, Any]]] = []

    def log(self, metrics: dict[str, Any], *, step: int, stage: str) -> None:
        self.rows.append((step, stage, dict(metrics)))

    def say(self, text: str) -> None: ...


def counted(folder: Path, tracker: Any = None, **changes: Any) -> Counted:
    def collator(rows: list[Any]) -> dict[str, Tensor]:
        units = sum(row["units"] for row in rows)
        return {"units": torch.tensor(units), "attention_mask": torch.ones(1, units)}

    order = list(StepOrder(2, num_samples=2, seed=0))
    rows = [{"units": 1 + 2 * order.index(i)} for i in range(2)]  # first 1 unit, then 3
    made = Counted(
        nn.Linear(2, 2),
        settings(**{"max_steps": 2, "batch_size": 1, "log_steps": 2, **changes}),
        rows=rows,
        collator=collator,
        folder=folder,
        stage="made",
        tracker=tracker,
    )
    made.fit()
    return made


def test_metrics_are_weighted_by_their_units_not_by_their_batches(tmp_path: Path) -> None:
    tracker = FakeTracker()
    (row,) = counted(tmp_path, tracker).state.log_history
    # loss: (10 * 1 + 30 * 3) / 4, not (10 + 30) / 2; right: 2 of 4, not (1 + 1/3) / 2
    assert row["train/loss"] == 25.0
    assert row["made/right"] == 0.5
    assert row["made/largest"] == 3.0
    assert row["step"] == 2
    ((step, stage, metrics),) = tracker.rows
    assert (step, stage) == (2, "made")
    assert metrics["train/loss"] == (25.0, 4.0)
    assert metrics["made/right"] == (0.5, 4.0)
    assert metrics["made/largest"] == 3.0
    assert "train/learning_rate" in metrics


def test_metrics_of_one_log_are_forgotten_by_the_next(tmp_path: Path) -> None:
    history = counted(tmp_path, log_steps=1).state.log_history
    assert [row["train/loss"] for row in history] == [10.0, 30.0]
    assert [row["made/largest"] for row in history] == [1.0, 3.0]


def test_the_language_model_loss_is_logged_per_token_over_unequal_micro_batches(
    tmp_path: Path,
) -> None:
    rows = some_rows(8)
    made = trained(tmp_path, rows=rows, max_steps=1, micro_batch_size=2)
    total = count = 0.0
    model = tiny_lm()
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        logp_SV = model(input_ids=ids).logits[0, :-1].detach().log_softmax(dim=-1)
        learned = labels[0, 1:] != -100
        total -= float(logp_SV.gather(1, ids[0, 1:, None])[learned].sum())
        count += float(learned.sum())
    assert made.state.log_history[0]["train/loss"] == pytest.approx(total / count, rel=1e-5)


def test_router_metrics_are_there_for_experts_and_absent_without(tmp_path: Path) -> None:
    sparse = trained(tmp_path / "sparse", max_steps=1)
    row = sparse.state.log_history[0]
    assert {"router/load_entropy", "router/max_vio", "router/balance_loss"} <= set(row)
    assert {"router/load_entropy/layer_00", "router/load_entropy/layer_01"} <= set(row)
    dense = trained(
        tmp_path / "dense",
        config={"mlp_layer_types": ["dense", "dense"]},
        max_steps=1,
        options={"balance": BalancePolicy(load_balancing_coef=0.5)},
    )
    assert not [name for name in dense.state.log_history[0] if name.startswith("router/")]
    assert not dense.balance.on


class OfThree(SFTTrainer):
    """As if three processes had all seen the same; what is added up is noted."""

    def _all_sum(self, value: Tensor) -> Tensor:
        self.added = [*getattr(self, "added", []), value.clone()]
        return 3 * value


def test_router_statistics_of_all_processes_are_added_up_as_one_vector(tmp_path: Path) -> None:
    rows = some_rows(8)
    made = trainer(tiny_lm(), tmp_path, kind=OfThree, rows=rows, max_steps=1, micro_batch_size=4)
    made.fit()
    assert isinstance(made, OfThree)
    model = tiny_lm()
    with record_routing(model) as trace, torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row["input_ids"]]))
    stats = RouterStats.from_trace(trace)
    sums = torch.cat([getattr(stats, f.name).flatten() for f in fields(stats) if f.name != "top_k"])
    # Other batches, so other sums of float32; what is counted is the same.
    torch.testing.assert_close(made.added[-1], sums, rtol=1e-5, atol=1e-5)
    whole = stats.merge(stats).merge(stats).to_metrics()
    found = {name: value for name, value in made.state.log_history[0].items() if name in whole}
    assert {"router/load_entropy", "router/max_vio_floor", "router/margin"} <= set(found)
    assert found == pytest.approx({name: whole[name] for name in found}, rel=1e-5, abs=1e-6)


def test_steps_are_counted_logged_and_reported(tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    made = trained(
        tmp_path,
        max_steps=5,
        micro_batch_size=2,
        log_steps=2,
        options={"on_progress": lambda done, total: progress.append((done, total))},
    )
    assert made.optimizer_steps == 5
    assert [row["step"] for row in made.state.log_history] == [2, 4, 5]
    assert progress == [(i, 5) for i in range(1, 6)]
    assert not checkpoints(tmp_path)  # save_steps 0 keeps none


def test_the_learning_rate_warms_up_and_decays(tmp_path: Path) -> None:
    made = trained(tmp_path, max_steps=4, warmup_steps=2, lr_schedule="linear")
    rates = [row["train/learning_rate"] for row in made.state.log_history]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


# --- resuming


def resumable(folder: Path, *, lora: bool, seed: int, **options: Any) -> SFTTrainer:
    """Attention dropout draws from torch's generator, so a lost RNG state would show."""
    scope: Any = "micro_batch" if lora else "optimizer_step"  # the latter also counts with dropout
    balance = BalancePolicy(scope=scope, load_balancing_coef=0.5, z_loss_coef=0.1)
    model: nn.Module = tiny_lm(seed, attention_dropout=0.1)
    if lora:
        model = add_lora(
            model, LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
        )
    return trainer(
        model,
        folder,
        max_steps=5,
        micro_batch_size=4,
        save_steps=1,
        keep_checkpoints=9,
        log_steps=2,
        lr_schedule="linear" if lora else "cosine",
        warmup_steps=1,
        options={"balance": balance, "fingerprints": {"rows": "abc"}, **options},
    )


def copied(folder: Path, to: Path, *, step: int) -> Path:
    shutil.copytree(folder / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def checksums(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_byte(
    tmp_path: Path, lora: bool
) -> None:
    whole = resumable(tmp_path / "whole", lora=lora, seed=0)
    whole.fit()
    for step in range(1, 5):
        folder = copied(tmp_path / "whole", tmp_path / f"from-{step}", step=step)
        again = resumable(folder, lora=lora, seed=77)
        assert largest_difference(again.model, whole.model) > 0
        again.fit(resume=True)
        assert again.optimizer_steps == 5 - step
        # Weights, moments, schedule, generators, log history and half-summed metrics, byte by byte.
        assert checksums(folder / "checkpoint-5") == checksums(tmp_path / "whole" / "checkpoint-5")
        assert again.state.log_history == whole.state.log_history


class Snapshot(TrainerCallback):
    """What the trainer holds when its first step begins."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.held:
            return
        names = {id(p): name for name, p in kwargs["model"].named_parameters()}
        optimizer = kwargs["optimizer"]
        self.held = {
            "step": state.global_step,
            "model": weights(kwargs["model"]),
            "moments": {
                f"{names[id(p)]}::{slot}": value.clone()
                for p, slots in optimizer.state.items()
                for slot, value in slots.items()
            },
            "rates": [group["lr"] for group in optimizer.param_groups],
            "scheduler": json.loads(json.dumps(kwargs["lr_scheduler"].state_dict())),
            "rng": torch.get_rng_state(),
            "python": random.getstate(),
        }


def test_a_resumed_training_begins_with_every_tensor_under_its_name(tmp_path: Path) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    folder = copied(tmp_path, tmp_path / "again", step=3)
    again = resumable(folder, lora=False, seed=77)
    snapshot = Snapshot()
    again.add_callback(snapshot)
    again.fit(resume=True)
    held, saved = snapshot.held, read_checkpoint(tmp_path / "checkpoint-3")
    assert held["step"] == 3
    for part in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
        name = f"model.layers.1.{part}"
        assert torch.equal(held["model"][name], saved.tensors["model"][name])
        for slot in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(
                held["moments"][f"{name}::{slot}"], saved.tensors["optimizer"][f"{name}::{slot}"]
            )
        assert saved.tensors["optimizer"][f"{name}::exp_avg_sq"].abs().max() > 0
    assert set(held["model"]) == set(saved.tensors["model"])
    assert set(held["moments"]) == set(saved.tensors["optimizer"])
    for name, tensor in saved.tensors["model"].items():
        assert torch.equal(held["model"][name], tensor)
    for name, tensor in saved.tensors["optimizer"].items():
        assert torch.equal(held["moments"][name], tensor)
    documents: dict[str, Any] = dict(saved.documents)
    assert held["scheduler"] == documents["scheduler"]
    assert held["rates"] == documents["scheduler"]["_last_lr"]
    assert torch.equal(held["rng"], saved.tensors["rng"]["torch.0"])
    version, words, gauss = documents["rng"][0]["python"]
    assert held["python"] == (version, tuple(words), gauss)


def test_a_checkpoint_holds_no_pickle_and_tied_weights_once(tmp_path: Path) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    newest = tmp_path / "checkpoint-5"
    assert {path.suffix for path in newest.iterdir()} == {".json", ".safetensors"}
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("checkpoint-")]
    names = set(read_checkpoint(newest).tensors["model"])
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = resumable(tmp_path / "whole", lora=False, seed=0)
    whole.fit()
    folder = copied(tmp_path / "whole", tmp_path / "again", step=2)
    copied(tmp_path / "whole", folder, step=4)
    damaged = folder / "checkpoint-4" / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    again = resumable(folder, lora=False, seed=77)
    again.fit(resume=True)
    assert capsys.readouterr().out == (
        f"{damaged} is missing or cut short: the checkpoint is damaged. Passing it over for the "
        "one before.\n"
    )
    assert again.optimizer_steps == 3
    assert largest_difference(again.model, whole.model) == 0.0


def test_resuming_with_no_checkpoint_begins_at_the_beginning(tmp_path: Path) -> None:
    made = []
    for name in "ab":
        made.append(resumable(tmp_path / name, lora=False, seed=0))
        made[-1].fit(resume=name == "b")
    assert largest_difference(made[0].model, made[1].model) == 0.0


def test_a_training_whose_checkpoints_are_all_damaged_begins_anew_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        made = trainer(tiny_lm(), tmp_path, max_steps=3, save_steps=1, keep_checkpoints=1)
        made.fit(resume=True)
        assert made.optimizer_steps == 3
        assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-3"]
        (tmp_path / "checkpoint-3" / "rng.json").write_text("{}", encoding="utf-8")
    told = capsys.readouterr().out
    assert "checkpoint-3/rng.json is missing or cut short" in told
    assert f"No checkpoint in {tmp_path} is whole: beginning at step 0.\n" in told


def test_as_many_checkpoints_are_kept_as_asked(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=5, save_steps=2, keep_checkpoints=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize(
    ("options", "sentence", "kind"),
    [
        ({"stage": "pretrain"}, "stage was sft, is pretrain;", None),
        ({"fingerprints": {"rows": "xyz"}}, "fingerprint of rows was abc, is xyz;", "data"),
        ({"fingerprints": {}}, "fingerprint of rows was abc, is None;", "data"),
        (
            {"fingerprints": {"rows": "abc", "tokenizer": "t"}},
            "fingerprint of tokenizer was None, is t;",
            "tokenizer",
        ),
        (
            {"fingerprints": {"rows": "abc", "model": "m"}},
            "fingerprint of model was None, is m;",
            "model",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_unless_that_is_allowed(
    tmp_path: Path, options: dict[str, Any], sentence: str, kind: str | None
) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    copied(tmp_path, tmp_path / "again", step=2)
    way = "" if kind is None else f" --allow-changed {kind} goes on all the same."
    again = resumable(tmp_path / "again", lora=False, seed=0, **options)
    with pytest.raises(UserError) as caught:
        again.fit(resume=True)
    assert str(caught.value) == (
        f"{tmp_path}/again/checkpoint-2 cannot be resumed: {sentence} the result would not be that "
        f"of the uninterrupted run.{way}"
    )


@pytest.mark.parametrize("key", ["threads", "num_processes", "device"])
def test_a_checkpoint_of_another_machine_layout_is_refused(tmp_path: Path, key: str) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    copied(tmp_path, tmp_path / "again", step=2)
    path = tmp_path / "again" / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, key: 7}), encoding="utf-8")
    now = "cpu" if key == "device" else 1
    with pytest.raises(UserError, match=f"cannot be resumed: {key} was 7, is {now}; the result"):
        resumable(tmp_path / "again", lora=False, seed=0).fit(resume=True)
    told: list[Any] = []
    allowed = resumable(
        tmp_path / "again",
        lora=False,
        seed=0,
        allow_changed=("machine",),
        on_resume=lambda step, changes: told.append((step, changes)),
    )
    allowed.fit(resume=True)
    assert told == [(2, (Change(kind="machine", what=key, was=7, now=now),))]
    assert allowed.state.global_step == 5


def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    copied(tmp_path, tmp_path / "again", step=2)
    path = tmp_path / "again" / "checkpoint-2" / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    del manifest["format"]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(UserError, match="another version of this code .format 1, this is 2.: go"):
        resumable(tmp_path / "again", lora=False, seed=0).fit(resume=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    resumable(tmp_path, lora=False, seed=0).fit()
    copied(tmp_path, tmp_path / "again", step=2)
    with pytest.raises(
        UserError, match="tensors are missing from .*checkpoint-2, first base_model"
    ):
        resumable(tmp_path / "again", lora=True, seed=0).fit(resume=True)


def test_a_training_is_not_begun_over_the_checkpoints_of_another(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=4, save_steps=2, keep_checkpoints=1)
    before = checksums(tmp_path / "checkpoint-4")
    with pytest.raises(UserError, match="holds checkpoint-4 of an earlier training: go on with it"):
        trained(tmp_path, max_steps=4, save_steps=2, keep_checkpoints=1)
    assert checksums(tmp_path / "checkpoint-4") == before


class Frozen(SFTTrainer):
    """A trainer that computes with a model of its own beside the one it trains."""

    judge: nn.Module

    def frozen_models(self) -> dict[str, nn.Module]:
        return {"judge": self.judge}


def test_a_frozen_model_is_known_by_its_fingerprint_and_another_is_refused(tmp_path: Path) -> None:
    made: Any = trainer(tiny_lm(), tmp_path, kind=Frozen, save_steps=2)
    made.judge = tiny_lm(5)
    made.fit()
    shutil.rmtree(tmp_path / "checkpoint-4")
    again: Any = trainer(tiny_lm(), tmp_path, kind=Frozen, save_steps=2)
    again.judge = tiny_lm(6)
    with pytest.raises(UserError, match="fingerprint of judge was .*--allow-changed model goes on"):
        again.fit(resume=True)
    same: Any = trainer(tiny_lm(), tmp_path, kind=Frozen, save_steps=2)
    same.judge = tiny_lm(5)
    same.fit(resume=True)
    assert largest_difference(same.model, made.model) == 0.0


def test_allowed_settings_take_effect_from_the_checkpoint_on(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=4, save_steps=2, lr_schedule="linear", lr=0.4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    told: list[Any] = []
    again = trainer(
        tiny_lm(),
        tmp_path,
        max_steps=8,
        save_steps=2,
        lr_schedule="linear",
        lr=0.8,
        weight_decay=0.1,
        options={
            "allow_changed": ("settings",),
            "on_resume": lambda step, changes: told.extend((step, *changes)),
        },
    )
    again.fit(resume=True)
    assert told[0] == 2
    assert {c.what: (c.was, c.now) for c in told[1:]} == {
        "lr": (0.4, 0.8),
        "max_steps": (4, 8),
        "weight_decay": (0.0, 0.1),
    }
    rates = {row["step"]: row["train/learning_rate"] for row in again.state.log_history}
    # Two steps of 0.4 falling to 0 over 4; then what 0.8 over 8 has at steps 2, 3, ...
    assert [rates[step] for step in range(1, 9)] == pytest.approx(
        [0.4, 0.3, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    )
    plain: Any = again.optimizer
    assert {group["weight_decay"] for group in plain.param_groups} == {0.1, 0.0}
    # It goes on with other settings, and the next resume compares with these.
    assert read_checkpoint(tmp_path / "checkpoint-8").documents["settings"]["lr"] == 0.8  # type: ignore[index,call-overload]


def test_nothing_changed_is_told_as_nothing_and_leaves_every_bit(tmp_path: Path) -> None:
    whole = trained(tmp_path / "a", max_steps=4, save_steps=2)
    copied(tmp_path / "a", tmp_path / "b", step=2)
    told: list[Any] = []
    everything = ("data", "tokenizer", "model", "settings", "machine")
    again = trainer(
        tiny_lm(seed=9),
        tmp_path / "b",
        max_steps=4,
        save_steps=2,
        options={
            "allow_changed": everything,
            "on_resume": lambda step, changes: told.append((step, changes)),
        },
    )
    again.fit(resume=True)
    assert told == [(2, ())]
    assert largest_difference(again.model, whole.model) == 0.0


def test_every_generator_is_saved_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's is stood in for: what is asked of it, and what it is given back."""
    given: list[Any] = []
    state = torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state)
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda held, device: given.append((held, device))
    )
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")

    def draw() -> tuple[float, float, float, float]:
        return random.random(), np.random.random(), float(np.random.normal()), float(torch.rand(()))

    held, without = rng_state(gpu), rng_state(cpu)
    assert set(held[0]) == {"torch", "cuda"} and set(without[0]) == {"torch"}
    first = draw()
    for device in (gpu, cpu):
        tensors, words = held if device is gpu else without
        load_rng_state(tensors, json.loads(json.dumps(words)), device=device)
        assert draw() == first
    assert given == [(state, gpu)]


def test_resuming_with_another_learning_rate_is_refused_and_with_another_log_step_is_not(
    tmp_path: Path,
) -> None:
    trained(tmp_path / "a", max_steps=4, save_steps=2)
    for name, changes in (("b", {"lr": 0.5}), ("c", {"log_steps": 3})):
        copied(tmp_path / "a", tmp_path / name, step=2)
        options = {"max_steps": 4, "save_steps": 2, **changes}
        again = trainer(tiny_lm(), tmp_path / name, **options)
        if "lr" in changes:
            with pytest.raises(UserError, match="cannot be resumed: lr was .*, is 0.5; the result"):
                again.fit(resume=True)
        else:
            again.fit(resume=True)
            assert again.state.global_step == 4
