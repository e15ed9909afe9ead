"""In which order a rater sees the pairs, and which answer comes first: by lot, and balanced.

The decision to know: positions are permuted in blocks of four (two with A first, two with B), so
that a rater who always takes the first answer, or who tires, favours neither side. Order and
positions follow from the seed, the rater's name and the prompts alone, so a session that goes on
tomorrow goes on with the same ones.
"""

import random
from collections.abc import Sequence

from rlhf.label_files import Side

BLOCK: tuple[Side, ...] = ("A", "A", "B", "B")


def rating_order(keys: Sequence[str], *, rater: str, seed: int) -> dict[str, Side]:
    """Every key with the side shown first, in the order of asking.

    Among any 4n first keys both sides are first equally often, and among all keys the counts differ
    by at most one.
    """
    # A string is hashed by SHA-512: the same lots on every machine.
    lots = random.Random(f"{seed}\n{rater}")
    order = lots.sample(sorted(keys), k=len(keys))
    positions: list[Side] = []
    while len(positions) < len(order):
        block = list(BLOCK)
        if (room := len(order) - len(positions)) < len(BLOCK):
            odd: list[Side] = [lots.choice(("A", "B"))] if room % 2 else []
            pair: list[Side] = ["A", "B"]
            block = pair * (room // 2) + odd
        lots.shuffle(block)
        positions += block
    return dict(zip(order, positions, strict=True))
