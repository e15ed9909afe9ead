"""The order in which rows are trained on: a function of seed and epoch, never of history."""

from collections.abc import Iterator

from torch.utils.data import Sampler

from moe.counters import permutation


class StepOrder(Sampler[int]):
    """Row indices of the whole training: epoch after epoch, each its own permutation.

    The order is a function of (seed, epoch), not of history, so a resumed run continues it.
    """

    def __init__(self, num_rows: int, *, num_samples: int, seed: int) -> None:
        self.num_rows, self.num_samples, self.seed = num_rows, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        epoch, given = 0, 0
        while given < self.num_samples:
            for row in permutation(self.seed, "order", epoch, length=self.num_rows):
                if given == self.num_samples:
                    return
                yield row
                given += 1
            epoch += 1
