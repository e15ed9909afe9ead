"""Repeats of neighbouring tokens: by hand, against slow counts, and what chance alone gives."""

from itertools import combinations, permutations

import pytest
import torch
from torch import Tensor

from moe.repeats import repeats

OPTIONS = {"num_experts": 8, "permutations": 19}


def layer(experts: list[list[int]]) -> Tensor:
    """(1, T, K) int16."""
    return torch.tensor([experts], dtype=torch.int16)


def test_five_tokens_by_hand() -> None:
    # Two texts: a a b | b b. Neighbours: aa, ab, bb; the pair across the texts does not count.
    found = repeats(layer([[0], [0], [1], [1], [1]]), torch.tensor([0, 0, 0, 1, 1]), **OPTIONS)
    assert found.num_pairs == 3 and found.rate_L.item() == pytest.approx(2 / 3)
    assert found.usage_null_L.item() == pytest.approx((2 / 5) ** 2 + (3 / 5) ** 2)
    # Orders of aab: a third of the two neighbours' pairs are aa; bb always is: (2/3 + 1) / 3.
    assert found.shuffle_null_L.item() == pytest.approx((2 / 3 + 1) / 3)


def test_first_or_second_asks_whether_the_two_sets_meet() -> None:
    experts = [[0, 1], [2, 0], [3, 4], [4, 3]]  # meet, not, meet; first choices all differ
    rows = torch.zeros(4).long()
    assert repeats(layer(experts), rows, **OPTIONS).rate_L.item() == 0
    found = repeats(layer(experts), rows, choices=2, **OPTIONS)
    assert found.rate_L.item() == pytest.approx(2 / 3)
    sets = [set(pair) for pair in experts]
    usage = sum(bool(a & b) for a in sets for b in sets) / 16
    assert found.usage_null_L.item() == pytest.approx(usage)
    orders = [
        sum(bool(a & b) for a, b in zip(order, order[1:], strict=False)) / 3
        for order in permutations(sets)
    ]
    assert found.shuffle_null_L.item() == pytest.approx(sum(orders) / len(orders))


def test_even_use_of_eight_experts_gives_the_published_chance_levels() -> None:
    # Every ordered pair once: 12.5 % and 1 - (6 * 5) / (8 * 7) = 46.4 %.
    both = [
        pair
        for first, second in combinations(range(8), 2)
        for pair in ([first, second], [second, first])
    ]
    rows = torch.zeros(len(both)).long()
    assert repeats(layer(both), rows, **OPTIONS).usage_null_L.item() == pytest.approx(1 / 8)
    found = repeats(layer(both), rows, choices=2, **OPTIONS)
    assert found.usage_null_L.item() == pytest.approx(1 - 30 / 56)


def test_one_expert_for_all_repeats_always_and_says_nothing() -> None:
    found = repeats(layer([[3]] * 5), torch.zeros(5).long(), **OPTIONS)
    assert found.rate_L.item() == found.usage_null_L.item() == found.shuffle_null_L.item() == 1
    assert found.p_value == (1.0,)


@pytest.mark.parametrize("choices", [1, 2])
def test_the_exact_shuffle_null_is_the_mean_of_the_shufflings(choices: int) -> None:
    draw = torch.Generator().manual_seed(0)
    experts = torch.rand(2, 60, 5, generator=draw).argsort()[..., :2].short()
    rows = torch.tensor([0] * 7 + [1] * 30 + [4] * 1 + [5] * 22)
    found = repeats(experts, rows, choices=choices, num_experts=5, permutations=400)  # type: ignore[arg-type]
    # 400 shufflings of 56 pairs: the mean has a standard error below 0.004.
    assert found.shuffled_PL.shape == (400, 2)
    torch.testing.assert_close(
        found.shuffled_PL.mean(dim=0), found.shuffle_null_L, atol=0.015, rtol=0
    )


def test_runs_of_one_expert_exceed_the_shuffle_null_and_texts_of_one_expert_do_not() -> None:
    rows = torch.arange(6).repeat_interleave(20)
    runs = torch.arange(120).div(5, rounding_mode="floor") % 4  # five in a row, in every text
    found = repeats(runs.short()[None, :, None], rows, num_experts=4)
    assert found.rate_L.item() > found.shuffle_null_L.item() + 0.3 and found.p_value == (0.01,)
    # Each text has its own expert: far above the loads, explained by the texts alone.
    found = repeats((rows % 4).short()[None, :, None], rows, num_experts=4)
    assert found.rate_L.item() == found.shuffle_null_L.item() == 1 and found.p_value == (1.0,)
    assert found.usage_null_L.item() < 0.3


def test_layers_are_counted_apart_and_a_seed_comes_back() -> None:
    experts = torch.cat([layer([[0], [0], [1]]), layer([[0], [1], [0]])])
    rows = torch.zeros(3).long()
    found = [repeats(experts, rows, **OPTIONS, seed=seed) for seed in (0, 0, 1)]
    assert found[0].rate_L.tolist() == [0.5, 0.0]
    assert torch.equal(found[0].shuffled_PL, found[1].shuffled_PL)
    assert not torch.equal(found[0].shuffled_PL, found[2].shuffled_PL)


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match="2 choices of a router with top_k 1"):
        repeats(layer([[0], [1]]), torch.zeros(2).long(), choices=2, **OPTIONS)
    with pytest.raises(ValueError, match="no token follows another"):
        repeats(layer([[0], [1]]), torch.tensor([0, 1]), **OPTIONS)
