"""The law of granularity, L(G) = g / G^y + h, fitted to losses at a few G, and how sure it is.

The decision to know: for a given y the law is a straight line in G^-y, so the fit is a line for
each y of a grid, and the grid's ends are told as ends: a loss that saturates at once has no finite
y. The sign of y is only told with that of g. A curve that falls and rises again fits such a line
too, badly; whether the losses themselves rise is therefore asked apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from moe.counters import stream

Y_GRID = tuple(round(-4 + 0.05 * i, 2) for i in range(241) if i != 80)  # -4 to 8 without 0
BOOTSTRAPS = 200


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(G) = g / G^y + h; at_end: the best y is an end of the grid, and says no more than its sign.

    residual: root of the mean squared difference, in nats. largest_rise: of the losses from one G
    to the next, in nats; below 0 if all fall.
    """

    g: float
    y: float
    h: float
    residual: float
    at_end: bool
    largest_rise: float

    def levels_off(self, *, margin: float) -> bool:
        """Whether the loss falls with G ever more slowly, at a finite y, and rises nowhere.

        margin: a rise that counts, in nats.
        """
        return self.g > 0 and self.y > 0 and not self.at_end and self.largest_rise < margin


def fit_law(granularity: Sequence[float], loss: Sequence[float]) -> Law:
    """Least squares over g, h and a grid of y; the smallest |y| wins a tie.

    Raises ValueError below three points: two lie on every such curve.
    """
    if len(granularity) < 3 or len(granularity) != len(loss):
        raise ValueError(f"{len(granularity)} points and {len(loss)} losses: give 3 or more each")
    y_Y = np.array(sorted(Y_GRID, key=abs))
    target_N = np.array(loss, dtype=np.float64)
    x_YN = np.array(granularity, dtype=np.float64) ** -y_Y[:, None]
    apart_YN = x_YN - x_YN.mean(axis=1, keepdims=True)
    g_Y = apart_YN @ (target_N - target_N.mean()) / np.square(apart_YN).sum(axis=1)
    h_Y = target_N.mean() - g_Y * x_YN.mean(axis=1)
    off_Y = np.sqrt(np.square(g_Y[:, None] * x_YN + h_Y[:, None] - target_N).mean(axis=1))
    best = int(np.argmax(off_Y <= off_Y.min() + 1e-12))  # the first, whose |y| is the smallest
    return Law(
        g=float(g_Y[best]),
        y=float(y_Y[best]),
        h=float(h_Y[best]),
        residual=float(off_Y[best]),
        at_end=float(y_Y[best]) in (Y_GRID[0], Y_GRID[-1]),
        largest_rise=float(np.diff(target_N[np.argsort(granularity)]).max()),
    )


def bootstrap(
    granularity: Sequence[float], loss_by_seed: Sequence[Sequence[float]], *, seed: int = 0
) -> list[Law]:
    """The fits of `BOOTSTRAPS` resamplings of the seeds: whole curves drawn again and averaged."""
    laws = []
    for number in range(BOOTSTRAPS):
        drawn = stream(seed, "granularity bootstrap", number).integers(
            len(loss_by_seed), size=len(loss_by_seed)
        )
        curves = [loss_by_seed[i] for i in drawn.tolist()]
        laws.append(fit_law(granularity, [fmean(at) for at in zip(*curves, strict=True)]))
    return laws
