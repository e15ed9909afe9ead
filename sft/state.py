"""The state of a training as tensors under parameter names and JSON; nothing is pickled."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that a resumed training does not find as the checkpoint left it.

    kind: what allows it (data, tokenizer, model, settings or machine), None if nothing does.
    """

    kind: str | None
    what: str
    was: object
    now: object


def changes_between(
    then: Mapping[str, object], now: Mapping[str, object], *, kind: str | None
) -> list[Change]:
    """What differs, by name; a name that one side lacks is None there."""
    return [
        Change(kind=kind, what=name, was=then.get(name), now=now.get(name))
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    ]


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`{"ppo": {"clip": 0.2}}` as `{"ppo.clip": 0.2}`, so that a difference has one name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": held for inner, held in flattened(value).items()}
        else:
            flat[name] = value
    return flat


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


def rng_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every generator of this process: torch's (CPU, and CUDA's of `device`), Python's, numpy's."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def load_rng_state(
    tensors: Mapping[str, Tensor], document: Mapping[str, Any], *, device: torch.device
) -> None:
    """Put every generator back to where `rng_state` found it."""
    version, words, gauss = document["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = document["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)


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
    optimizer: Any,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    document: Mapping[str, Any],
    *,
    own_options: bool = False,
) -> None:
    """Restore moments by parameter name; raises UserError if the groups hold other parameters.

    own_options: the groups keep this run's numbers (lr, betas, ...), not the checkpoint's.
    """
    names = _parameter_names(model)
    plain = _plain_optimizer(optimizer)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("::")
        by_parameter.setdefault(name, {})[slot] = value
    for group, saved in zip(plain.param_groups, document["groups"], strict=True):
        if [names[id(p)] for p in group["params"]] != saved["params"]:
            raise UserError("the checkpoint's optimizer holds other parameters than this run's.")
        if not own_options:
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


def load_schedule(
    scheduler: Any, document: Mapping[str, Any], *, own_options: bool = False
) -> None:
    """Restore how far the learning rate's schedule has come.

    own_options: the schedule is this run's (peak, shape, length), from that place on.
    """
    if not own_options:
        scheduler.load_state_dict(document)
        return
    plain = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    kept = ("last_epoch", "_step_count")
    plain.__dict__.update({name: document[name] for name in kept})
    rates = [
        base * factor(plain.last_epoch)
        for base, factor in zip(plain.base_lrs, plain.lr_lambdas, strict=True)
    ]
    for group, rate in zip(plain.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    plain._last_lr = rates
