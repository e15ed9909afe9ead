"""Balance losses from sums, so that they come out the same however a batch is cut.

A layer gives counts and sums over its real tokens; the loss is finalised once, from the sums of
whatever the scope is. Counts are of choices before dropping and carry no gradient.

Shapes: T tokens, E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe.routing import Routing


@dataclass(frozen=True, kw_only=True)
class BalanceSums:
    """Sums over the real tokens of one layer; two batches of the same layer add up.

    count_E: float32, assignments per expert (no gradient); they sum to K * num_tokens.
    score_sum_E: float32, summed probabilities (with gradient).
    z_sum: float32 0-dim, summed squared logsumexp of the logits (with gradient).
    num_tokens: float32 0-dim, real tokens (no gradient).
    """

    count_E: Tensor
    score_sum_E: Tensor
    z_sum: Tensor
    num_tokens: Tensor

    def __add__(self, other: "BalanceSums") -> "BalanceSums":
        return BalanceSums(
            count_E=self.count_E + other.count_E,
            score_sum_E=self.score_sum_E + other.score_sum_E,
            z_sum=self.z_sum + other.z_sum,
            num_tokens=self.num_tokens + other.num_tokens,
        )


def expert_counts(routing: Routing) -> Tensor:
    """Assignments per expert (E,) of the real tokens, before dropping, float32."""
    chosen = torch.nn.functional.one_hot(routing.expert_TK, routing.num_experts).sum(dim=1)
    return (chosen * routing.mask_T[:, None]).sum(dim=0).float()


def balance_sums(routing: Routing) -> BalanceSums:
    """The sums of one layer. Padding is left out by selection, so a NaN there stays there."""
    mask_T1 = routing.mask_T[:, None]
    z_T = torch.logsumexp(routing.logits_TE, dim=-1).square()
    return BalanceSums(
        count_E=expert_counts(routing),
        score_sum_E=torch.where(mask_T1, routing.score_TE, 0.0).sum(dim=0),
        z_sum=torch.where(routing.mask_T, z_T, 0.0).sum(),
        num_tokens=routing.mask_T.sum().float(),
    )


def load_balancing_value(sums: BalanceSums, *, fraction_E: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i, 0-dim float32 (Fedus et al. 2022, eq. 4; f = count / (k N) for k choices).

    1 at uniform routing, E / K when every token goes to the same K experts. 0 without tokens.
    fraction_E: f from a wider scope than these sums (no gradient); default from the sums.
    """
    num_tokens = sums.num_tokens.clamp(min=1.0)
    if fraction_E is None:
        fraction_E = sums.count_E / sums.count_E.sum().clamp(min=1.0)
    return len(fraction_E) * torch.sum(fraction_E.detach() * sums.score_sum_E) / num_tokens


def z_value(sums: BalanceSums) -> Tensor:
    """Mean squared logsumexp of the router logits (Zoph et al. 2022, eq. 5), 0-dim float32."""
    return sums.z_sum / sums.num_tokens.clamp(min=1.0)


def load_balancing_loss(routing: Routing) -> Tensor:
    """The loss of one layer over one batch, 0-dim float32."""
    return load_balancing_value(balance_sums(routing))


def z_loss(routing: Routing) -> Tensor:
    """The router z-loss of one layer over one batch, 0-dim float32."""
    return z_value(balance_sums(routing))


def mean_over_layers(values: Sequence[Tensor]) -> Tensor:
    """The model's value is the mean over layers, so a coefficient means the same at any depth."""
    return torch.stack(list(values)).mean()


def balance_values(
    sums_L: Sequence[BalanceSums], *, fraction_LE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(load-balancing value, z-value) of the model from the sums of its layers, 0-dim each.

    fraction_LE: f of each layer from a wider scope than these sums; default from the sums.
    """
    fraction_L = [None] * len(sums_L) if fraction_LE is None else list(fraction_LE)
    pairs = zip(sums_L, fraction_L, strict=True)
    balance = [load_balancing_value(sums, fraction_E=fraction_E) for sums, fraction_E in pairs]
    return mean_over_layers(balance), mean_over_layers([z_value(sums) for sums in sums_L])
