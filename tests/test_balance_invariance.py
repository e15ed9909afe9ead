"""However eight rows are cut into micro-batches and processes, the routers get the same gradient.

One optimizer step of `SFTTrainer` on eight rows of unequal length, whose router gradients are taken
before the optimizer sees them. The tolerance is of float32 sums in another order: measured at most
4e-7 of a layer's largest entry, allowed 1e-6. What a scope changes beyond that is an error.
"""

import gc
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from sft.rows import SupervisedCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.trainer import SFTTrainer

TOLERANCE = 1e-6
ROWS = 8
ALONE = (8, 4, 2, 1)  # rows of a micro-batch: 1, 2, 4, 8 accumulation steps
SHARED = (4, 2, 1)  # on each of two processes
# `running` is seen in its second step; the first, whose f is even, leaves the weights as they are.
POLICIES = {
    "optimizer_step": BalancePolicy(
        scope="optimizer_step", load_balancing_coef=5.0, z_loss_coef=0.5
    ),
    "sequence": BalancePolicy(scope="sequence", load_balancing_coef=5.0, z_loss_coef=0.5),
    "running": BalancePolicy(scope="running", load_balancing_coef=5.0, z_loss_coef=0.5),
    "z_loss": BalancePolicy(scope="micro_batch", z_loss_coef=0.5),
    "micro_batch": BalancePolicy(scope="micro_batch", load_balancing_coef=5.0, z_loss_coef=0.5),
    "bias": BalancePolicy(scope="off", bias_update_rate=0.05),
}
Found = dict[str, Tensor]


def tiny_lm(policy: BalancePolicy) -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=32,
            hidden_size=16,
            moe_intermediate_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            initializer_range=0.2,
            pad_token_id=0,
            router_selection_bias=policy.bias_update_rate > 0,
        )
    )


def some_rows() -> list[Any]:
    rng = random.Random(0)
    rows = []
    for index, length in enumerate([3, 13, 5, 8, 4, 12, 6, 9]):
        ids = [rng.randrange(3, 32) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": ids, "sample_id": index})
    return rows


class Seen(TrainerCallback):
    """The routers' gradients in the last step, as the optimizer is about to get them."""

    def __init__(self) -> None:
        self.held: Found = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.held = {
            name: parameter.grad.clone()
            for name, parameter in kwargs["model"].named_parameters()
            if "mlp.gate" in name
        }


def measure(name: str, micro: int, folder: Path) -> Found:
    """Router gradients of one split; of `bias` the biases that the steps leave."""
    policy, seen = POLICIES[name], Seen()
    trainer = SFTTrainer(
        tiny_lm(policy),
        TrainSettings(
            max_steps=2 if name in ("running", "bias") else 1,
            batch_size=ROWS,
            micro_batch_size=micro,
            lr=1e-12,
            lr_schedule="constant",
            max_grad_norm=1e9,
        ),
        rows=some_rows(),
        collator=SupervisedCollator(pad_id=0),
        folder=folder,
        balance=policy,
    )
    trainer.add_callback(seen)
    trainer.fit()
    if policy.bias_update_rate:
        return {k: v.clone() for k, v in trainer.model.named_buffers() if "correction_bias" in k}
    return {k.removeprefix("module."): v for k, v in seen.held.items()}


def named(found: Iterable[tuple[str, int, Found]]) -> Found:
    return {f"{name}/{m}/{k}": v for name, m, held in found for k, v in held.items()}


def one_of_two(rank: int, folder: str) -> None:
    """Every policy on this process's share of the rows; rank 0 writes what it found."""
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)  # a port could be another's by now
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    gc.freeze()  # every training ends with a full collection
    found = named((n, m, measure(n, m, Path(folder))) for n in POLICIES for m in SHARED)
    if rank == 0:
        save_file(found, Path(folder) / "two.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Found]]:
    """policy -> split ("8x1", "2x2", ...) -> what the routers got."""
    folder = tmp_path_factory.mktemp("splits")
    torch.multiprocessing.spawn(one_of_two, args=(str(folder),), nprocs=2)
    two = load_file(folder / "two.safetensors")
    table: dict[str, dict[str, Found]] = {}
    for name in POLICIES:
        splits = table[name] = {f"{m}x1": measure(name, m, folder) for m in ALONE}
        for micro in SHARED:
            start = f"{name}/{micro}/"
            held = {k.removeprefix(start): v for k, v in two.items() if k.startswith(start)}
            splits[f"{micro}x2"] = held
    return table


def deviation(found: Found, whole: Found) -> float:
    """The largest difference, over the largest entry of that layer."""
    assert found.keys() == whole.keys() and len(whole) == 2
    return max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in whole.items())


@pytest.mark.parametrize("name", ["optimizer_step", "sequence", "running", "z_loss"])
def test_the_router_gradient_is_the_same_for_every_split(everything: Any, name: str) -> None:
    whole, *others = everything[name].items()
    for split, found in others:
        assert deviation(found, whole[1]) <= TOLERANCE, (name, split)


def test_the_router_gradient_depends_on_the_split_when_f_is_of_the_micro_batch(
    everything: Any,
) -> None:
    splits = dict(everything["micro_batch"])
    whole = splits.pop("8x1")
    assert len(splits) == 6
    for split, found in splits.items():
        assert deviation(found, whole) > 1e-2, split


def test_with_one_row_a_micro_batch_the_micro_batch_is_the_sequence(everything: Any) -> None:
    one = everything["micro_batch"]["1x1"]
    assert deviation(one, everything["sequence"]["8x1"]) <= TOLERANCE


def test_the_scopes_are_different_losses(everything: Any) -> None:
    wholes = [everything[name]["8x1"] for name in ("optimizer_step", "sequence", "z_loss")]
    for i, one in enumerate(wholes):
        for other in wholes[i + 1 :]:
            assert deviation(one, other) > 1e-2
    # All rows in every step, and no weight moved: the last step's f is that of this one.
    running = everything["running"]["8x1"]
    assert deviation(running, everything["optimizer_step"]["8x1"]) <= TOLERANCE


def test_the_selection_bias_is_the_same_to_the_bit_for_every_split(everything: Any) -> None:
    whole, *others = everything["bias"].values()
    assert any(bias_E.abs().max() > 0 for bias_E in whole.values())
    for found in others:
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[k], bias_E) for k, bias_E in whole.items())
