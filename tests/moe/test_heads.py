"""Scalars are read where the text ends, and the heads open like any other model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from moe import MoEConfig, MoEForCausalLM, MoEForReward, MoEForValue
from moe.heads import last_real_position
from moe.record import record_routing


def make_config(**changes: Any) -> MoEConfig:
    settings: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    return MoEConfig(**settings | changes)


def make_reward(**changes: Any) -> MoEForReward:
    torch.manual_seed(0)
    return MoEForReward(make_config(**changes)).eval()


def some_ids(batch: int = 2, length: int = 6) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_last_real_position_is_found_on_either_side_of_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0]])
    assert last_real_position(mask).tolist() == [2, 3, 3, 2, 0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, 2])
def test_the_reward_is_read_at_the_last_real_token_even_when_pad_is_eos(
    side: str, pad_id: int
) -> None:
    # 2 is EOS and ends both rows; in one case it is PAD as well.
    model = make_reward(eos_token_id=2, pad_token_id=pad_id)
    ids = some_ids()
    ids[:, -1] = 2
    padding = torch.full((2, 3), pad_id)
    real, none = torch.ones_like(ids), torch.zeros_like(padding)
    parts, masks = (
        ([padding, ids], [none, real]) if side == "left" else ([ids, padding], [real, none])
    )
    with torch.no_grad():
        expected = model(ids).logits
        padded = model(torch.cat(parts, dim=1), attention_mask=torch.cat(masks, dim=1)).logits
    assert expected.shape == (2, 1) and expected.dtype == torch.float32
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


def test_the_reward_is_the_value_at_the_last_token() -> None:
    reward, value = make_reward(), MoEForValue(make_config()).eval()
    value.load_state_dict(reward.state_dict())
    ids = some_ids()
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        value_BS1 = value(ids, attention_mask=mask).logits
        reward_B1 = reward(ids, attention_mask=mask).logits
    assert value_BS1.shape == (2, 6, 1)
    torch.testing.assert_close(reward_B1, torch.stack([value_BS1[0, 5], value_BS1[1, 3]]))


def test_the_head_starts_small_and_without_bias() -> None:
    model = make_reward(hidden_size=64, num_attention_heads=2)
    assert model.score.bias.abs().sum() == 0
    assert abs(model.score.weight.std().item() * 65**0.5 - 1) < 0.3


def test_every_expert_router_and_head_weight_can_learn_from_the_reward() -> None:
    model = make_reward().train()
    model(some_ids(batch=8)).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (MoEForReward, AutoModelForSequenceClassification),
        (MoEForValue, AutoModelForTokenClassification),
    ],
)
def test_a_saved_head_loads_through_its_auto_class(tmp_path: Path, kind: Any, auto: Any) -> None:
    torch.manual_seed(0)
    model = kind(make_config()).eval()
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    with torch.no_grad():
        assert torch.equal(loaded(some_ids()).logits, model(some_ids()).logits)


def test_a_head_started_from_a_language_model_misses_only_its_own_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = MoEForCausalLM(make_config())
    policy.save_pretrained(tmp_path)
    reward, told = MoEForReward.from_pretrained(tmp_path, output_loading_info=True)
    assert set(told["missing_keys"]) == {"score.weight", "score.bias"}
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(reward.model.state_dict()[name], tensor), name
    assert reward.score.weight.isfinite().all() and reward.score.weight.abs().sum() > 0


def test_the_routers_of_a_head_can_be_recorded() -> None:
    model, other = make_reward(), make_reward()
    with record_routing(model) as trace, torch.no_grad():
        other(some_ids())
        assert trace.forwards == []
        model(some_ids())
    assert trace.num_layers == 2 and trace.num_experts == 4
