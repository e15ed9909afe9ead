"""Frozen routers keep every bit while the rest of the model learns."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.freeze import freeze_router

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}
IDS = torch.arange(3, 17).view(2, 7)
GATES = ["model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight"]


def make(kind: str = "ours") -> Any:
    torch.manual_seed(0)
    if kind == "ours":
        return MoEForCausalLM(MoEConfig(**SHAPE))
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SHAPE))
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", ["ours", "qwen2_moe"])
def test_a_step_moves_everything_but_the_frozen_routers(kind: str) -> None:
    model = make(kind)
    frozen = freeze_router(model)
    assert list(frozen.parameters) == GATES and frozen.num_parameters == 2 * 5 * 16
    assert frozen.were_trainable == tuple(GATES)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(before) - set(moved) == set(GATES)
    assert any("shared_expert_gate" in name for name in moved)  # no router


def test_leaving_the_context_thaws_what_was_trainable_and_no_more() -> None:
    model = make()
    first = model.model.layers[0].mlp.gate.weight.requires_grad_(False)
    second = model.model.layers[1].mlp.gate.weight
    with freeze_router(model) as frozen:
        assert frozen.were_trainable == (GATES[1],)
        assert not second.requires_grad
    assert second.requires_grad and not first.requires_grad
    with pytest.raises(KeyError), freeze_router(model):
        raise KeyError
    assert second.requires_grad


@pytest.mark.parametrize("kind", ["ours", "qwen2_moe"])
def test_an_adapters_parameters_on_a_router_are_frozen_with_it(kind: str) -> None:
    targets: dict[str, Any] = {"target_modules": ["q_proj"]}
    if kind == "ours":
        targets["target_modules"] = ["q_proj", "gate", "shared_expert_gate"]
    else:
        targets["target_parameters"] = ["mlp.gate.weight"]
    model = get_peft_model(make(kind), LoraConfig(r=2, **targets))
    on_router = [n for n, p in model.named_parameters() if ".gate." in n]
    assert sum("lora_" in name for name in on_router) == 4
    frozen = freeze_router(model)
    assert set(frozen.parameters) == set(on_router)
    assert set(frozen.were_trainable) == {name for name in on_router if "lora_" in name}
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert left and not any(".gate." in name for name in left)
    assert any("shared_expert_gate" in name for name in left) == (kind == "ours")
    frozen.thaw()
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".gate." in n} == set(
        frozen.were_trainable
    )


def test_a_router_saved_in_full_beside_an_adapter_is_frozen_with_both_copies() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    model = get_peft_model(make(), config)
    frozen = freeze_router(model)
    assert len(frozen.parameters) == 4 and len(frozen.were_trainable) == 2
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".gate." in n)


def test_a_routers_bias_is_frozen_with_its_weight() -> None:
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(**SHAPE, router_bias=True))
    assert len(freeze_router(model).parameters) == 4


def test_a_model_without_routers_is_refused() -> None:
    dense = {k: v for k, v in SHAPE.items() if "expert" not in k and "moe" not in k}
    with pytest.raises(UserError, match="LlamaForCausalLM has no router to freeze.*mixtral"):
        freeze_router(LlamaForCausalLM(LlamaConfig(**dense)))
