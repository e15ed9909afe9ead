"""Openings of stories, by our own grammar: what the world `stories` asks a model to go on from.

An opening names a hero and a place and nothing good or bad, so that the feeling of the story is the
model's doing. The three sides (training, held-out, validation) never share a (name, kind, place):
the side is a hash of the three, so no list has to be kept.
"""

import hashlib
from functools import cache
from typing import Literal, get_args

from experiments.lab.tales import seeded
from moe.errors import UserError

Side = Literal["train", "held_out", "validation"]
# Of eight hash values one is held out, one is for validation, six are for training.
BUCKETS: tuple[Side, ...] = ("held_out", "validation", *("train",) * 6)

NAMES = tuple("Tom Lily Ben Sue Max Anna Tim Nora Sam Lucy Jack Amy Bob Sara".split())
KINDS = (
    "little girl",
    "little boy",
    "small dog",
    "tabby cat",
    "young fox",
    "brown bear",
    "tall farmer",
    "white rabbit",
    "green frog",
    "baker",
)
PLACES = (
    "near the pond",
    "by the old tree",
    "in a small house",
    "on the farm",
    "at the end of the road",
    "beside the river",
    "behind the barn",
)
FORMS = (
    "Once upon a time, a {kind} named {name} lived {place}.",
    "One day {name} the {kind} was walking {place}.",
    "There was once a {kind} called {name} {place}.",
    "It was morning, and {name} the {kind} sat {place}.",
)


def side_of(name: str, kind: str, place: str) -> Side:
    """The side of a hero, decided by a hash."""
    digest = hashlib.sha256(f"opening|{name}|{kind}|{place}".encode()).digest()
    return BUCKETS[int.from_bytes(digest[:4], "big") % len(BUCKETS)]


@cache
def _every(side: Side) -> tuple[str, ...]:
    return tuple(
        form.format(name=name, kind=kind, place=place)
        for name in NAMES
        for kind in KINDS
        for place in PLACES
        if side_of(name, kind, place) == side
        for form in FORMS
    )


def openings(seed: int, count: int, *, side: Side) -> list[str]:
    """`count` distinct openings of one side, in an order drawn from the seed.

    A shorter list is the beginning of a longer one. Raises `UserError` when the side has fewer.
    """
    if side not in get_args(Side):
        raise UserError(f"side is {side!r}; it must be one of {', '.join(get_args(Side))}.")
    every = list(_every(side))
    if count > len(every):
        raise UserError(
            f"{count} openings were asked of the side {side}, which has {len(every)}; ask for at "
            "most that many."
        )
    seeded(seed, "openings", side).shuffle(every)
    return every[:count]
