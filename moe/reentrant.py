"""Balance gradients that survive reentrant checkpointing.

The reentrant form runs a layer without a graph and again in backward, so what a loss asks of the
scores of the first run would be lost. `take` gives the first run's scores and logits a place in the
graph behind the layer, where their gradients arrive before the layer is run again; `give` adds them
to the second run's. Every scope, coefficient and scale works unchanged, and the router's gradient
has the bits that it has without checkpointing, since the same two terms are added.

Shapes: B batch, S sequence, D width, T = B*S tokens, E experts.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe.routing import Routing


@dataclass
class RouterGradients:
    """What one layer's balance loss asks of its router, between `take` and `give`; else None."""

    score_TE: Tensor | None = None
    logits_TE: Tensor | None = None


class _Take(torch.autograd.Function):
    """Nothing forward; backward keeps the gradients of scores and logits.

    One node for all three: it is run once all its gradients are there, and before the layer's.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_BSD: Tensor, score_TE: Tensor, logits_TE: Tensor, held: RouterGradients
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.held = held
        return hidden_BSD.view_as(hidden_BSD), score_TE.view_as(score_TE), logits_TE.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        grad_BSD, ctx.held.score_TE, ctx.held.logits_TE = gradients
        return grad_BSD, None, None, None


class _Give(torch.autograd.Function):
    """Nothing forward; backward hands the kept gradients to scores and logits."""

    @staticmethod
    def forward(
        ctx: Any, output_BSD: Tensor, score_TE: Tensor, logits_TE: Tensor, held: RouterGradients
    ) -> Tensor:
        ctx.gradients = held.score_TE, held.logits_TE
        held.score_TE = held.logits_TE = None
        return output_BSD.view_as(output_BSD)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients, *ctx.gradients, None


def take(
    hidden_BSD: Tensor, routing: Routing, held: RouterGradients | None
) -> tuple[Tensor, Routing]:
    """The output and decision of a checkpointed layer, with a graph where the layer left none."""
    if held is None or routing.logits_TE.requires_grad or not hidden_BSD.requires_grad:
        return hidden_BSD, routing
    hidden_BSD, score_TE, logits_TE = _Take.apply(
        hidden_BSD, routing.score_TE, routing.logits_TE, held
    )
    return hidden_BSD, replace(routing, score_TE=score_TE, logits_TE=logits_TE)


def give(output_BSD: Tensor, routing: Routing, held: RouterGradients | None) -> Tensor:
    """The layer's FFN output; in the second run it brings the router the gradients kept."""
    if held is None or held.score_TE is None:
        return output_BSD
    given: Tensor = _Give.apply(output_BSD, routing.score_TE, routing.logits_TE, held)
    return given
