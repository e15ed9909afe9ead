"""KTO as a trainer: where it starts, what it moves, and its point of reference."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.dpo import SelfCheckFailed, completion_logps
from rlhf.kto import KTOTrainer, mismatched_log_ratios
from rlhf.losses.kto import KTOLoss
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.scores import score_answers
from sft.adapt import LoraSpec, add_lora
from sft.checkpoint import MANIFEST
from sft.settings import TrainSettings
from sft.unpaired import UnpairedCollator, handed_on

COLLATE = UnpairedCollator(pad_id=0)


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "initializer_range": 0.2,
    }
    return MoEForCausalLM(MoEConfig(**{**sizes, **config}))


def judged(count: int = 24) -> list[Any]:
    """Good answers have low ids, bad ones high ids; two good to one bad."""
    rng = random.Random(0)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(rng.randrange(2, 7))]

    prompts = [text(3, 32) for _ in range(count)]
    kinds = [i % 3 > 0 for i in range(count)]
    answers = [[*(text(3, 17) if good else text(17, 32)), 2] for good in kinds]
    return [
        {
            "prompt_ids": prompts[i],
            "completion_ids": answers[i],
            "other_ids": answers[source],
            "is_good": kinds[i],
            "sample_id": i,
        }
        for i, source in enumerate(handed_on(prompts))
    ]


def kto_trainer(
    model: nn.Module, folder: Path, *, reference: Reference, **changes: Any
) -> KTOTrainer:
    options = changes.pop("options", {})
    chosen = {"max_steps": 3, "batch_size": 8, "lr": 1e-2, "log_steps": 1, **changes}
    return KTOTrainer(
        model,
        TrainSettings(**chosen),
        reference=reference,
        rows=judged(),
        collator=COLLATE,
        folder=folder,
        **options,
    )


@torch.no_grad()
def shifted(seed: int) -> nn.Module:
    model = tiny_lm()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def test_the_loss_starts_at_half_the_weights_and_its_point_of_reference_at_0(
    tmp_path: Path,
) -> None:
    model = tiny_lm()
    trainer = kto_trainer(
        model, tmp_path, reference=FrozenCopy(model), batch_size=24, micro_batch_size=4,
        options={"loss": KTOLoss(beta=1.0, desirable_weight=0.5, undesirable_weight=2.0)},
    )  # fmt: skip
    trainer.fit()
    first, *_, last = trainer.state.log_history
    assert first["train/loss"] == pytest.approx(0.5 * (16 * 0.5 + 8 * 2.0) / 24, abs=1e-6)
    assert first["preference/reference_point"] == pytest.approx(0.0, abs=1e-6)
    assert last["train/loss"] < first["train/loss"]


def test_good_answers_rise_above_bad_ones(tmp_path: Path) -> None:
    model = tiny_lm()
    reference = FrozenCopy(model)
    trainer = kto_trainer(
        model, tmp_path, reference=reference, max_steps=12, options={"loss": KTOLoss(beta=0.5)}
    )
    trainer.fit()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-1]
    assert first["reward/chosen"] == pytest.approx(0.0, abs=1e-6)
    assert last["reward/chosen"] > 0.5 > 0.0 > last["reward/rejected"]
    scores = score_answers(
        model, reference, trainer.loss, batches=[COLLATE(judged()[:10]), COLLATE(judged()[10:])]
    )
    assert scores.num_answers == 24 and scores.accuracy == 1.0
    assert scores.margin is not None and scores.margin > 0.5


def test_a_reference_that_is_not_the_policy_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckFailed, match="the preference loss starts at 0.*not at 0.500000"):
        kto_trainer(tiny_lm(), tmp_path, reference=FrozenCopy(tiny_lm(1))).fit()


def test_the_point_of_reference_is_of_the_whole_step_and_of_the_mismatched_answers(
    tmp_path: Path,
) -> None:
    model, reference = shifted(1), FrozenCopy(shifted(2))
    batches = [COLLATE(judged()[:3]), COLLATE(judged()[3:8])]
    trainer = kto_trainer(model, tmp_path, reference=reference)
    trainer.measure_step(batches)
    ratios = []
    with torch.no_grad():
        for row in judged()[:8]:
            alone = COLLATE([{**row, "completion_ids": row["other_ids"]}])
            one, _ = completion_logps(model, alone)
            two, _ = completion_logps(reference.model, alone)
            ratios.append(float(one - two))
    mean = sum(ratios) / 8
    assert float(trainer.reference_point) == pytest.approx(max(mean, 0.0), abs=1e-5)
    assert abs(mean) > 0.01
    # One of the two orders is above 0.
    other = kto_trainer(reference.model.requires_grad_(), tmp_path, reference=FrozenCopy(model))
    other.measure_step(batches)
    assert max(float(trainer.reference_point), float(other.reference_point)) == pytest.approx(
        abs(mean), abs=1e-5
    )
    found = torch.cat([mismatched_log_ratios(model, reference, batch) for batch in batches])
    assert found.tolist() == pytest.approx(ratios, abs=1e-5)


def test_held_out_answers_of_one_kind_have_a_loss_and_no_margin() -> None:
    model = tiny_lm()
    good = [row for row in judged() if row["is_good"]]
    scores = score_answers(model, FrozenCopy(model), KTOLoss(), batches=[COLLATE(good)])
    assert scores.loss == pytest.approx(0.5)
    assert scores.margin is None and scores.accuracy is None


def test_a_router_with_capacity_is_refused(tmp_path: Path) -> None:
    model = tiny_lm(capacity_factor=1.0)
    with pytest.raises(UserError, match="capacity_factor 1.0 makes a token's log-probability"):
        kto_trainer(model, tmp_path, reference=FrozenCopy(model))


def test_an_adapter_is_trained_against_its_base(tmp_path: Path) -> None:
    spec = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
    model = add_lora(tiny_lm(), spec)
    trainer = kto_trainer(model, tmp_path, reference=FrozenAdapter(model, None))
    trainer.fit()
    first, *_, last = trainer.state.log_history
    assert first["train/loss"] == pytest.approx(0.5, abs=1e-6) and last["train/loss"] < 0.5


def test_a_resumed_training_is_the_uninterrupted_one_to_the_byte(tmp_path: Path) -> None:
    def build(folder: Path, seed: int) -> KTOTrainer:
        return kto_trainer(
            tiny_lm(seed), folder, reference=FrozenCopy(tiny_lm(0)), max_steps=3, save_steps=1,
            micro_batch_size=4, keep_checkpoints=9, log_steps=2,
        )  # fmt: skip

    build(tmp_path / "whole", 0).fit()
    shutil.copytree(
        tmp_path / "whole" / "checkpoint-1", tmp_path / "cut" / "checkpoint-1", dirs_exist_ok=True
    )
    build(tmp_path / "cut", 77).fit(resume=True)
    whole, cut = (
        json.loads((tmp_path / name / "checkpoint-3" / MANIFEST).read_text(encoding="utf-8"))
        for name in ("whole", "cut")
    )
    assert whole["files"] == cut["files"]
