"""Balancing the experts: losses from sums, and the selection bias that needs no loss.

A layer gives counts and sums over its real tokens; the loss is finalised once, from the sums of
whatever the scope is, so that it comes out the same however a batch is cut. Counts are of choices
before dropping and carry no gradient.

Shapes: T tokens, E experts, K experts per token, L mixture-of-experts layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe.errors import UserError
from moe.routing import Routing, chosen_table
from moe.switch_ffn import SwitchFFN


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
    return chosen_table(routing).sum(dim=0).float()


def load_fractions(count_LE: Tensor) -> Tensor:
    """Each expert's share f of its layer's assignments; even, 1 / E, where none are counted."""
    total_L1 = count_LE.sum(dim=-1, keepdim=True)
    even = 1.0 / count_LE.shape[-1]
    return torch.where(total_L1 > 0, count_LE / total_L1.clamp(min=1e-30), even)


def _refuse_balanced(routing: Routing) -> None:
    if routing.balanced_by_construction:
        raise UserError(
            "a balance loss has no meaning for a router of kind 'expert_choice', whose experts "
            "all take the same number of tokens: turn balance off."
        )


def balance_sums(routing: Routing) -> BalanceSums:
    """The sums of one layer. Padding is left out by selection, so a NaN there stays there.

    Raises UserError for expert choice, which is balanced by construction.
    """
    _refuse_balanced(routing)
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


def sequence_sum(routing: Routing) -> Tensor:
    """Sum over sequences s of N_s * E * sum_i f_si P_si, 0-dim float32 (DeepSeek-V3, eqs. 17-20).

    f_s and P_s are of the N_s real tokens of one row of the batch (several texts packed into a row
    are one sequence). Over the number of tokens it is the mean over sequences, each weighted by its
    length: the paper's plain mean where lengths are equal, and the same for every split of a batch.
    Under a selection bias f is of the choice that was made, the paper's of the unbiased top-k.
    Raises UserError for expert choice.
    """
    _refuse_balanced(routing)
    chosen_TE = chosen_table(routing).long()
    # At most T sequences; their true number would cost a wait for the device.
    count_SE = torch.zeros_like(chosen_TE).index_add(0, routing.sequence_T, chosen_TE)
    fraction_TE = load_fractions(count_SE.float())[routing.sequence_T]
    score_TE = torch.where(routing.mask_T[:, None], routing.score_TE, 0.0)
    return routing.num_experts * torch.sum(fraction_TE * score_TE)


def sequence_balance_loss(routing: Routing) -> Tensor:
    """The sequence-wise balance loss of one layer over one batch, 0-dim float32."""
    return sequence_sum(routing) / routing.mask_T.sum().clamp(min=1)


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


# Balance without a loss.


def _moe_layers(model: nn.Module) -> list[SwitchFFN]:
    return [module for module in model.modules() if isinstance(module, SwitchFFN)]


def has_selection_bias(model: nn.Module) -> bool:
    """Whether a layer of the model chooses its experts by score plus bias."""
    return any(layer.selection_bias_E is not None for layer in _moe_layers(model))


@torch.no_grad()
def update_selection_bias(model: nn.Module, count_LE: Tensor, *, gamma: float) -> None:
    """b_i += gamma * sign(mean load - load_i) in every layer that has a selection bias.

    Loss-free balancing (Wang et al. 2024, arXiv 2408.15664, algorithm 1; DeepSeek-V3, section
    2.1.2): once per optimizer step, from the counts (L, E) of the whole step, a row for each
    mixture-of-experts layer in the model's order. An expert at the mean keeps its bias. As in the
    paper the bias is not centred again: a shift common to all experts changes no top-k.
    Raises ValueError if the rows are not the model's layers, UserError if no layer has a bias.
    """
    layers = _moe_layers(model)
    if not has_selection_bias(model):
        raise UserError(
            f"{type(model).__name__} has no selection bias to update: its router does not choose "
            "by score plus bias."
        )
    if len(layers) != len(count_LE):
        raise ValueError(f"counts of {len(count_LE)} layers for a model of {len(layers)}")
    for layer, count_E in zip(layers, count_LE, strict=True):
        bias_E = layer.selection_bias_E
        if bias_E is not None:
            bias_E += gamma * torch.sign(count_E.mean() - count_E).to(bias_E)
