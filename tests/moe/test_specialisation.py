"""Domains and words: divergences by hand, published counts, and what shuffling leaves."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe.specialisation import (
    domain_divergence,
    domain_loads,
    joint_divergence,
    shuffled_divergence,
    vocabulary_divergence,
)
from moe.stats import jensen_shannon_bits


def test_disjoint_domains_diverge_by_one_bit_and_equal_ones_not_at_all() -> None:
    apart = torch.tensor([[[4.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 9.0]]])
    labels_N = torch.tensor([0, 0, 1, 1])
    assert domain_divergence(apart, labels_N, num_domains=2).tolist() == pytest.approx([1.0])
    alike = torch.ones(4, 3, 5)
    assert domain_divergence(alike, labels_N, num_domains=2).tolist() == pytest.approx([0.0] * 3)


def test_the_divergence_is_the_mean_over_pairs_of_domains() -> None:
    counts = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    labels_N = torch.tensor([0, 1, 2])
    # One pair is equal, two pairs are disjoint.
    assert domain_divergence(counts, labels_N, num_domains=3).item() == pytest.approx(2 / 3)


def test_shufflings_keep_the_texts_whole_and_come_back_with_their_seed() -> None:
    counts = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]], [[0.0, 4.0]], [[0.0, 4.0]]])
    labels_N = torch.tensor([0, 0, 1, 1])
    options = {"num_domains": 2, "permutations": 60}
    first, again, other = (
        shuffled_divergence(counts, labels_N, **options, seed=seed) for seed in (0, 0, 1)
    )
    assert first.shape == (60, 1) and torch.equal(first, again) and not torch.equal(first, other)
    # Two texts against two: a third of the labelings is the true split, the rest mixes evenly.
    assert {round(value, 6) for value in first.flatten().tolist()} == {0.0, 1.0}
    assert 0.15 < (first > 0.5).double().mean() < 0.55


def test_loads_are_shares_of_a_domains_assignments() -> None:
    counts = torch.tensor([[[3.0, 1.0]], [[0.0, 4.0]], [[1.0, 0.0]]])
    found = domain_loads(counts, torch.tensor([0, 0, 1]), num_domains=2)
    assert found.tolist() == [[[3 / 8, 5 / 8]], [[1.0, 0.0]]]


def test_the_joint_divergence_of_two_is_the_divergence_of_a_pair() -> None:
    loads = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)).double()
    loads = loads / loads.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(joint_divergence(loads), jensen_shannon_bits(*loads))


def test_the_joint_divergence_by_hand_and_at_its_ends() -> None:
    # Three domains that share no expert: log2 3; all equal: 0.
    assert joint_divergence(torch.eye(3).double()[:, None]).item() == pytest.approx(math.log2(3))
    assert joint_divergence(torch.full((3, 1, 4), 0.25).double()).item() == 0
    # Weights 3/4 and 1/4 on disjoint loads: the entropy of the weights.
    weight_G = torch.tensor([0.75, 0.25]).double()
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    found = joint_divergence(torch.eye(2).double()[:, None], weight_G)
    assert found.item() == pytest.approx(entropy)


@pytest.fixture(scope="session")
def published(shared_data: Path) -> dict[str, Tensor]:
    """Published assignment counts of two models, (domains, layers 0, 7 and 15, experts)."""
    path = shared_data / "routing" / "mixtral_olmoe_expert_counts.json"
    if not path.is_file():
        pytest.skip(f"published expert counts absent: no {path.name} beside the project")
    counts = json.loads(path.read_text(encoding="utf-8"))
    return {
        model: torch.tensor(list(counts[model].values()), dtype=torch.float64)
        for model in ("mixtral", "olmoe")
    }


@pytest.mark.parametrize(
    ("model", "bits", "over_twice"),
    [
        ("mixtral", (0.0031, 0.0037, 0.0090), (0.0, 0.0, 0.0)),
        ("olmoe", (0.1674, 0.4005, 0.5012), (0.047, 0.081, 0.122)),
    ],
)
def test_published_counts_give_the_published_divergences(
    published: dict[str, Tensor],
    model: str,
    bits: tuple[float, ...],
    over_twice: tuple[float, ...],
) -> None:
    count_GLE = published[model]
    load_GLE = domain_loads(count_GLE, torch.arange(5), num_domains=5)
    assert joint_divergence(load_GLE).tolist() == pytest.approx(list(bits), abs=5e-5)
    above = (load_GLE * load_GLE.shape[-1] > 2).double().mean(dim=(0, 2))
    assert above.tolist() == pytest.approx(list(over_twice), abs=5e-4)


# --- by token ------------------------------------------------------------------------------------


def vocabulary(token_T: Tensor, expert_TK: Tensor, sequence_T: Tensor, **options: int) -> tuple:
    found = vocabulary_divergence(
        token_T,
        expert_TK.short()[None],
        sequence_T=sequence_T,
        **{"num_experts": 4, "min_count": 1, "permutations": 99} | options,
    )
    return found.jsd_bits_L.item(), found.shuffled_PL.mean().item(), found.p_value[0], found


def test_words_with_an_expert_of_their_own_say_all_there_is_to_say() -> None:
    token_T = torch.arange(80) % 4
    bits, by_chance, p, _ = vocabulary(token_T, token_T[:, None], torch.zeros(80).long())
    assert bits == pytest.approx(2.0) and by_chance < 0.3 and p == 0.01
    # Two experts each, of four: one bit of the two is which of the pair, not which word.
    pair_TK = torch.stack([token_T, (token_T + 1) % 4], dim=1)
    bits, _, p, _ = vocabulary(token_T, pair_TK, torch.zeros(80).long())
    assert bits == pytest.approx(1.0) and p == 0.01


def test_three_words_by_hand() -> None:
    # a to 0 twice, b to 1 twice, c to both: H(1/2, 1/2) - (1/3) H(1/2, 1/2) = 2/3 bits.
    token_T, expert_T = torch.tensor([5, 5, 7, 7, 9, 9]), torch.tensor([0, 0, 1, 1, 0, 1])
    bits, *_ = vocabulary(token_T, expert_T[:, None], torch.zeros(6).long(), num_experts=2)
    assert bits == pytest.approx(2 / 3)


def test_words_that_say_nothing_are_at_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    token_T = torch.randint(0, 5, (400,), generator=draw)
    expert_T = torch.randint(0, 4, (400, 1), generator=draw)
    bits, by_chance, p, _ = vocabulary(token_T, expert_T, torch.zeros(400).long())
    assert 0 < bits < 0.1 and bits == pytest.approx(by_chance, abs=0.03) and p > 0.01


def test_what_a_text_is_about_does_not_pass_for_what_a_word_is() -> None:
    # Each text has its own words and its own expert: within a text the word says nothing more.
    sequence_T = torch.arange(4).repeat_interleave(20)
    token_T = 2 * sequence_T + torch.arange(80) % 2
    bits, by_chance, p, _ = vocabulary(token_T, sequence_T[:, None], sequence_T)
    assert bits == pytest.approx(2.0) == pytest.approx(by_chance) and p == 1.0


def test_rare_words_are_left_out_and_a_file_of_rare_words_is_refused() -> None:
    token_T = torch.tensor([1, 1, 1, 2])
    *_, found = vocabulary(token_T, token_T[:, None] % 2, torch.zeros(4).long(), min_count=3)
    assert (found.num_kinds, found.num_tokens) == (1, 3)
    with pytest.raises(ValueError, match="no token occurs 9 times"):
        vocabulary(token_T, token_T[:, None] % 2, torch.zeros(4).long(), min_count=9)
