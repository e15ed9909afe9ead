"""The chunked window against the rule written out: values, gradients, edges, memory."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moe.attention import naive_attention
from moe.errors import UserError
from moe.windowed_attention import (
    WINDOWED,
    chunked_sdpa,
    visible,
    windowed_attention,
    windowed_attention_forward,
    windowed_mask,
)

WINDOW, CHUNK = 7, 8
FORMS = pytest.mark.parametrize("form", [windowed_attention, chunked_sdpa])


def inputs(
    length: int,
    *,
    keys: int | None = None,
    batch: int = 2,
    heads: tuple[int, int] = (6, 2),
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads[0], length), (heads[1], keys or length), (heads[1], keys or length)]
    return [
        torch.randn(batch, h, n, width, generator=generator).to(dtype).requires_grad_()
        for h, n in shapes
    ]


def written_out(
    query: Tensor,
    key: Tensor,
    *,
    value: Tensor,
    window: int,
    segment_BC: Tensor | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Every score, and the rule as a dense mask."""
    if segment_BC is None:
        segment_BC = torch.ones(1, key.shape[2], dtype=torch.int32)
    seen = visible(segment_BC, num_queries=query.shape[2], window=window)
    mask = torch.zeros(seen.shape, dtype=query.dtype).masked_fill(~seen, float("-inf"))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return naive_attention(nn.Identity(), query, key, value, mask, scaling=scaling)[0]


def with_gradients(
    form: Callable[..., Tensor], tensors: list[Tensor], **options: object
) -> list[Tensor]:
    """The output, and the gradients of a weighted sum of it for query, key and value."""
    query, key, value = tensors
    out = form(query, key, value=value, **options)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weight)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, one, other in zip("oqkv", found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, msg=name)


def segments_of(kind: str, length: int) -> Tensor | None:
    at = torch.arange(length)
    if kind == "left padding":
        return torch.stack([(at >= length // 3).int(), (at >= 2).int()])
    if kind == "right padding":
        return torch.stack([(at < length // 2).int(), torch.ones(length, dtype=torch.int32)])
    if kind == "packed":
        return (1 + at // 5).int()[None]
    if kind == "packed and padded":
        return torch.stack([(1 + at // 11) * (at < length - 4), (1 + at // 3) * (at > 0)]).int()
    return None


KINDS = ["one sequence", "left padding", "right padding", "packed", "packed and padded"]


def test_equal_scores_average_the_values_in_the_window_by_hand() -> None:
    query, key = torch.zeros(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    value = torch.tensor([[[[1.0], [3.0], [8.0], [2.0]]]])
    out = windowed_attention(query, key, value=value, window=2)
    assert out.flatten().tolist() == [1.0, 2.0, 5.5, 5.0]
    apart = torch.tensor([[1, 1, 2, 2]])
    out = windowed_attention(query, key, value=value, window=2, segment_BC=apart)
    assert out.flatten().tolist() == [1.0, 2.0, 8.0, 5.0]


def test_the_rule_by_hand() -> None:
    seen = visible(torch.tensor([[0, 1, 1, 2]]), num_queries=3, window=2)
    assert seen.int().tolist() == [[[[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]]]


@FORMS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, CHUNK, 3 * CHUNK, 37])
def test_chunks_equal_the_written_out_form_in_values_and_gradients(
    form: Callable[..., Tensor], kind: str, length: int
) -> None:
    options = {"window": WINDOW, "segment_BC": segments_of(kind, length)}
    expected = with_gradients(written_out, inputs(length), **options)
    found = with_gradients(form, inputs(length), chunk=CHUNK, **options)
    assert_same(found, expected, 1e-5)  # float32 sums in another order


@FORMS
@pytest.mark.parametrize("window", [1, 2, 64, 65, 1000, 10**12])
def test_any_window_with_the_chunk_in_use(form: Callable[..., Tensor], window: int) -> None:
    tensors = inputs(150)
    found = with_gradients(form, tensors, window=window, scaling=0.7)
    assert_same(found, with_gradients(written_out, tensors, window=window, scaling=0.7), 1e-5)


@FORMS
@pytest.mark.parametrize("keys", [20, 23, 60])
def test_queries_are_the_last_of_more_keys(form: Callable[..., Tensor], keys: int) -> None:
    tensors, segment_BC = inputs(20, keys=keys), segments_of("left padding", keys)
    options = {"window": WINDOW, "segment_BC": segment_BC}
    found = with_gradients(form, tensors, chunk=CHUNK, **options)
    assert_same(found, with_gradients(written_out, tensors, **options), 1e-5)


@FORMS
def test_a_sequence_hidden_by_more_than_a_kernel_block_stays_finite(
    form: Callable[..., Tensor],
) -> None:
    # Kernels walk the keys 512 at a time: a block of which a query sees nothing must not be a NaN.
    at = torch.arange(1400)
    segment_BC = torch.stack([1 + (at >= 700).int() + (at >= 1300).int(), (at >= 900).int()])
    tensors = inputs(1400, heads=(2, 1), width=4)
    options = {"window": 1200, "segment_BC": segment_BC}
    assert_same(
        with_gradients(form, tensors, **options),
        with_gradients(written_out, tensors, **options),
        1e-5,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_the_finite_difference_check_in_float64(kind: str) -> None:
    tensors = inputs(9, heads=(2, 1), width=3, dtype=torch.float64)
    segment_BC = segments_of(kind, 9)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return windowed_attention(query, key, value=value, window=4, segment_BC=segment_BC, chunk=4)

    assert torch.autograd.gradcheck(attention, tensors)


@FORMS
def test_bfloat16_stays_within_its_rounding(form: Callable[..., Tensor]) -> None:
    low = inputs(40, dtype=torch.bfloat16)
    exact = [x.detach().float().requires_grad_() for x in low]
    options = {"window": WINDOW, "segment_BC": segments_of("packed", 40)}
    found = with_gradients(form, low, chunk=CHUNK, **options)
    assert {x.dtype for x in found} == {torch.bfloat16}
    expected = with_gradients(written_out, exact, **options)
    # Eight bits of mantissa: 2**-8 for each of the few roundings of numbers of size 1 to 4.
    assert_same([x.float() for x in found], expected, 0.05)


def test_a_key_gets_its_shares_summed_in_float32() -> None:
    # Queries of 0 weigh all keys alike, so that key 0's value has 1/1 + 1/2 + ... as gradient,
    # over 256 chunks: in bfloat16 the shares below 2**-6 would add nothing, 1.4 in all.
    length = 2048
    query, key, value = inputs(length, batch=1, heads=(1, 1), width=2, dtype=torch.bfloat16)
    out = windowed_attention(query * 0, key, value=value, window=length, chunk=8)
    (grad,) = torch.autograd.grad(out.sum(), value)
    harmonic = sum(1 / n for n in range(1, length + 1))
    # The sum, 8.2, is rounded by 2**-5 at most, and its shares by 2**-9 of theirs.
    assert abs(grad[0, 0, 0, 0].item() - harmonic) < 0.1


def test_autocast_computes_in_its_dtype() -> None:
    query, key, value = inputs(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = windowed_attention(query, key.bfloat16(), value=value, window=4)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and query.grad is not None
    assert query.grad.dtype == torch.float32


@FORMS
def test_strided_inputs_are_taken_as_they_are(form: Callable[..., Tensor]) -> None:
    # As a model hands them: (B, S, H, N) in memory.
    plain = inputs(30)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in plain]
    strided = [x.requires_grad_() for x in strided]
    found = with_gradients(form, strided, window=WINDOW, chunk=CHUNK)
    assert_same(found, with_gradients(form, plain, window=WINDOW, chunk=CHUNK), 1e-6)


@FORMS
def test_what_comes_later_changes_no_bit(form: Callable[..., Tensor]) -> None:
    query, key, value = inputs(50)
    changed = [x.detach().clone() for x in (query, key, value)]
    for tensor in changed:
        tensor[:, :, 21:] = 1e4
    options = {"window": WINDOW, "chunk": CHUNK}
    before = form(query, key, value=value, **options)
    after = form(changed[0], changed[1], value=changed[2], **options)
    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])


@FORMS
def test_other_rows_and_what_left_the_window_change_no_bit(form: Callable[..., Tensor]) -> None:
    query, key, value = inputs(50)
    changed = [x.detach().clone() for x in (query, key, value)]
    for tensor in changed:
        tensor[1] = -tensor[1]
        tensor[0, :, :10] = 1e4
    options = {"window": WINDOW, "chunk": CHUNK}
    before = form(query, key, value=value, **options)
    after = form(changed[0], changed[1], value=changed[2], **options)
    assert torch.equal(before[0, 9 + WINDOW :], after[0, 9 + WINDOW :])
    assert not torch.equal(before[0, 9 + WINDOW - 1], after[0, 9 + WINDOW - 1])


@FORMS
def test_no_gradient_passes_between_real_tokens_and_padding(form: Callable[..., Tensor]) -> None:
    tensors, segment_BC = inputs(30), segments_of("left padding", 30)
    assert segment_BC is not None
    real_BC = segment_BC > 0
    out = form(
        tensors[0],
        tensors[1],
        value=tensors[2],
        window=WINDOW,
        segment_BC=segment_BC,
        chunk=CHUNK,
    )
    assert out.isfinite().all()
    out[real_BC].square().sum().backward()
    for tensor in tensors:
        assert tensor.grad is not None
        assert tensor.grad.transpose(1, 2)[~real_BC].count_nonzero() == 0
        assert tensor.grad.transpose(1, 2)[real_BC].abs().sum() > 0


def kept_bytes(form: Callable[..., Tensor], tensors: list[Tensor], **options: object) -> int:
    """What autograd holds between forward and backward: each storage once, the output too."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        form(tensors[0], tensors[1], value=tensors[2], **options)
    return sum(storages.values())


@pytest.mark.parametrize("kind", ["one sequence", "left padding"])
def test_the_backward_keeps_little_more_than_query_key_value_and_output(kind: str) -> None:
    length = 1024
    tensors = inputs(length, heads=(8, 2), width=32)
    least = sum(x.numel() * x.element_size() for x in [*tensors, tensors[0]])
    options = {"window": 256, "segment_BC": segments_of(kind, length)}
    assert least < kept_bytes(windowed_attention, tensors, **options) <= 1.1 * least
    assert kept_bytes(written_out, tensors, **options) > 10 * least


def test_dropout_draws_anew_for_each_seed_and_scales_what_is_left() -> None:
    query, key, value = inputs(40)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return windowed_attention(query, key, value=value, window=WINDOW, dropout=0.5)

    plain = windowed_attention(query, key, value=value, window=WINDOW)
    assert torch.equal(dropped(1), dropped(1)) and not torch.equal(dropped(1), dropped(2))
    mean = torch.stack([dropped(seed) for seed in range(100)]).mean(dim=0)
    # One weight in two is kept and doubled: the error of the mean is about |v| / sqrt(100).
    assert (mean - plain).square().mean().sqrt() < 0.2


def test_a_second_derivative_is_refused() -> None:
    query, key, value = inputs(10)
    out = windowed_attention(query, key, value=value, window=4)
    (grad,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window 0 must be at least 1"),
        ({"segment_BC": torch.ones(2, 9)}, r"segments \(2, 9\) must be .*\(2, 10\) or \(1, 10\)"),
        ({"heads": (6, 4)}, "6 query heads cannot share 4 key heads"),
        ({"keys": 7}, r"10 queries need at least as many keys.*\(2, 2, 7, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, message: str) -> None:
    shape = {name: changes.pop(name) for name in ("heads", "keys") if name in changes}
    query, key, value = inputs(10, **shape)
    with pytest.raises(UserError, match=message):
        windowed_attention(query, key, value=value, **{"window": 4} | changes)


# --- what Hugging Face's interfaces hand over ---------------------------------------------------


def sliding(window: int) -> Callable[..., Tensor]:
    return lambda b, h, q, kv: (kv <= q) & (kv > q - window) & (b >= 0)


def mask_for(length: int, **changes: object) -> Tensor | None:
    request: dict[str, object] = {
        "batch_size": 2,
        "q_length": length,
        "kv_length": length,
        "mask_function": sliding(4),
        "local_size": 4,
    }
    return windowed_mask(**request | changes)


def test_the_mask_is_one_number_per_key() -> None:
    mask = mask_for(10)
    assert mask is not None and mask.tolist() == [[1] * 10] * 2
    padding = torch.tensor([[0] * 3 + [1] * 7, [1] * 8 + [0] * 2]).bool()
    mask = mask_for(10, attention_mask=padding)
    assert mask is not None and mask.tolist() == padding.int().tolist()


def test_the_mask_of_a_packed_row_counts_its_sequences() -> None:
    sequence = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2, 2], [0] * 10])

    def packed(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return sliding(4)(b, h, q, kv) & (sequence[b, q] == sequence[b, kv])

    mask = mask_for(10, mask_function=packed)
    assert mask is not None and mask.tolist() == (sequence + 1).tolist()


def test_the_mask_of_a_cache_keeps_the_padding_of_the_keys_still_there() -> None:
    padding = torch.tensor([[0] * 6 + [1] * 9, [1] * 15]).bool()
    mask = mask_for(5, kv_length=8, q_offset=10, kv_offset=7, attention_mask=padding)
    assert mask is not None and mask.tolist() == [[1] * 8] * 2
    mask = mask_for(5, kv_length=10, q_offset=10, kv_offset=5, attention_mask=padding)
    assert mask is not None and mask.tolist() == [[0] + [1] * 9, [1] * 10]


@pytest.mark.parametrize("window", [1, 3])
def test_short_rows_and_the_window_of_one_have_masks_too(window: int) -> None:
    for length in (2, 3, 4):
        mask = mask_for(length, mask_function=sliding(window), local_size=window)
        assert mask is not None and mask.shape == (2, length)
        seen = visible(mask, num_queries=length, window=window)
        at = torch.arange(length)
        rule = sliding(window)(torch.zeros(()), torch.zeros(()), at[:, None], at[None])
        assert torch.equal(seen[0, 0], rule)


@pytest.mark.parametrize(
    "changes",
    [
        {"local_size": None},  # a full layer
        {"q_length": 1, "kv_length": 4, "q_offset": 9, "kv_offset": 6},  # decoding
        {"q_length": 3, "kv_length": 6, "q_offset": 2},  # a static cache with empty places
    ],
)
def test_the_mask_is_dense_where_chunks_do_not_serve(changes: dict) -> None:
    mask = mask_for(10, attention_mask=torch.tensor([[0] + [1] * 9, [1] * 10]).bool(), **changes)
    assert mask is not None and mask.dim() == 4 and mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_vmap": True}, "no mask function added by the caller"),
        ({"mask_function": lambda b, h, q, kv: (b >= 0) & (kv <= q + 1)}, "tokens outside of them"),
        ({"mask_function": sliding(5)}, "sees 4 tokens; this model asks for tokens outside"),
    ],
)
def test_a_rule_that_segments_cannot_say_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mask_for(10, **changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 4, "softcap": 30.0}, "no softcap, which Identity asks for"),
        ({"sliding_window": 4, "s_aux": torch.ones(6)}, "no s_aux, which Identity"),
        ({"sliding_window": 4, "is_causal": False}, "is causal, Identity is not"),
        ({}, "does not hand its sliding_window"),
    ],
)
def test_attention_of_another_kind_is_refused(options: dict, message: str) -> None:
    mask = torch.ones(2, 10, dtype=torch.int32)
    with pytest.raises(UserError, match=message):
        windowed_attention_forward(nn.Identity(), *inputs(10), mask, **options)


def test_the_name_is_registered_with_both_interfaces() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    assert AttentionInterface()[WINDOWED] is windowed_attention_forward
    assert AttentionMaskInterface()[WINDOWED] is windowed_mask
