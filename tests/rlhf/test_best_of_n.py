"""Best of n: the best draw is kept, and its price in nats is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe import MoEConfig, MoEForCausalLM
from moe.generation import sample
from rlhf.best_of_n import BestOfN, best_of_n, kl_bound
from sft.text import pad_batch

STOPS = (2, 5, 7, 9)


def tiny_lm() -> MoEForCausalLM:
    torch.manual_seed(0)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=32, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, num_experts=4, initializer_range=0.2,
        )
    ).eval()  # fmt: skip


PROMPTS = pad_batch([[3, 4, 5, 6], [8, 9], [10]], pad_id=0, side="left")


def id_sum(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    return torch.where(attention_mask_BS.bool(), input_ids_BS, 0).sum(dim=1).float()


def draw(n: int, *, reward: Any = id_sum, rows: slice = slice(None), **changes: Any) -> BestOfN:
    prompt_BP, mask_BP = PROMPTS
    return best_of_n(
        tiny_lm(),
        prompt_BP[rows],
        prompt_mask_BP=mask_BP[rows],
        reward=reward,
        n=n,
        max_new_tokens=5,
        temperature=1.0,
        stop_ids=STOPS,
        seed=3,
        **changes,
    )


def single(number: int) -> Any:
    prompt_BP, mask_BP = PROMPTS
    return sample(
        tiny_lm(), prompt_BP, prompt_mask_BP=mask_BP, max_new_tokens=5, stop_ids=STOPS, seed=3,
        purpose=f"best-of-n-{number}",
    )  # fmt: skip


def test_the_draw_with_the_best_score_is_kept_row_by_row() -> None:
    found = draw(6)
    draws = [single(number) for number in range(6)]
    prompt_BP, mask_BP = PROMPTS
    scores_NB = torch.stack(
        [
            id_sum(
                torch.cat([prompt_BP, d.response_BR], dim=1), torch.cat([mask_BP, d.mask_BR], dim=1)
            )
            for d in draws
        ]
    )
    best_B = scores_NB.argmax(dim=0).tolist()
    assert len(set(best_B)) > 1
    assert torch.equal(found.score_B, scores_NB.amax(dim=0))
    for row, number in enumerate(best_B):
        for name in ("response_BR", "mask_BR", "logp_BR", "ended_B"):
            held = getattr(found.rollout, name)[row]
            assert torch.equal(held, getattr(draws[number], name)[row]), name
    assert torch.equal(found.rollout.prompt_BP, prompt_BP)
    assert found.tokens_generated == sum(d.num_tokens for d in draws)


def test_the_best_of_one_is_a_plain_sample() -> None:
    found, plain = draw(1), single(0)
    assert torch.equal(found.rollout.response_BR, plain.response_BR)
    assert torch.equal(found.rollout.logp_BR, plain.logp_BR)
    assert found.tokens_generated == plain.num_tokens


def test_more_draws_never_score_less() -> None:
    scores = torch.stack([draw(n).score_B for n in (1, 2, 4, 8)])
    assert bool((scores.diff(dim=0) >= 0).all())
    assert bool((scores[-1] > scores[0]).any())


def test_a_tie_goes_to_the_first_draw() -> None:
    found = draw(4, reward=lambda ids, mask: torch.zeros(len(ids)))
    assert torch.equal(found.rollout.response_BR, single(0).response_BR)


def test_a_prompt_gets_the_same_draws_in_any_batch() -> None:
    whole, part = draw(4), draw(4, rows=slice(1, 3), sample_ids=[1, 2])
    assert torch.equal(whole.rollout.response_BR[1:], part.rollout.response_BR)
    assert torch.equal(whole.score_B[1:], part.score_B)


def test_the_price_in_nats_by_hand() -> None:
    assert kl_bound(1) == 0.0
    assert kl_bound(2) == pytest.approx(math.log(2) - 0.5)
    assert kl_bound(16) == pytest.approx(2.772589 - 0.9375, abs=1e-6)


def test_the_price_is_exact_without_ties() -> None:
    """n draws from m equally likely answers with scores 1..m: P(best = k) is known, m large."""
    m, n = 20_000, 4
    rank = torch.arange(m + 1, dtype=torch.float64)
    share = (rank / m).pow(n).diff()
    assert float((share * (share * m).log()).sum()) == pytest.approx(kl_bound(n), abs=1e-3)


def test_no_draws_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="n 0 must be at least 1"):
        draw(0)
