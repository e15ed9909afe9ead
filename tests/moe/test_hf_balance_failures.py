"""Five ways in which transformers' balance loss is not what it says, and that ours is.

Each test first shows the failure in the installed transformers. Where that part fails, transformers
has mended it: the message says so, and the line goes out of the README's table. All rows of a batch
are alike, so that every part of it has the fractions and probabilities of the whole, and what a
split changes is the loss's scale alone; what a split changes otherwise is test_balance_invariance.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe import MoEConfig, MoEForCausalLM
from moe.balance import balance_sums, balance_values
from moe.routing import RouterSpec, Routing, route

ROWS = 8
IDS = list(range(3, 15))
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "use_cache": False,
}
GATE = "model.layers.1.mlp.gate.weight"
Maker = Callable[[float], Any]


def theirs(coef: float) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            **SIZES,
            intermediate_size=8,
            num_local_experts=4,
            router_aux_loss_coef=coef,
            output_router_logits=True,  # without it the loss is off, whatever its coefficient
        )
    )


def ours(coef: float) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(
        MoEConfig(
            **SIZES,
            moe_intermediate_size=8,
            num_experts=4,
            load_balancing_coef=coef,
            z_loss_coef=0.0,
        )
    )


def require_failure(shown: bool, failure: str) -> None:
    assert shown, (
        f"transformers {transformers.__version__} no longer {failure}: it is mended. Take the line "
        "out of the README's table of failures and this half out of the test."
    )


class LastGradient(TrainerCallback):
    """The router's gradient as the optimizer step sees it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gate = kwargs["model"].get_parameter(GATE).grad.clone()


def collated(rows: list[Any]) -> dict[str, Tensor]:
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gradient_in_their_trainer(model: nn.Module, folder: Path, *, micro: int, steps: int) -> Tensor:
    seen = LastGradient()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=steps,
            max_grad_norm=0.0,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
        train_dataset=[IDS] * ROWS,  # type: ignore[arg-type]
        data_collator=collated,
        callbacks=[seen],
    )
    trainer.train()
    return seen.gate


def balance_gradient(make: Maker, folder: Path, *, micro: int, steps: int) -> Tensor:
    """What the balance loss alone adds to the router's gradient in transformers' Trainer."""
    on, off = (
        gradient_in_their_trainer(make(coef), folder, micro=micro, steps=steps)
        for coef in (1.0, 0.0)
    )
    return on - off


def times(gradient: Tensor, reference: Tensor) -> float:
    """The factor between two gradients of one direction."""
    return float(torch.sum(gradient * reference) / torch.sum(reference * reference))


# --- 1. all layers in one pool


def collapsed_on(experts: tuple[int, int]) -> Tensor:
    logits_TE = torch.full((12, 8), -50.0)
    logits_TE[:, list(experts)] = 50.0
    return logits_TE


def test_layers_that_collapse_each_onto_other_experts_are_not_balanced() -> None:
    logits_LTE = [collapsed_on(pair) for pair in ((0, 1), (2, 3), (4, 5), (6, 7))]
    even = float(load_balancing_loss_func((torch.zeros(12, 8),), num_experts=8, top_k=2))
    pooled = float(load_balancing_loss_func(tuple(logits_LTE), num_experts=8, top_k=2))
    require_failure(
        pooled == pytest.approx(even),
        f"calls four layers that each use two experts of eight as balanced as even routing "
        f"({pooled:.3f}, and {even:.3f})",
    )
    spec = RouterSpec(num_experts=8, top_k=2)
    routings: list[Routing] = [route(logits_TE, spec) for logits_TE in logits_LTE]
    balance, _ = balance_values([balance_sums(routing) for routing in routings])
    assert float(balance) == pytest.approx(4.0)  # E / k: as bad as it can be; 1 is balanced


# --- 2. times the accumulation steps


@pytest.mark.parametrize(("micro", "steps"), [(4, 2), (1, 8)])
def test_accumulation_does_not_multiply_the_balance_loss(
    tmp_path: Path, micro: int, steps: int
) -> None:
    for make, expected in ((theirs, float(steps)), (ours, 1.0)):
        whole = balance_gradient(make, tmp_path, micro=ROWS, steps=1)
        split = balance_gradient(make, tmp_path, micro=micro, steps=steps)
        factor = times(split, whole)
        assert whole.abs().max() > 1e-3
        # Gradients are differences of two float32 gradients of size 1.
        if make is theirs:
            require_failure(
                factor == pytest.approx(expected, rel=1e-3),
                f"multiplies the balance loss by {steps} accumulation steps (now by {factor:.3f})",
            )
        else:
            assert factor == pytest.approx(expected, rel=1e-3)


# --- 3. times the processes


def measure_in_one_of_two(rank: int, folder: str) -> None:
    """One process: four rows of the eight; rank 0 writes the gradients (DDP has averaged them)."""
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)  # a port could be another's by now
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {
        make.__name__: balance_gradient(make, Path(folder), micro=ROWS // 2, steps=1).tolist()
        for make in (theirs, ours)
    }
    if rank == 0:
        (Path(folder) / "two.json").write_text(json.dumps(found), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_processes_do_not_multiply_the_balance_loss(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(measure_in_one_of_two, args=(str(tmp_path),), nprocs=2)
    two = json.loads((tmp_path / "two.json").read_text(encoding="utf-8"))
    factors = {}
    for make in (theirs, ours):
        one = balance_gradient(make, tmp_path, micro=ROWS, steps=1)
        factors[make.__name__] = times(torch.tensor(two[make.__name__]), one)
    require_failure(
        factors["theirs"] == pytest.approx(2.0, rel=1e-3),
        f"multiplies the balance loss by 2 processes (now by {factors['theirs']:.3f})",
    )
    assert factors["ours"] == pytest.approx(1.0, rel=1e-3)


# --- 4. added in eval


@torch.no_grad()
def eval_excess(model: nn.Module) -> float:
    """What the loss of a model in eval has beside the cross-entropy of its own logits."""
    ids = torch.tensor([IDS] * 2)
    out = model.eval()(input_ids=ids, labels=ids)
    logits = out.logits[:, :-1].flatten(0, 1)
    return float(out.loss - nn.functional.cross_entropy(logits, ids[:, 1:].flatten()))


def test_in_eval_the_loss_is_the_cross_entropy_alone() -> None:
    excess = eval_excess(theirs(0.5))
    require_failure(
        excess > 0.9,  # 0.5 * k at least
        f"adds the balance loss in eval (an excess of {excess:.3f})",
    )
    assert eval_excess(ours(0.5)) == pytest.approx(0.0, abs=1e-6)


# --- 5. lost under reentrant checkpointing


def router_gradient(model: Any, *, reentrant: bool | None) -> Tensor:
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    ids = torch.tensor([IDS] * 2)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    return model.get_parameter(GATE).grad


def test_no_form_of_checkpointing_loses_the_balance_loss() -> None:
    without_balance = router_gradient(theirs(0.0), reentrant=True)
    require_failure(
        torch.equal(router_gradient(theirs(1.0), reentrant=True), without_balance)
        and not torch.equal(router_gradient(theirs(1.0), reentrant=None), without_balance),
        "loses the balance loss under reentrant checkpointing",
    )
    plain, usual, reentrant = (router_gradient(ours(1.0), reentrant=r) for r in (None, False, True))
    assert torch.equal(plain, usual) and torch.equal(plain, reentrant)
    assert (plain - router_gradient(ours(0.0), reentrant=True)).abs().max() > 1e-3
