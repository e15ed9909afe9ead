"""Windows, heads and rotations against forms written out by hand."""

import pytest
import torch
from torch import Tensor, nn

from moe.attention import GroupedQueryAttention, RotaryEmbedding, naive_attention, rotate
from moe.config import MoEConfig
from moe.model import MoEForCausalLM


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_model(seed: int = 0, **changes: object) -> MoEForCausalLM:
    torch.manual_seed(seed)
    settings: dict[str, object] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 10,
        "num_experts": 3,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    return MoEForCausalLM(MoEConfig(**settings | changes)).eval()


def use(model: MoEForCausalLM, attention: str) -> MoEForCausalLM:
    model.set_attn_implementation(attention)
    return model


def test_two_equal_keys_share_the_attention_by_hand() -> None:
    query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[2.0], [2.0]]]])
    value = torch.tensor([[[[3.0], [5.0]]]])
    out, probability = naive_attention(nn.Identity(), query, key, value, None, scaling=1.0)
    assert probability.tolist() == [[[[0.5, 0.5]]]] and out.item() == 4.0


def test_each_kv_head_serves_a_whole_group_of_neighbouring_query_heads() -> None:
    query, key, value = normal(1, 6, 4, 8), normal(1, 2, 4, 8, seed=1), normal(1, 2, 4, 8, seed=2)
    out, _ = naive_attention(nn.Identity(), query, key, value, None, scaling=0.5)
    for head in range(6):
        one, _ = naive_attention(
            nn.Identity(),
            query[:, head : head + 1],
            key[:, head // 3 : head // 3 + 1],
            value[:, head // 3 : head // 3 + 1],
            None,
            scaling=0.5,
        )
        torch.testing.assert_close(out[:, :, head], one[:, :, 0])


def test_a_rotation_keeps_lengths_and_scores_depend_on_distance_alone() -> None:
    rotary = RotaryEmbedding(MoEConfig(hidden_size=32, num_attention_heads=4))
    query, key = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)

    def score(at: int, other: int) -> Tensor:
        positions = [rotary(torch.tensor([[place]])) for place in (at, other)]
        return (rotate(query, *positions[0]) * rotate(key, *positions[1])).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100), atol=1e-4, rtol=1e-4)
    turned = rotate(query, *rotary(torch.tensor([[5]])))
    torch.testing.assert_close(turned.norm(), query.norm())
    assert torch.equal(rotate(query, *rotary(torch.tensor([[0]]))), query)


def test_the_base_of_the_rotation_is_the_configurations() -> None:
    slow = RotaryEmbedding(
        MoEConfig(hidden_size=32, num_attention_heads=4, rope_parameters={"rope_theta": 100.0})
    )
    torch.testing.assert_close(slow.inv_freq, 100.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75]))


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fast_name", ["sdpa", "windowed"])
def test_the_written_out_form_equals_the_fast_ones(
    window: int | None, padded: bool, fast_name: str
) -> None:
    model = make_model(sliding_window=window)
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones(2, 7, dtype=torch.long)
    if padded:
        mask[0, :3] = 0
    with torch.no_grad():
        naive, fast = (
            use(model, name)(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for name in ("eager", fast_name)
        )
    torch.testing.assert_close(naive[mask.bool()], fast[mask.bool()], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "windowed"])
@pytest.mark.parametrize("window", [6, 7, 100])
def test_a_window_as_long_as_the_text_is_full_attention(attention: str, window: int) -> None:
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        full, windowed = (
            use(make_model(**changes), attention)(input_ids=ids, use_cache=False).logits
            for changes in ({}, {"sliding_window": window})
        )
    torch.testing.assert_close(full, windowed, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "windowed"])
def test_a_query_sees_window_tokens_itself_included(attention: str) -> None:
    model = use(make_model(num_hidden_layers=1, sliding_window=3), attention)
    embeds = normal(1, 8, 24).requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[0, 6].square().sum().backward()
    assert embeds.grad is not None
    seen = embeds.grad[0].abs().sum(-1) > 0
    assert seen.tolist() == [False] * 4 + [True] * 3 + [False]


def test_the_pattern_says_which_layers_slide() -> None:
    model = make_model(num_hidden_layers=5, sliding_window=2, window_pattern="SSL")
    attentions = [layer.self_attn for layer in model.model.layers]
    assert all(isinstance(attention, GroupedQueryAttention) for attention in attentions)
    assert [attention.window for attention in attentions] == [2, 2, None, 2, 2]
