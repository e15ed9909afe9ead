"""The world `knowledge`: its tables, its texts, and the losses that nobody gets below."""

import math

import numpy as np
import pytest

from experiments.lab.knowledge_world import (
    PROBABILITIES,
    World,
    bayes_loss,
    build_world,
    draw,
    entropy_floor,
)
from moe.errors import UserError


def test_the_floor_is_the_entropy_of_the_three_successors() -> None:
    by_hand = 0.7 * math.log(1 / 0.7) + 0.2 * math.log(5) + 0.1 * math.log(10)
    assert entropy_floor() == pytest.approx(by_hand)
    assert entropy_floor() == pytest.approx(0.8018, abs=5e-5)


def test_every_token_has_three_distinct_successors_in_every_domain() -> None:
    world = build_world(3)
    assert world.successor_GVK.shape == (32, 64, 3)
    assert all(len(set(row)) == 3 for row in world.successor_GVK.reshape(-1, 3).tolist())
    assert not np.array_equal(world.successor_GVK, build_world(4).successor_GVK)


def test_texts_follow_the_table_of_their_domain_with_its_probabilities() -> None:
    world = build_world(0)
    domain_R, token_RS = draw(world, 320, length=64, purpose="train")
    successor_RSK = world.successor_GVK[domain_R[:, None], token_RS[:, :-1]]
    hit_RSK = successor_RSK == token_RS[:, 1:, None]
    assert (hit_RSK.sum(axis=-1) == 1).all()
    shares = hit_RSK.mean(axis=(0, 1))
    # 20,160 draws: three standard errors of the most uncertain share are 0.0097.
    assert shares.tolist() == pytest.approx(PROBABILITIES, abs=0.0097)
    assert (np.bincount(domain_R) == 10).all()


def test_texts_depend_on_seed_and_purpose_alone() -> None:
    world = build_world(0)
    again = draw(build_world(0), 8, length=16, purpose="train")
    first = draw(world, 8, length=16, purpose="train")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], draw(world, 8, length=16, purpose="held out")[1])


def test_who_must_find_the_domain_out_is_near_the_floor_behind_the_first_tokens() -> None:
    world = build_world(1)
    _, token_RS = draw(world, 400, length=64, purpose="train")
    # 19,200 tokens with a spread of 0.67 nats each: five standard errors are 0.024.
    assert bayes_loss(world, token_RS, scored_from=16) == pytest.approx(entropy_floor(), abs=0.024)
    early = bayes_loss(world, token_RS[:, :2], scored_from=1)
    assert early > 2 * entropy_floor()


def test_the_best_loss_is_bayes_rule_by_hand() -> None:
    """Domain 0 goes 0 -> 1 with 0.7, domain 1 with 0.2; then 1 -> 2 with 0.1 in either."""
    successor_GVK = np.array(
        [[[1, 2, 3], [0, 3, 2], [0, 1, 3], [0, 1, 2]], [[2, 1, 3], [3, 0, 2], [0, 1, 3], [0, 1, 2]]]
    )
    world = World(seed=0, successor_GVK=successor_GVK)
    text_RS = np.array([[0, 1, 0]])
    first = (0.7 + 0.2) / 2
    belief = 0.35 / 0.45  # of domain 0, once the first step is seen
    second = belief * 0.7 + (1 - belief) * 0.2
    by_hand = -(math.log(first) + math.log(second)) / 2
    assert bayes_loss(world, text_RS, scored_from=1) == pytest.approx(by_hand)
    assert bayes_loss(world, text_RS, scored_from=2) == pytest.approx(-math.log(second))


def test_a_vocabulary_too_small_for_distinct_successors_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size 2"):
        build_world(0, vocab_size=2)
