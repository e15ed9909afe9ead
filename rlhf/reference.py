"""The frozen policy that KL and preference losses are measured from.

Three forms, one door: a frozen copy of the model, a frozen adapter on the shared base, or the base
with its adapters off. After a LoRA SFT the reference is the frozen SFT adapter; adapters off would
silently measure from the model before SFT.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from sft.adapt import active_adapter, is_adapted


class Reference(Protocol):
    """Lends the reference model for a pass without gradients."""

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        """The model to run; whatever was switched for it is switched back."""
        ...


class FrozenCopy:
    """A copy of the model as it is now."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        yield self.model


class NoReference:
    """In a reference's place where nothing is measured from one; lends nothing."""

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        raise ValueError("this method has no reference to lend: its loss needs none")
        yield  # a generator, as the other forms are


def beside_the_policy(reference: Reference) -> Mapping[str, nn.Module]:
    """The reference where it is a model of its own, which the policy's checkpoint does not hold.

    An adapter is in that checkpoint, and so is the base under it.
    """
    return {"reference": reference.model} if isinstance(reference, FrozenCopy) else {}


class FrozenAdapter:
    """The shared base under another adapter; None for the base with its adapters off.

    It is lent in eval mode, as a frozen copy is: no dropout and no router noise, and nothing drawn.
    """

    def __init__(self, model: nn.Module, adapter: str | None) -> None:
        if not is_adapted(model):
            raise ValueError("a reference by adapter needs a model with adapters")
        self.model = model
        self.adapter = adapter

    @contextmanager
    def lend(self) -> Iterator[nn.Module]:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            with active_adapter(self.model, self.adapter):
                yield self.model
        finally:
            for module, was_training in modes.items():
                module.training = was_training
