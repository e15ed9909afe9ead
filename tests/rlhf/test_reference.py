"""Three forms of a frozen reference, lent and given back."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe import MoEConfig, MoEForCausalLM
from rlhf.reference import FrozenAdapter, FrozenCopy
from sft.adapt import LoraSpec, active_adapter, add_lora, copy_adapter


def tiny_lm(seed: int = 0, **options: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, initializer_range=0.2,
            **options,
        )
    )  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(0))
    return model(input_ids=ids).logits


@torch.no_grad()
def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapted(**options: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A model with a policy adapter on, and the logits of base, `sft` and `policy`."""
    base = tiny_lm(**options).eval()
    plain = logits(base)
    spec = LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
    model: Any = add_lora(base, spec, name="sft")
    disturb(model)
    sft = logits(model)
    copy_adapter(model, "sft", name="policy")
    disturb(model)
    return model, plain, sft, logits(model)


def test_a_copy_stays_what_the_model_was() -> None:
    model = tiny_lm().train()
    before = logits(model)
    reference = FrozenCopy(model)
    disturb(model)
    with reference.lend() as lent:
        assert not lent.training
        assert not any(parameter.requires_grad for parameter in lent.parameters())
        assert torch.equal(logits(lent), before)
    assert not torch.equal(logits(model), before)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_sft_adapter_and_the_bare_base_are_different_references() -> None:
    model, plain, sft, policy = adapted()
    with FrozenAdapter(model, "sft").lend() as lent:
        assert lent is model
        assert torch.equal(logits(lent), sft)
    with FrozenAdapter(model, None).lend() as lent:
        assert torch.equal(logits(lent), plain)
    assert torch.equal(logits(model), policy)
    assert not torch.equal(sft, plain)
    assert not torch.equal(sft, policy)


NOISES: dict[str, dict[str, float]] = {
    "jitter": {"router_jitter_noise": 0.3},
    "logits": {"router_logit_noise": 1.0},
    "dropout": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("name", ["sft", None])
def test_an_adapter_lent_from_a_noisy_policy_in_training_is_a_frozen_copy(
    name: str | None, noise: str
) -> None:
    model, plain, sft, _ = adapted(**NOISES[noise])
    model.train()
    quiet = model.get_submodule("base_model.model.model.layers.0.mlp").eval()
    frozen = copy.deepcopy(model).eval()
    with active_adapter(frozen, name):
        expected = logits(frozen).log_softmax(dim=-1)
    assert torch.equal(expected, (sft if name else plain).log_softmax(dim=-1))
    assert not torch.equal(logits(model), logits(model))  # in training every pass draws anew
    modes = {key: module.training for key, module in model.named_modules()}
    drawn = torch.get_rng_state()
    with FrozenAdapter(model, name).lend() as lent:
        assert torch.equal(logits(lent).log_softmax(dim=-1), expected)
        assert not any(module.training for module in lent.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {key: module.training for key, module in model.named_modules()} == modes
    assert model.training and not quiet.training


@pytest.mark.parametrize("name", ["sft", None])
def test_what_was_switched_for_a_reference_is_switched_back_after_an_error(
    name: str | None,
) -> None:
    model, _, _, policy = adapted()
    model.train()
    trainable = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(KeyError), FrozenAdapter(model, name).lend():
        raise KeyError("in between")
    assert model.active_adapter == "policy" and all(m.training for m in model.modules())
    assert torch.equal(logits(model), policy)
    now = [key for key, parameter in model.named_parameters() if parameter.requires_grad]
    assert now == trainable
    assert all(".policy." in key for key in now)


def test_an_adapter_reference_needs_a_model_with_adapters() -> None:
    with pytest.raises(ValueError, match="needs a model with adapters"):
        FrozenAdapter(tiny_lm(), None)
