"""However eight pairs or judged answers are cut into micro-batches and processes, a step is one.

Two optimizer steps in float64 on rows of unequal length, one of which has no completion token, so
that a micro-batch of its own has nothing to learn. Weights are compared; an Adam eps of 1e-3 keeps
it from magnifying the order of additions. Measured at most 2e-7 (routers score in float32 whatever
the model's type), allowed 1e-6.
"""

import gc
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from rlhf.dpo import DPOTrainer
from rlhf.kto import KTOTrainer
from rlhf.losses.dpo import DPOLoss
from rlhf.losses.hinge import HingeLoss
from rlhf.losses.ipo import IPOLoss
from rlhf.losses.kto import KTOLoss
from rlhf.losses.orpo import ORPOLoss
from rlhf.losses.simpo import SimPOLoss
from rlhf.losses.table import PAIR_LOSSES
from rlhf.reference import FrozenCopy, NoReference, Reference
from sft.rows import PreferenceCollator
from sft.settings import TrainSettings
from sft.trainer import StageTrainer
from sft.unpaired import UnpairedCollator, handed_on

TOLERANCE = 1e-6
ALONE = (8, 1)  # rows of a micro-batch
SHARED = 2  # on each of two processes
LOSSES: dict[str, Any] = {
    "dpo": DPOLoss(beta=0.5, label_smoothing=0.1),
    "dpo_mean": DPOLoss(beta=5.0, normalisation="mean"),
    "ipo": IPOLoss(beta=0.5),
    "ipo_mean": IPOLoss(beta=0.5, normalisation="mean"),
    "hinge": HingeLoss(beta=0.5),
    "simpo": SimPOLoss(),
    "orpo": ORPOLoss(odds_coef=1.0),
    "kto": KTOLoss(beta=0.5, desirable_weight=1.3),
}
Found = dict[str, Tensor]


def tiny_lm() -> MoEForCausalLM:
    torch.manual_seed(0)
    model = MoEForCausalLM(
        MoEConfig(
            vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, initializer_range=0.2,
            pad_token_id=0,
        )
    )  # fmt: skip
    return model.double()


def pair_rows() -> list[Any]:
    rng = random.Random(0)

    def text(longest: int) -> list[int]:
        return [rng.randrange(3, 32) for _ in range(rng.randrange(1, longest))]

    rows = [
        {"prompt_ids": text(6), "chosen_ids": text(12), "rejected_ids": text(7), "sample_id": i}
        for i in range(8)
    ]
    rows[3] |= {"chosen_ids": [], "rejected_ids": []}
    return rows


def judged_rows() -> list[Any]:
    pairs = pair_rows()
    answers = [row["chosen_ids" if i % 3 else "rejected_ids"] for i, row in enumerate(pairs)]
    source = handed_on([row["prompt_ids"] for row in pairs])
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": answers[i],
            "other_ids": answers[source[i]],
            "is_good": i % 3 > 0,
            "sample_id": i,
        }
        for i, row in enumerate(pairs)
    ]


def trainer_of(name: str, micro: int, folder: Path) -> StageTrainer:
    model, loss = tiny_lm(), LOSSES[name]
    settings = TrainSettings(
        max_steps=2, batch_size=8, micro_batch_size=micro, lr=1e-2, lr_schedule="constant",
        adam_eps=1e-3, max_grad_norm=1e9, log_steps=1,
    )  # fmt: skip
    if isinstance(loss, KTOLoss):
        return KTOTrainer(
            model, settings, reference=FrozenCopy(model), loss=loss, rows=judged_rows(),
            collator=UnpairedCollator(pad_id=0), folder=folder,
        )  # fmt: skip
    reference: Reference = FrozenCopy(model) if loss.needs_reference else NoReference()
    return DPOTrainer(
        model, settings, reference=reference, loss=loss, rows=pair_rows(),
        collator=PreferenceCollator(pad_id=0), folder=folder,
    )  # fmt: skip


def measure(name: str, micro: int, folder: Path) -> Found:
    """The weights that two steps leave, and what the second one logged."""
    trainer = trainer_of(name, micro, folder)
    trainer.fit()
    found = {k.removeprefix("module."): v.clone() for k, v in trainer.model.state_dict().items()}
    last = {k: v for k, v in trainer.state.log_history[-1].items() if not k.startswith("router/")}
    return found | {f"log {k}": torch.tensor(float(v)).double() for k, v in last.items()}


def one_of_two(rank: int, folder: str) -> None:
    """Every loss on this process's share of the rows; rank 0 writes what it found."""
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    gc.freeze()  # every training ends with a full collection
    found = {f"{n}/{k}": v for n in LOSSES for k, v in measure(n, SHARED, Path(folder)).items()}
    if rank == 0:
        save_file(found, Path(folder) / "two.safetensors")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def over_two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(one_of_two, args=(str(folder),), nprocs=2)
    return load_file(folder / "two.safetensors")


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_same_for_every_split(name: str, over_two: Found, tmp_path: Path) -> None:
    whole, *others = [measure(name, micro, tmp_path / str(micro)) for micro in ALONE]
    start = f"{name}/"
    others.append({k.removeprefix(start): v for k, v in over_two.items() if k.startswith(start)})
    fresh = tiny_lm().state_dict()
    assert max(float((whole[k] - v).abs().max()) for k, v in fresh.items()) > 1e-3
    for found in others:
        assert found.keys() == whole.keys()
        for k, tensor in whole.items():
            rtol = TOLERANCE if k.startswith("log ") else 0.0  # a norm may be large
            torch.testing.assert_close(found[k], tensor, rtol=rtol, atol=TOLERANCE, msg=k)


def test_every_loss_is_here() -> None:
    assert {type(loss) for loss in LOSSES.values()} == {*PAIR_LOSSES.values(), KTOLoss}
