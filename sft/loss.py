"""What every objective returns, and the language-model objective.

Losses are sums with their counts; whoever steps the optimizer divides once, by the count of the
whole step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """A loss as a sum over units (tokens, pairs, ...), its count and its diagnostics.

    loss_sum: 0-dim with gradient; count: 0-dim, units summed over.
    metrics: name -> (sum, count), detached, reduced by adding both; maxima: name -> value, reduced
    by the maximum.
    """

    loss_sum: Tensor
    count: Tensor
    metrics: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    maxima: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def loss(self) -> Tensor:
        """loss_sum / count. Raises ValueError when nothing was counted."""
        if float(self.count) == 0:
            raise ValueError("the loss has no mean: the batch holds no pair and no unmasked token")
        return self.loss_sum / self.count


def language_model_loss(logits_BSV: Tensor, labels_BS: Tensor) -> LossOutput:
    """Summed cross-entropy of labels shifted by one, -100 left out, in float32.

    Logits where nothing is learned enter neither value nor gradient, not even if they are NaN.
    """
    target_BS = labels_BS[:, 1:]
    learned_BS = target_BS != -100
    # Zeros in their place, not fewer rows: the sum then adds in the same order, to the same bits.
    known_BSV = torch.where(learned_BS[..., None], logits_BSV[:, :-1].float(), 0.0)
    loss_sum = functional.cross_entropy(
        known_BSV.flatten(0, 1),
        target_BS.flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    with torch.no_grad():
        count = learned_BS.sum()
        hit = ((logits_BSV[:, :-1].argmax(dim=-1) == target_BS) & learned_BS).sum()
    return LossOutput(loss_sum=loss_sum, count=count, metrics={"lm/accuracy": (hit, count)})
