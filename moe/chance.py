"""What chance alone gives: shufflings with a fixed seed, and the p-value they make.

The decision to know: an observation counts as one of its own shufflings, so no p-value is 0 and
P shufflings can say no less than 1 / (P + 1).

Shapes: T tokens, P shufflings.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moe.counters import stream


def p_value(observed: float, shuffled: Sequence[float]) -> float:
    """Share of the shufflings, the observed one among them, that reach the observed value.

    One-sided (Phipson and Smyth 2010): 1 / (P + 1) if none of P reaches it.
    """
    # Rounding of sums must not decide between equal divergences.
    reached = sum(value >= observed * (1 - 1e-9) for value in shuffled)
    return (1 + reached) / (1 + len(shuffled))


def p_values(observed_L: Tensor, shuffled_PL: Tensor) -> list[float]:
    """The p-value of every column."""
    pairs = zip(observed_L.tolist(), shuffled_PL.T.tolist(), strict=True)
    return [p_value(observed, shuffled) for observed, shuffled in pairs]


def order_within(sequence_T: Tensor, *, seed: int, purpose: str, number: int) -> Tensor:
    """Shuffling `number` of the tokens within their sequences: the places (T,) they come from.

    sequence_T: int64, not falling. Sequences keep their places and lengths.
    """
    keys_T = stream(seed, purpose, number).random(len(sequence_T))
    return torch.from_numpy(np.lexsort((keys_T, sequence_T.numpy())))
