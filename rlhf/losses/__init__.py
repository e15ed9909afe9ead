"""What a loss takes and what it gives; one objective per file beside this one.

The decision to know: a loss never divides. It returns sums and counts, because only the trainer
knows the denominator of the whole optimizer step, over all micro-batches and ranks; a mean of
micro-batch means would weigh short sequences more. `LossOutput.loss` is for reading, and for a
batch that is the whole step.

Shapes: B batch (pairs).
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf.logprobs import check_same_shape, where_real
from sft.loss import LossOutput as LossOutput


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Log-probabilities of pairs of completions under one model.

    chosen, rejected: (B,), summed over completion tokens including EOS.
    chosen_length, rejected_length: (B,), the number of those tokens, for losses that average.
    Raises ValueError unless all four are (B,).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    def __post_init__(self) -> None:
        check_same_shape(
            chosen=self.chosen,
            rejected=self.rejected,
            chosen_length=self.chosen_length,
            rejected_length=self.rejected_length,
        )
        if self.chosen.ndim != 1:
            raise ValueError(f"pair log-probabilities are (B,), got {tuple(self.chosen.shape)}")


class PreferenceLoss(Protocol):
    """A frozen callable: `loss(policy, reference)`, or `loss(policy)` without a reference.

    needs_reference says which of the two. value_at_reference is the mean loss when the policy is
    the reference, which a trainer checks at its first step; None when the loss has no such value.
    couples_batch: whether a row's loss depends on the other rows of its batch or step.
    """

    @property
    def needs_reference(self) -> bool: ...

    @property
    def couples_batch(self) -> bool: ...

    @property
    def value_at_reference(self) -> float | None: ...

    # One protocol for both arities: one PairLogps or two, as needs_reference says.
    def __call__(self, *logps: Any, **named_logps: Any) -> LossOutput: ...


def metric(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(sum, count) of x, detached, for `LossOutput.metrics`; with a mask, of what it keeps."""
    x = x.detach()
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    return where_real(x, mask).sum(), mask.sum()


def wins(margin_B: Tensor) -> Tensor:
    """1 where the chosen one is ahead, 0 where behind, 1/2 at a tie; float, of margin_B's type."""
    return 0.5 * (margin_B.detach().sign() + 1.0)
