"""Routers are found where they are, and models with several decoders are told apart."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.router_modules import (
    checkpointed_layer,
    foreign_decoder,
    foreign_routers,
    has_router,
    own_backbones,
    router_parameters,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4))


def ours(**changes: Any) -> MoEForCausalLM:
    return MoEForCausalLM(MoEConfig(**SHAPE | {"moe_intermediate_size": 12} | changes))


def test_a_foreign_router_lies_in_its_layer_in_its_decoder() -> None:
    model = mixtral()
    assert foreign_decoder(model) is model.model
    assert foreign_routers(model) == [layer.mlp.gate for layer in model.model.layers]
    for layer in model.model.layers:
        assert checkpointed_layer(model.model, layer.mlp.gate) is layer
    assert checkpointed_layer(model.model.layers[0].mlp, model.model.layers[0].mlp.gate) is None


def test_a_dense_backbone_beside_a_sparse_one_has_no_routers() -> None:
    sparse, dense = ours(), ours(mlp_layer_types=["dense", "dense"])
    pair = nn.ModuleList([dense, sparse])
    assert own_backbones(pair) == [sparse.model] and has_router(pair)
    assert not has_router(dense) and not router_parameters(dense)


def test_two_foreign_decoders_under_one_roof_are_refused() -> None:
    with pytest.raises(UserError, match="ModuleList has routers in more than one decoder"):
        foreign_decoder(nn.ModuleList([mixtral(), mixtral()]))
