"""The world `knowledge`: many small tables to be learned by heart, so that capacity is what counts.

A domain is a first-order Markov chain over one vocabulary, and nothing in a text names its domain:
the first tokens tell it, and the loss is taken behind them. What a perfect model cannot get below
is known by formula, and the best loss on any given texts by Bayes' rule.

Shapes: G domains, V vocabulary, K successors of a token, R rows, S tokens of a row.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe.counters import stream
from moe.errors import UserError

PROBABILITIES = (0.7, 0.2, 0.1)
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class World:
    """The tables of one seed: successor_GVK, int64, the K distinct successors of each token."""

    seed: int
    successor_GVK: Ints

    @property
    def num_domains(self) -> int:
        return int(self.successor_GVK.shape[0])

    @property
    def vocab_size(self) -> int:
        return int(self.successor_GVK.shape[1])


def build_world(seed: int, *, num_domains: int = 32, vocab_size: int = 64) -> World:
    """The world of a seed. Raises UserError if a token cannot have distinct successors."""
    if vocab_size < len(PROBABILITIES) or num_domains < 1:
        raise UserError(
            f"vocab_size {vocab_size} and num_domains {num_domains}: a token has "
            f"{len(PROBABILITIES)} distinct successors, and a world at least one domain."
        )
    rng = stream(seed, "knowledge tables")
    order_GVV = rng.random((num_domains, vocab_size, vocab_size)).argsort(axis=-1)
    return World(seed=seed, successor_GVK=order_GVV[..., : len(PROBABILITIES)])


def entropy_floor() -> float:
    """Nats per token of who knows the domain and its table: 0.8018 for .7, .2, .1."""
    return -sum(p * math.log(p) for p in PROBABILITIES)


def draw(world: World, num_rows: int, *, length: int, purpose: str) -> tuple[Ints, Ints]:
    """(domain_R, token_RS): fresh texts, the domains in turn; the same for a seed and a purpose.

    The first token is uniform, each next one a successor of the one before it.
    """
    domain_R = np.arange(num_rows, dtype=np.int64) % world.num_domains
    rng = stream(world.seed, f"knowledge {purpose}")
    rng.shuffle(domain_R)
    token_RS = np.empty((num_rows, length), dtype=np.int64)
    token_RS[:, 0] = rng.integers(world.vocab_size, size=num_rows)
    choice_RS = np.searchsorted(np.cumsum(PROBABILITIES)[:-1], rng.random(token_RS.shape), "right")
    for place in range(1, length):
        here_R, choice_R = token_RS[:, place - 1], choice_RS[:, place]
        token_RS[:, place] = world.successor_GVK[domain_R, here_R, choice_R]
    return domain_R, token_RS


def bayes_loss(world: World, token_RS: Ints, *, scored_from: int) -> float:
    """Nats per token from place `scored_from` on of who knows all tables, but not the domain.

    The predictive probability is the mean over domains, each weighed by how likely it made the
    text so far (uniform before the first step).
    """
    belief_RG = np.full((len(token_RS), world.num_domains), 1 / world.num_domains)
    total, count = 0.0, 0
    for place, probability_RG in enumerate(_steps(world, token_RS), start=1):
        joint_RG = belief_RG * probability_RG
        predicted_R = joint_RG.sum(axis=-1)
        if place >= scored_from:
            total -= float(np.log(predicted_R).sum())
            count += len(predicted_R)
        belief_RG = joint_RG / predicted_R[:, None]
    return total / count


def _steps(world: World, token_RS: Ints) -> Iterator[NDArray[np.float64]]:
    """Place by place, P(token | token before, domain) of every domain, (R, G)."""
    weight_K = np.array(PROBABILITIES)
    for place in range(1, token_RS.shape[1]):
        successor_GRK = world.successor_GVK[:, token_RS[:, place - 1]]
        hit_GRK = successor_GRK == token_RS[None, :, place, None]
        yield (hit_GRK * weight_K).sum(axis=-1).T
