"""Choosing the k largest scores: the fast form does what sorting every row does."""

import pytest
import torch

from moe.selection import top_k_lowest_index


@pytest.mark.parametrize("scores", ["distinct", "many ties", "all equal", "infinite", "nan", "int"])
def test_the_choice_is_the_head_of_a_stable_sort(scores: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for num_tokens, num_experts in ((0, 4), (1, 1), (7, 2), (40, 5), (40, 64)):
        shape = (num_tokens, num_experts)
        score_TE = torch.randn(shape, generator=generator)
        some_TE = torch.rand(shape, generator=generator) < 0.3
        score_TE = {
            "distinct": score_TE,
            "many ties": (2 * score_TE).round(),
            "all equal": torch.zeros(shape),
            "infinite": score_TE.masked_fill(some_TE, -torch.inf),
            "nan": score_TE.masked_fill(some_TE, torch.nan),
            "int": torch.randint(-9, 9, shape, generator=generator),
        }[scores]
        in_order_TE = torch.sort(score_TE, dim=-1, descending=True, stable=True).indices
        for k in {1, 2, num_experts - 1, num_experts} & set(range(1, num_experts + 1)):
            assert torch.equal(top_k_lowest_index(score_TE, k), in_order_TE[:, :k])
