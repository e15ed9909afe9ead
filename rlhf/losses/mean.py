"""What a loss over response tokens is a mean over, where two papers differ only in that.

The decision to know: a mean is a total and a count of units, and whoever steps the optimizer
divides the step's total by the step's count, over all micro-batches and processes. A mean of
micro-batch means would depend on the split.

Shapes: B episodes, R response tokens. Masks are true (or 1) at a real token.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe.errors import UserError
from rlhf.logprobs import check_same_shape, where_real


@dataclass(frozen=True, kw_only=True)
class LossMean:
    """Over `token`s, over `sequence`s of their tokens' means, or over sequences of constant length.

    token: sum over all tokens of the step / their number (PPO here; DAPO, Yu et al. 2025, section
    3.3). A token counts the same wherever it stands, so that long answers count for more.
    sequence: mean over answers of sum_t / |o_i| (GRPO, Shao et al. 2024, eq. 3). An answer counts
    the same however long it is, so that a token of a long answer counts for less.
    constant: mean over answers of sum_t / max_length (Dr. GRPO, Liu et al. 2025). As `token`, but
    the divisor does not depend on what was drawn.
    An answer without a token is left out. Raises UserError unless `constant` has a max_length.
    """

    over: Literal["token", "sequence", "constant"] = "token"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if (self.over == "constant") != (self.max_length is not None):
            raise UserError(
                f"a mean over {self.over} with max_length {self.max_length}: constant needs a "
                "length, and the others have no use for one."
            )
        if self.max_length is not None and self.max_length < 1:
            raise UserError(f"max_length is {self.max_length}: it must be at least 1.")

    def total(self, x_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """The sum over units, 0-dim; what stands under padding has no part in it."""
        check_same_shape(x=x_BR, mask=mask_BR)
        x_BR = where_real(x_BR, mask_BR)
        if self.over == "sequence":
            length_B = mask_BR.bool().sum(dim=1)
            return (x_BR.sum(dim=1) / length_B.clamp(min=1)).sum()
        return x_BR.sum() / self.max_length if self.max_length is not None else x_BR.sum()

    def count(self, mask_BR: Tensor) -> Tensor:
        """The number of units, 0-dim: tokens, or answers that have any."""
        mask_BR = mask_BR.bool()
        return mask_BR.sum() if self.over == "token" else mask_BR.any(dim=1).sum()


TOKEN_MEAN = LossMean()
