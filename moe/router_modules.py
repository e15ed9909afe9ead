"""Where a model's routers are: in our own backbone, or in a Hugging Face family's router modules.

The decision to know: a foreign family is reached through its router class alone, whose forward
returns (logits, weights, indices) with softmax scores; nothing of it is patched or copied.
"""

import re

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe.errors import UserError
from moe.model import MoEModel
from moe.switch_ffn import Router

# model_type -> the router class whose forward returns (logits, weights, indices), softmax scored.
FOREIGN_ROUTERS = {
    "mixtral": "MixtralTopKRouter",
    "olmoe": "OlmoeTopKRouter",
    "qwen2_moe": "Qwen2MoeTopKRouter",
    "qwen3_moe": "Qwen3MoeTopKRouter",
}
# What an adapter puts between a module's own name and the module or its parameters.
_ADAPTED = re.compile(r"(\.base_layer|\.original_module|\.modules_to_save\.[^.]+)+$")


def has_router(model: nn.Module) -> bool:
    """Whether the model has mixture-of-experts layers that can be recorded."""
    return bool(own_backbones(model) or foreign_routers(model))


def own_backbones(model: nn.Module) -> list[MoEModel]:
    """Our backbones in the model that have mixture-of-experts layers."""
    found = [module for module in model.modules() if isinstance(module, MoEModel)]
    return [backbone for backbone in found if backbone.config.sparse_layers]


def foreign_routers(model: nn.Module) -> list[nn.Module]:
    """The router modules of the named families, in the order of their layers."""
    names = set(FOREIGN_ROUTERS.values())
    return [module for module in model.modules() if type(module).__name__ in names]


def foreign_decoder(model: nn.Module) -> nn.Module:
    """The innermost module that holds both the embedding and every router: the bare decoder.

    Raises `UserError` where there is none, as with two models under one roof.
    """
    routers = set(foreign_routers(model))
    holders = [
        module
        for module in model.modules()
        if routers <= set(module.modules())
        and any(isinstance(child, nn.Embedding) for child in module.children())
    ]
    if not holders:
        raise UserError(
            f"{type(model).__name__} has routers in more than one decoder: give one of its models."
        )
    return holders[-1]


def checkpointed_layer(decoder: nn.Module, router: nn.Module) -> GradientCheckpointingLayer | None:
    """The layer around a foreign router that Hugging Face's activation checkpointing runs again."""
    around = [
        module
        for module in decoder.modules()
        if isinstance(module, GradientCheckpointingLayer) and router in set(module.modules())
    ]
    return around[-1] if around else None


def no_router(model: nn.Module, wanted: str) -> UserError:
    """wanted: what the model's routers were to be, as in "to record"."""
    return UserError(
        f"{type(model).__name__} has no router {wanted}: it takes a Switchyard model with "
        f"sparse layers or one of {', '.join(FOREIGN_ROUTERS)}."
    )


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of every router, with those that an adapter has put on it.

    A shared expert's gate is no router, and a selection bias is a buffer, no parameter.
    """
    foreign = set(foreign_routers(model))
    homes = {
        _ADAPTED.sub("", name) + "."
        for name, module in model.named_modules()
        if isinstance(module, Router) or module in foreign
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(tuple(homes))
    }
