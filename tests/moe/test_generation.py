"""Samples depend on the prompt, the seed and the row's name, and on nothing else."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from moe import MoEConfig, MoEForCausalLM
from moe.generation import Rollout, draw, positions, sample

SHAPE: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
}


def make_model(**changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    settings = SHAPE | {"moe_intermediate_size": 12, "num_experts": 4}
    return MoEForCausalLM(MoEConfig(**settings | changes)).eval()


def foreign(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4)).eval()


PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [4]]


def padded(prompts: list[list[int]], extra: int = 0) -> dict[str, Tensor]:
    longest = max(map(len, prompts)) + extra
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = True
    return {"prompt_BP": ids, "prompt_mask_BP": mask}


def drawn(model: nn.Module, prompts: list[list[int]], extra: int = 0, **options: Any) -> Rollout:
    settings: dict[str, Any] = {"max_new_tokens": 10, "stop_ids": (1, 2), "seed": 3}
    return sample(model, **padded(prompts, extra), **settings | options)


def test_a_draw_inverts_the_cumulative_distribution_by_hand() -> None:
    logits_BV = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(5, 3)
    uniform_B = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.999], dtype=torch.float64)
    token_B, logp_B = draw(logits_BV, uniform_B)
    assert token_B.tolist() == [0, 0, 1, 1, 2]
    torch.testing.assert_close(logp_B, torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3]).log())


def test_an_impossible_token_is_never_drawn() -> None:
    logits_BV = torch.tensor([[-math.inf, 0.0, -math.inf]]).expand(2, 3)
    token_B, _ = draw(logits_BV, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert token_B.tolist() == [1, 1]


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("window", [None, 4])
def test_a_row_is_the_same_alone_in_company_and_with_more_padding(window: int | None) -> None:
    model = make_model(sliding_window=window)
    together = drawn(model, PROMPTS, sample_ids=[10, 11, 12])
    again = drawn(model, PROMPTS[::-1], extra=3, sample_ids=[12, 11, 10])
    for row, prompt in enumerate(PROMPTS):
        alone = drawn(model, [prompt], sample_ids=[10 + row])
        for rollout, place in ((alone, 0), (again, 2 - row)):
            assert torch.equal(rollout.mask_BR[place], together.mask_BR[row])
            assert torch.equal(rollout.response_BR[place], together.response_BR[row])
            torch.testing.assert_close(
                rollout.logp_BR[place], together.logp_BR[row], atol=1e-5, rtol=1e-5
            )


def test_seed_purpose_and_sample_id_change_the_sample() -> None:
    model = make_model()
    rollouts = [
        drawn(model, PROMPTS, stop_ids=()),
        drawn(model, PROMPTS, stop_ids=(), seed=4),
        drawn(model, PROMPTS, stop_ids=(), purpose="other"),
        drawn(model, PROMPTS, stop_ids=(), sample_ids=[7, 8, 9]),
    ]
    assert len({tuple(r.response_BR.flatten().tolist()) for r in rollouts}) == 4
    assert torch.equal(rollouts[0].response_BR, drawn(model, PROMPTS, stop_ids=()).response_BR)


def training_logps(model: nn.Module, rollout: Rollout, temperature: float) -> Tensor:
    ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
    mask = torch.cat([rollout.prompt_mask_BP, rollout.mask_BR], dim=1)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            use_cache=False,
        ).logits
    width = rollout.response_BR.shape[1]
    logp_BRV = (logits[:, -width - 1 : -1] / temperature).log_softmax(-1)
    logp_BR = logp_BRV.gather(-1, rollout.response_BR[..., None]).squeeze(-1)
    return torch.where(rollout.mask_BR, logp_BR, 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["ours", "window", "llama", "mixtral"])
def test_the_log_probabilities_are_those_of_the_training_pass(
    kind: str, temperature: float
) -> None:
    if kind in ("llama", "mixtral"):
        model: nn.Module = foreign(kind)
    else:
        model = make_model(sliding_window=3 if kind == "window" else None)
    rollout = drawn(model, PROMPTS, temperature=temperature)
    expected = training_logps(model, rollout, temperature)
    torch.testing.assert_close(rollout.logp_BR, expected, atol=1e-5, rtol=1e-5)


def test_greedy_is_generates_greedy() -> None:
    model = make_model()
    rollout = drawn(model, PROMPTS, temperature=0.0, stop_ids=(2,))
    batch = padded(PROMPTS)
    theirs = model.generate(
        input_ids=batch["prompt_BP"],
        attention_mask=batch["prompt_mask_BP"].long(),
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )[:, batch["prompt_BP"].shape[1] :]
    ours = rollout.response_BR[:, : theirs.shape[1]]
    assert torch.equal(ours, theirs) and not rollout.mask_BR[:, theirs.shape[1] :].any()
    torch.testing.assert_close(
        rollout.logp_BR, training_logps(model, rollout, 1.0), atol=1e-5, rtol=1e-5
    )


def test_a_stop_token_ends_its_row_and_belongs_to_it() -> None:
    model = make_model()
    free = drawn(model, PROMPTS, stop_ids=())
    assert free.mask_BR.all() and not free.ended_B.any() and free.num_tokens == 30
    stop = int(free.response_BR[1, 4])
    stopped = drawn(model, PROMPTS, stop_ids=(stop,), pad_id=29)
    for row in range(3):
        places = (free.response_BR[row] == stop).nonzero().flatten()
        length = int(places[0]) + 1 if len(places) else 10
        assert stopped.ended_B[row] == bool(len(places))
        assert stopped.mask_BR[row].tolist() == [True] * length + [False] * (10 - length)
        assert torch.equal(stopped.response_BR[row, :length], free.response_BR[row, :length])
        assert (stopped.response_BR[row, length:] == 29).all()
        assert stopped.logp_BR[row, length:].abs().sum() == 0


def test_when_every_row_has_stopped_nothing_more_is_drawn() -> None:
    rollout = drawn(make_model(), PROMPTS, stop_ids=range(30), record_routing=True)
    assert rollout.routing is not None and len(rollout.routing.forwards) == 1
    assert rollout.ended_B.all() and rollout.num_tokens == 3
    assert rollout.mask_BR.shape == (3, 10)


def test_sampling_leaves_the_model_in_the_mode_it_found() -> None:
    model = make_model(attention_dropout=0.5)
    rollout = drawn(model.train(), PROMPTS)
    assert model.training
    assert torch.equal(drawn(model.eval(), PROMPTS).response_BR, rollout.response_BR)
    assert not model.training


@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_recorded_passes_name_the_rows_that_were_still_going(kind: str) -> None:
    model = make_model() if kind == "ours" else foreign("mixtral")
    free = drawn(model, PROMPTS, stop_ids=())
    stop = int(free.response_BR[0, 1])  # row 0 stops early, the rest mostly later
    rollout = drawn(model, PROMPTS, stop_ids=(stop,), sample_ids=[5, 6, 7], record_routing=True)
    rollout_free = drawn(model, PROMPTS, stop_ids=(stop,), sample_ids=[5, 6, 7])
    assert torch.equal(rollout.response_BR, rollout_free.response_BR)
    assert rollout.routing is not None
    for t, forward in enumerate(rollout.routing.forwards):
        live = [5 + row for row in range(3) if rollout.mask_BR[row, t]]
        assert forward.sample_ids.tolist() == live
        assert forward.mask_BS.shape[0] == len(live)
    assert len(rollout.routing.forwards) == int(rollout.mask_BR.sum(dim=1).max())


def test_mistakes_are_refused() -> None:
    batch, options = padded(PROMPTS), {"max_new_tokens": 2, "stop_ids": (1,), "seed": 0}
    with pytest.raises(ValueError, match="temperature -1.0 must be at least 0"):
        sample(make_model(), **batch, **options, temperature=-1.0)
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
    with pytest.raises(ValueError, match="left-padded"):
        sample(make_model(), **flipped, **options)


def test_a_rollout_is_frozen_but_can_be_replaced() -> None:
    rollout = drawn(make_model(), PROMPTS)
    assert replace(rollout, routing=None).num_tokens == rollout.num_tokens
