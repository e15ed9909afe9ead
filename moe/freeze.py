"""Freeze the routers and nothing else: the experts' division of labour stays, the experts learn."""

from dataclasses import dataclass
from types import TracebackType

from torch import nn

from moe.router_modules import no_router, router_parameters


@dataclass(frozen=True, kw_only=True)
class FrozenRouters:
    """What was frozen; leaving it as a context, or `thaw`, undoes it.

    parameters: name -> every parameter of the routers. were_trainable: the names that were not
    frozen before.
    """

    parameters: dict[str, nn.Parameter]
    were_trainable: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Numbers in the routers, all layers together."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def thaw(self) -> None:
        """What was trainable is so again; what was frozen before stays frozen."""
        for name in self.were_trainable:
            self.parameters[name].requires_grad_(True)

    def __enter__(self) -> "FrozenRouters":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.thaw()


def freeze_router(model: nn.Module) -> FrozenRouters:
    """Take the routers' parameters out of training, at once; also a context: `with freeze_router`.

    Our model and the families in `FOREIGN_ROUTERS`, bare or under an adapter, whose parameters on a
    router are frozen with it. A selection bias is no parameter: only its own update moves it. Call
    it before the optimizer is made. Raises `UserError` for a model without routers.
    """
    parameters = router_parameters(model)
    if not parameters:
        raise no_router(model, "to freeze")
    trainable = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    return FrozenRouters(parameters=parameters, were_trainable=trainable)
