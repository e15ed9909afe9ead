"""DPO as a trainer: where it starts, what it moves, what it refuses, and resuming."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from rlhf.dpo import DPOTrainer, SelfCheckFailed, pair_logps
from rlhf.losses.dpo import DPOLoss
from rlhf.reference import FrozenAdapter, FrozenCopy, Reference
from rlhf.routing_guard import refuse_batch_coupling
from sft.adapt import LoraSpec, add_lora, copy_adapter
from sft.checkpoint import MANIFEST, live_tensors
from sft.order import StepOrder
from sft.rows import PreferenceCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.text import pad_batch

LN_2 = math.log(2.0)
SPEC = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))


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


def pairs(count: int = 24) -> list[Any]:
    rng = random.Random(0)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(rng.randrange(2, 7))]

    return [
        {
            "prompt_ids": text(3, 32),
            "chosen_ids": [*text(3, 17), 2],
            "rejected_ids": [*text(17, 32), 2],
            "sample_id": i,
        }
        for i in range(count)
    ]


@torch.no_grad()
def disturb(model: nn.Module, *, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def after_lora_sft(seed: int = 0) -> Any:
    """A policy adapter that starts as the trained SFT adapter."""
    model: Any = add_lora(tiny_lm(seed), SPEC, name="sft")
    disturb(model, seed=seed)
    copy_adapter(model, "sft", name="policy")
    return model


def dpo_trainer(
    model: nn.Module, folder: Path, *, reference: Reference, **changes: Any
) -> DPOTrainer:
    options = changes.pop("options", {})
    chosen = {"max_steps": 3, "batch_size": 8, "lr": 1e-2, "log_steps": 1, **changes}
    return DPOTrainer(
        model,
        TrainSettings(**chosen),
        reference=reference,
        rows=pairs(),
        collator=PreferenceCollator(pad_id=0),
        folder=folder,
        **options,
    )


def frozen_copy() -> tuple[nn.Module, Reference]:
    model = tiny_lm()
    return model, FrozenCopy(model)


def frozen_adapter() -> tuple[nn.Module, Reference]:
    model = after_lora_sft()
    return model, FrozenAdapter(model, "sft")


def adapters_off() -> tuple[nn.Module, Reference]:
    """A fresh adapter on a full SFT: its base is the reference."""
    model = add_lora(tiny_lm(), SPEC)
    return model, FrozenAdapter(model, None)


FORMS = [frozen_copy, frozen_adapter, adapters_off]


# --- where it starts


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_starts_at_ln_2_whatever_form_the_reference_has(tmp_path: Path, form: Any) -> None:
    model, reference = form()
    trainer = dpo_trainer(
        model, tmp_path, reference=reference, max_steps=2, micro_batch_size=4,
        options={"loss": DPOLoss(beta=2.0)},
    )  # fmt: skip
    trainer.fit()
    first, second = trainer.state.log_history
    # The same passes in the same shape: only the last bits of ln 2 in float32 are open.
    assert first["train/loss"] == pytest.approx(LN_2, abs=1e-6)
    assert first["preference/margin"] == pytest.approx(0.0, abs=1e-6)
    assert second["train/loss"] < LN_2


def test_a_reference_that_is_not_the_policy_stops_the_run(tmp_path: Path) -> None:
    model = tiny_lm()
    with pytest.raises(SelfCheckFailed) as caught:
        dpo_trainer(model, tmp_path, reference=FrozenCopy(tiny_lm(1))).fit()
    assert "the preference loss starts at" in str(caught.value)
    assert "not at 0.693147: policy and reference are not the same model" in str(caught.value)
    for one, two in zip(model.parameters(), tiny_lm().parameters(), strict=True):
        assert torch.equal(one, two)


def test_switching_adapters_off_after_a_lora_sft_stops_the_run(tmp_path: Path) -> None:
    """Adapters off is the model before SFT, not the SFT model."""
    model = after_lora_sft()
    with pytest.raises(SelfCheckFailed, match="not the same model before the first step"):
        dpo_trainer(model, tmp_path, reference=FrozenAdapter(model, None)).fit()


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_a_router_with_capacity_is_refused(tmp_path: Path, factor: float) -> None:
    model = tiny_lm(capacity_factor=factor)
    with pytest.raises(UserError) as caught:
        dpo_trainer(model, tmp_path, reference=FrozenCopy(model))
    assert str(caught.value) == (
        f"capacity_factor {factor} makes a token's log-probability depend on its batch "
        "neighbours, so ratios and margins would not be the policy's: set capacity_factor to None "
        "(dropless) for preference and RL stages, or give allow_batch_dependent_routing."
    )
    with pytest.raises(UserError, match="capacity_factor"):
        refuse_batch_coupling(add_lora(model, LoraSpec(rank=1, alpha=1)))
    refuse_batch_coupling(tiny_lm(capacity_factor=factor, mlp_layer_types=["dense", "dense"]))


class Coupled(DPOLoss):
    couples_batch = True


def test_a_loss_that_couples_pairs_is_refused(tmp_path: Path) -> None:
    model = tiny_lm()
    with pytest.raises(UserError, match="Coupled couples the pairs of a batch"):
        dpo_trainer(model, tmp_path, reference=FrozenCopy(model), options={"loss": Coupled()})


# --- what it moves


@pytest.mark.parametrize("form", FORMS)
def test_the_policy_moves_and_the_reference_stays_to_the_bit(tmp_path: Path, form: Any) -> None:
    model, reference = form()
    with reference.lend() as lent, torch.no_grad():
        batch = PreferenceCollator(pad_id=0)(pairs(4))
        before = pair_logps(lent, batch)
    held = {name: tensor.detach().clone() for name, tensor in live_tensors(model).items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = dpo_trainer(model, tmp_path, reference=reference)
    trainer.fit()
    with reference.lend() as lent, torch.no_grad():
        after = pair_logps(lent, batch)
    assert torch.equal(before.chosen, after.chosen)
    assert torch.equal(before.rejected, after.rejected)
    moved = {n for n, t in live_tensors(model).items() if not torch.equal(t, held[n])}
    assert moved
    assert moved <= trainable
    parts = ("mlp.gate", "experts", "q_proj")  # router, experts and attention take part
    assert all(any(part in name for name in moved) for part in parts)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_the_margin_rises_and_the_likelihoods_are_logged(tmp_path: Path) -> None:
    model = tiny_lm()
    trainer = dpo_trainer(
        model, tmp_path, reference=FrozenCopy(model), max_steps=12,
        options={"loss": DPOLoss(beta=0.5)},
    )  # fmt: skip
    trainer.fit()
    first, last = trainer.state.log_history[0], trainer.state.log_history[-1]
    assert first["preference/margin"] == pytest.approx(0.0, abs=1e-6)
    assert last["preference/margin"] > 1.0
    assert last["preference/accuracy"] == 1.0
    assert last["train/loss"] < 0.5 * LN_2
    gaps = [row["logp/chosen"] - row["logp/rejected"] for row in (first, last)]
    assert gaps[1] > gaps[0]
    margin = last["reward/chosen"] - last["reward/rejected"]
    assert last["preference/margin"] == pytest.approx(margin, rel=1e-5)


def test_splitting_the_pairs_changes_nothing(tmp_path: Path) -> None:
    made = []
    balance = BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5, z_loss_coef=0.1)
    for micro in (8, 4, 2):
        model = tiny_lm()
        trainer = dpo_trainer(
            model, tmp_path / str(micro), reference=FrozenCopy(model), micro_batch_size=micro,
            adam_eps=1e-3, max_grad_norm=1e9, options={"balance": balance},
        )  # fmt: skip
        trainer.fit()
        made.append(model)
    for other in made[1:]:
        for one, two in zip(made[0].parameters(), other.parameters(), strict=True):
            # float32 addition order; the eps keeps Adam from magnifying it (see test_trainer).
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_the_reference_pass_is_not_counted_in_the_routers_metrics(tmp_path: Path) -> None:
    """Policy and reference share their routers here, and only the policy's pass counts."""
    rows = []

    class Tracker:
        def log(self, metrics: dict[str, Any], **kwargs: Any) -> None:
            rows.append(metrics)

        def say(self, text: str) -> None: ...

    model, reference = frozen_adapter()
    trainer = dpo_trainer(
        model, tmp_path, reference=reference, max_steps=1,
        options={"tracker": Tracker(), "balance": BalancePolicy(load_balancing_coef=1e-3)},
    )  # fmt: skip
    trainer.fit()
    chosen = [pairs()[i] for i in StepOrder(24, num_samples=8, seed=0)]
    tokens = sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
        for row in chosen
    )
    assert rows[0]["router/balance_loss"][1] == tokens


# --- log-probabilities


@pytest.mark.parametrize("side", ["left", "right"])
def test_pair_log_probabilities_are_those_of_each_text_alone(side: Any) -> None:
    model = tiny_lm().eval()
    rows = pairs(3)
    texts = [(r["prompt_ids"], r["chosen_ids"]) for r in rows]
    texts += [(r["prompt_ids"], r["rejected_ids"]) for r in rows]
    ids, mask = pad_batch([a + b for a, b in texts], pad_id=0, side=side)
    inside, _ = pad_batch([[0] * len(a) + [1] * len(b) for a, b in texts], pad_id=0, side=side)
    batch: dict[str, Tensor] = {
        "input_ids": ids, "attention_mask": mask, "completion_mask": inside.bool(),
    }  # fmt: skip
    with torch.no_grad():
        found = pair_logps(model, batch)
        for i, (prompt, completion) in enumerate(texts):
            logp_SV = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            alone = sum(float(logp_SV[s, t]) for s, t in zip(places, completion, strict=True))
            half, row = (found.chosen, i) if i < 3 else (found.rejected, i - 3)
            assert float(half[row]) == pytest.approx(alone, abs=1e-4)
    assert found.chosen_length.tolist() == [len(r["chosen_ids"]) for r in rows]
    assert found.rejected_length.tolist() == [len(r["rejected_ids"]) for r in rows]


# --- resuming


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_preference_training_is_the_uninterrupted_one_to_the_byte(
    tmp_path: Path, lora: bool
) -> None:
    def build(folder: Path, seed: int) -> DPOTrainer:
        if lora:  # the frozen adapter is in the checkpoint, so that any seed may build the model
            model: nn.Module = after_lora_sft(seed)
            reference: Reference = FrozenAdapter(model, "sft")
        else:
            model, reference = tiny_lm(seed), FrozenCopy(tiny_lm(0))
        return dpo_trainer(
            model, folder, reference=reference, max_steps=4, micro_batch_size=4, save_steps=1,
            keep_checkpoints=9, log_steps=3,
        )  # fmt: skip

    whole = build(tmp_path / "whole", 0)
    whole.fit()
    last = (tmp_path / "whole" / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
    for step in range(1, 4):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = build(folder, 77)
        again.fit(resume=True)
        assert again.optimizer_steps == 4 - step
        found = (folder / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(found)["files"] == json.loads(last)["files"]
