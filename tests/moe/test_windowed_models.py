"""Whole models on the chunked window: Hugging Face's and ours, trained, padded, packed, cached."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from moe import interop
from moe.attention import DENSE_UP_TO, takes_windowed
from moe.config import MoEConfig
from moe.errors import UserError
from moe.model import MoEForCausalLM
from moe.windowed_attention import CHUNK, WINDOWED

Model = TypeVar("Model", bound=PreTrainedModel)
WINDOW = 5
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# One window less and more, one chunk, several, and no multiple of a chunk.
LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, CHUNK, 3 * CHUNK + 7]


def mistral(**changes: Any) -> MistralForCausalLM:
    torch.manual_seed(3)
    config = MistralConfig(
        **SHAPE | {"sliding_window": WINDOW, "tie_word_embeddings": False} | changes
    )
    return MistralForCausalLM(config).eval()


def ours(**changes: Any) -> MoEForCausalLM:
    torch.manual_seed(5)
    settings = SHAPE | {"sliding_window": WINDOW, "num_experts": 3, "moe_intermediate_size": 10}
    return MoEForCausalLM(MoEConfig(**settings | changes)).eval()


def on(implementation: str, model: Model) -> Model:
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


def some_ids(length: int, *, batch: int = 2) -> Tensor:
    return torch.randint(1, 50, (batch, length), generator=torch.Generator().manual_seed(length))


def padding_mask(side: str, length: int) -> Tensor | None:
    """Row 0 loses a third of its tokens on that side, row 1 none."""
    if side == "none":
        return None
    at = torch.arange(length)
    lost = length // 3
    real = at >= lost if side == "left" else at < length - lost
    return torch.stack([real, torch.ones(length)]).long()


def outcome(model: PreTrainedModel, mask: Tensor | None, **batch: Any) -> list[Tensor]:
    """Logits at the real tokens, and every gradient of a weighted sum of them."""
    logits = model(attention_mask=mask, use_cache=False, **batch).logits
    if mask is not None:
        logits = logits[mask.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(8))
    model.zero_grad()
    (logits * weight).mean().backward()
    return [logits, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("length", LENGTHS)
def test_mistral_on_it_equals_mistral_eager(length: int, side: str) -> None:
    ids, mask = some_ids(length), padding_mask(side, length)
    expected = outcome(on("eager", mistral()), mask, input_ids=ids)
    assert_same(outcome(on(WINDOWED, mistral()), mask, input_ids=ids), expected)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("length", LENGTHS)
def test_our_model_on_it_equals_mistral_eager(tmp_path: Path, length: int, side: str) -> None:
    theirs = on("eager", mistral())
    theirs.save_pretrained(tmp_path)
    model = on(WINDOWED, interop.load(tmp_path))
    ids, mask = some_ids(length), padding_mask(side, length)
    expected = outcome(theirs, mask, input_ids=ids)
    found = outcome(model, mask, input_ids=ids)
    assert_same(found, expected)  # the parameters' names are Mistral's, and so is their order
    names = [[name for name, _ in sorted(m.named_parameters())] for m in (model, theirs)]
    assert names[0] == names[1]


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_our_model_takes_it_by_itself_beyond_the_dense_lengths(tmp_path: Path, side: str) -> None:
    theirs = on("eager", mistral())
    theirs.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    ids, mask = some_ids(DENSE_UP_TO + 9), padding_mask(side, DENSE_UP_TO + 9)
    assert_same(outcome(model, mask, input_ids=ids), outcome(theirs, mask, input_ids=ids))


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("side", ["none", "left", "packed"])
@pytest.mark.parametrize("kind", ["mistral", "ours by itself", "mistral dense"])
def test_nothing_as_large_as_a_dense_mask_is_ever_made(kind: str, side: str) -> None:
    length = 1000
    model = ours() if kind == "ours by itself" else on(WINDOWED, mistral())
    model = on("sdpa", model) if kind == "mistral dense" else model
    packed = {"position_ids": torch.arange(length)[None] % 300} if side == "packed" else {}
    mask = None if side == "packed" else padding_mask(side, length)
    with LargestTensor() as watch:
        outcome(model, mask, input_ids=some_ids(length), **packed)
    one_row_of_booleans = length * length
    if kind == "mistral dense":
        assert watch.bytes >= one_row_of_booleans  # so that the watch is known to see masks
    else:
        assert watch.bytes < one_row_of_booleans / 2


def test_up_to_the_dense_lengths_the_default_stays_what_it_was() -> None:
    model = ours()

    def mask_of(length: int, mask: Tensor | None = None) -> Tensor | None:
        seen: list[Tensor | None] = []
        attention = model.model.layers[0].self_attn
        handle = attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        with torch.no_grad():
            model(input_ids=some_ids(length), attention_mask=mask, use_cache=False)
        handle.remove()
        return seen[0]

    short, long = DENSE_UP_TO, DENSE_UP_TO + 1
    dense, chunked = mask_of(short), mask_of(long)
    assert dense is not None and dense.shape[-2:] == (short, short)
    assert chunked is not None and chunked.dim() == 2 and chunked.shape[1] == long
    ready = torch.ones(2, 1, long, long, dtype=torch.bool).tril()
    assert mask_of(long, ready) is ready


def test_a_window_that_hides_nothing_stays_dense() -> None:
    assert not takes_windowed("sdpa", None, length=1000, window=1000)
    assert takes_windowed("sdpa", None, length=1001, window=1000)
    assert not takes_windowed("eager", None, length=1001, window=1000)
    assert not takes_windowed("sdpa", None, length=1001, window=None)


@pytest.mark.parametrize("length", [60, DENSE_UP_TO + 60])
@pytest.mark.parametrize("kind", ["mistral", "ours"])
def test_packed_sequences_are_as_if_alone(kind: str, length: int) -> None:
    model = on(WINDOWED, mistral()) if kind == "mistral" else ours()
    model = on(WINDOWED, model) if length < DENSE_UP_TO else model
    ids = some_ids(length)
    cuts = [length // 3, 1, length - length // 3 - 1]
    places = torch.cat([torch.arange(n) for n in cuts])[None]
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=places, use_cache=False).logits
        alone = [model(input_ids=part, use_cache=False).logits for part in ids.split(cuts, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", [WINDOWED, "sdpa"])
def test_the_future_and_the_neighbours_change_nothing(implementation: str) -> None:
    model, length = on(implementation, ours(window_pattern="SL")), DENSE_UP_TO + 40
    ids = some_ids(length)
    changed = ids.clone()
    changed[0, 530:] = (changed[0, 530:] + 7) % 50
    changed[1] = (changed[1] + 11) % 50
    with torch.no_grad():
        before, after = (model(input_ids=x, use_cache=False).logits[0] for x in (ids, changed))
    torch.testing.assert_close(before[:530], after[:530], atol=1e-5, rtol=1e-5)
    assert (before[530:] - after[530:]).abs().amax(dim=-1).min() > 1e-3


def test_full_layers_beside_sliding_ones_keep_the_whole_past() -> None:
    config = Qwen3Config(
        **SHAPE,
        head_dim=4,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    torch.manual_seed(3)
    theirs = Qwen3ForCausalLM(config).eval()
    for mask in (None, padding_mask("left", 80)):
        expected = outcome(on("eager", theirs), mask, input_ids=some_ids(80))
        assert_same(outcome(on(WINDOWED, theirs), mask, input_ids=some_ids(80)), expected)


def test_a_model_without_windows_is_as_on_sdpa() -> None:
    torch.manual_seed(3)
    theirs = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    found, expected = (
        outcome(on(name, theirs), padding_mask("left", 40), input_ids=some_ids(40))
        for name in (WINDOWED, "sdpa")
    )
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=4)), "no softcap"),
        (
            lambda: GptOssForCausalLM(
                GptOssConfig(**SHAPE, head_dim=4, num_local_experts=2, num_experts_per_tok=1)
            ),
            "no s_aux, which GptOssAttention asks for",
        ),
    ],
)
def test_families_with_other_scores_are_refused(family: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        on(WINDOWED, family())(input_ids=some_ids(9))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    model = on(WINDOWED, mistral()).train()
    batch = {"mask": padding_mask("left", 100), "input_ids": some_ids(100)}
    expected = outcome(model, **batch)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = outcome(model, **batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_activation_checkpointing_changes_no_gradient_of_ours_beyond_the_dense_lengths() -> None:
    model = ours().train()
    batch = {"mask": padding_mask("right", 600), "input_ids": some_ids(600)}
    expected = outcome(model, **batch)
    model.gradient_checkpointing_enable()
    found = outcome(model, **batch)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# --- decoding -----------------------------------------------------------------------------------


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def greedily(model: PreTrainedModel, ids: Tensor, mask: Tensor, *, new: int) -> Iterator[Any]:
    """Each step's output of decoding with a cache, most likely token first."""
    step, places, cache = ids, positions(mask), None
    for _ in range(new):
        with torch.no_grad():
            out = model(
                input_ids=step,
                attention_mask=mask,
                position_ids=places,
                past_key_values=cache,
                use_cache=True,
            )
        yield out
        cache, step = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        places = places[:, -1:] + 1


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("prompt", [3, 60, DENSE_UP_TO + 30])
@pytest.mark.parametrize("window", [1, 2, WINDOW])
@pytest.mark.parametrize("implementation", [WINDOWED, "sdpa"])
def test_generation_past_the_window_equals_the_uncached_forward(
    implementation: str, window: int, prompt: int, side: str
) -> None:
    model = on(implementation, ours(sliding_window=window, window_pattern="SL"))
    ids, new = some_ids(prompt), 2 * WINDOW
    mask = padding_mask(side, prompt)
    mask = torch.ones_like(ids) if mask is None else mask
    for out in greedily(model, ids, mask, new=new):
        with torch.no_grad():
            whole = model(
                input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
            ).logits[:, -1]
        torch.testing.assert_close(out.logits[:, -1], whole, atol=1e-5, rtol=1e-5)
        token = whole.argmax(dim=-1, keepdim=True)
        assert torch.equal(token, out.logits[:, -1:].argmax(dim=-1))
        ids = torch.cat([ids, token], dim=1)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        sliding, full = out.past_key_values.layers
        assert sliding.keys.shape[2] == sliding.values.shape[2] == min(window - 1, ids.shape[1] - 1)
        assert full.keys.shape[2] == ids.shape[1] - 1


@pytest.mark.parametrize("pieces", [[70, 30], [3, 2, 6, 89], [40, 1, 59]])
@pytest.mark.parametrize("kind", ["mistral", "ours"])
def test_a_prompt_read_in_pieces_is_the_prompt(kind: str, pieces: list[int]) -> None:
    model = on(WINDOWED, mistral() if kind == "mistral" else ours())
    ids, mask = some_ids(100), padding_mask("left", 100)
    assert mask is not None
    places, cache, logits, seen = positions(mask), None, [], 0
    with torch.no_grad():
        whole = model(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
        ).logits
        for piece in pieces:
            here = slice(seen, seen + piece)
            out = model(
                input_ids=ids[:, here],
                attention_mask=mask[:, : seen + piece],
                position_ids=places[:, here],
                past_key_values=cache,
                use_cache=True,
            )
            cache, seen = out.past_key_values, seen + piece
            logits.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["mistral", "ours"])
@pytest.mark.parametrize("side", ["none", "left"])
def test_generate_gives_the_text_of_eager(kind: str, side: str) -> None:
    model, ids = mistral() if kind == "mistral" else ours(), some_ids(70)
    mask = padding_mask(side, 70)
    mask = torch.ones_like(ids) if mask is None else mask
    texts = [
        on(name, model).generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=9, do_sample=False
        )
        for name in (WINDOWED, "eager")
    ]
    assert torch.equal(*texts) and texts[0].shape == (2, 79)


def test_a_static_cache_falls_back_to_dense_masks() -> None:
    logits = []
    for name in (WINDOWED, "eager"):
        model = on(name, mistral())
        cache, pieces = StaticCache(config=model.config, max_cache_len=30), []
        with torch.no_grad():
            for piece in some_ids(12).split([3, 1, 2, 6], dim=1):
                pieces.append(model(input_ids=piece, past_key_values=cache).logits)
        logits.append(torch.cat(pieces, dim=1))
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
