"""Random numbers from named counters: (seed, purpose, row, column) and nothing else.

The same sample gets the same numbers whatever batch, process or moment it is drawn in, so that a
resumed or a differently split run draws what the uninterrupted one would have drawn.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _key(seed: int, purpose: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{purpose}".encode()).digest()[:16], "little")


def stream(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A generator for one named place; counters (at most 3) are its row, step, epoch ..."""
    if len(counters) > 3:
        raise ValueError(f"{len(counters)} counters for {purpose!r}: there is room for 3")
    words = [0, *counters, 0, 0, 0][:4]
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose), counter=words))


def uniforms(seed: int, purpose: str, rows: Sequence[int], *, length: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (len(rows), length), one stream per row."""
    drawn = [stream(seed, purpose, int(row)).random(length) for row in rows]
    return torch.from_numpy(np.stack(drawn)) if drawn else torch.zeros(0, length).double()


def permutation(seed: int, purpose: str, *counters: int, length: int) -> list[int]:
    """A permutation of range(length)."""
    return stream(seed, purpose, *counters).permutation(length).tolist()
