"""The state of a training as tensors under parameter names and JSON; nothing is pickled."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import UserError


def state_document(state: Any) -> dict[str, Any]:
    """The loop's own state; times and callbacks are not part of it."""
    return {
        "global_step": state.global_step,
        "max_steps": state.max_steps,
        "epoch": state.epoch,
        "num_train_epochs": state.num_train_epochs,
        "log_history": state.log_history,
        "logging_steps": state.logging_steps,
        "save_steps": state.save_steps,
        "train_batch_size": state.train_batch_size,
        "stateful_callbacks": {},
    }


def rng_documents() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state(),
    }


def _parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def _plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it


def optimizer_state(optimizer: Any, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Moments under `<parameter name>::<key>`, and the groups' numbers as JSON."""
    names = _parameter_names(model)
    plain = _plain_optimizer(optimizer)
    tensors = {
        f"{names[id(parameter)]}::{key}": value
        for parameter, state in plain.state.items()
        for key, value in state.items()
    }
    groups = [
        {
            **{k: v for k, v in group.items() if k != "params"},
            "params": [names[id(p)] for p in group["params"]],
        }
        for group in plain.param_groups
    ]
    return tensors, {"groups": groups}


def load_optimizer(
    optimizer: Any, model: nn.Module, tensors: Mapping[str, Tensor], document: Mapping[str, Any]
) -> None:
    """Restore moments by parameter name; raises UserError if the groups hold other parameters."""
    names = _parameter_names(model)
    plain = _plain_optimizer(optimizer)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("::")
        by_parameter.setdefault(name, {})[slot] = value
    for group, saved in zip(plain.param_groups, document["groups"], strict=True):
        if [names[id(p)] for p in group["params"]] != saved["params"]:
            raise UserError("the checkpoint's optimizer holds other parameters than this run's.")
        group.update({k: v for k, v in saved.items() if k != "params" and k != "betas"})
        group["betas"] = tuple(saved["betas"])
        for parameter in group["params"]:
            state = by_parameter.pop(names[id(parameter)], None)
            if state is not None:
                plain.state[parameter] = {
                    slot: value.to(parameter.device) for slot, value in state.items()
                }
    if by_parameter:
        raise UserError(
            f"the checkpoint has moments of unknown parameters: {sorted(by_parameter)[:3]}"
        )
