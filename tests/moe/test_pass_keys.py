"""A token's key is its text's name and its number there, whatever the batch looks like."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from moe.errors import UserError
from moe.pass_keys import PassKeys, pass_keys, token_numbers


def keys_of(*args: Any, **kwargs: Any) -> PassKeys:
    keys = pass_keys(args, kwargs)
    assert keys is not None
    return keys


def cache_of(length: int, batch: int = 2) -> DynamicCache:
    cache = DynamicCache()
    cache.update(torch.zeros(batch, 1, length, 2), torch.zeros(batch, 1, length, 2), 0)
    return cache


def test_real_tokens_are_counted_and_padding_on_either_side_is_not() -> None:
    mask_BS = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]).bool()
    numbers = token_numbers(mask_BS, torch.arange(4))
    assert numbers.tolist() == [[-1, -1, 0, 1], [0, 1, 2, -1], [-1] * 4, [0, -1, 1, 2]]


def test_a_row_goes_on_where_its_cache_ends() -> None:
    mask_BS = torch.tensor([[1], [1], [0]]).bool()
    numbers = token_numbers(mask_BS, torch.arange(3), past_B=torch.tensor([4, 0, 2]))
    assert numbers.tolist() == [[4], [0], [-1]]


def test_packed_texts_are_counted_each_by_itself() -> None:
    sample_BS = torch.tensor([[7, 7, 7, 2, 2, 9, 0, 0], [0, 0, 4, 4, 4, 4, 1, 1]])
    mask_BS = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    numbers = token_numbers(mask_BS, sample_BS)
    assert numbers.tolist() == [[0, 1, 2, 0, 1, 0, -1, -1], [-1, -1, 0, 1, 2, 3, 0, 1]]


def test_padding_between_packed_texts_is_skipped() -> None:
    sample_BS = torch.tensor([[5, 5, 5, 6, 6]])
    mask_BS = torch.tensor([[1, 0, 1, 0, 1]]).bool()
    assert token_numbers(mask_BS, sample_BS).tolist() == [[0, -1, 1, -1, 0]]


def test_a_plain_call_names_its_rows_by_number_and_is_whole() -> None:
    keys = keys_of(torch.zeros(2, 3))
    assert keys.sample_ids.tolist() == [0, 1] and keys.is_whole
    assert keys.token_BS.tolist() == [[0, 1, 2]] * 2
    assert keys.sample_BS.tolist() == [[0] * 3, [1] * 3]


@pytest.mark.parametrize("by_position", [True, False])
def test_arguments_are_found_by_position_and_by_name(by_position: bool) -> None:
    ids, mask = torch.zeros(2, 2), torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    cache = cache_of(3)
    names = torch.tensor([8, 3])
    if by_position:
        keys = keys_of(ids, mask, None, cache, sample_ids=names)
    else:
        keys = keys_of(input_ids=ids, attention_mask=mask, past_key_values=cache, sample_ids=names)
    assert keys.token_BS.tolist() == [[2, 3], [3, -1]]
    assert keys.sample_ids.tolist() == [8, 3] and not keys.is_whole


def test_without_a_mask_the_past_is_what_the_cache_holds() -> None:
    assert keys_of(torch.zeros(2, 1), past_key_values=cache_of(5)).token_BS.tolist() == [[5], [5]]
    four_d = torch.zeros(2, 1, 1, 6)
    keys = keys_of(torch.zeros(2, 1), four_d, past_key_values=cache_of(5))
    assert keys.token_BS.tolist() == [[5], [5]]


def test_asking_for_a_cache_makes_a_call_a_part() -> None:
    assert not keys_of(torch.zeros(2, 1), use_cache=True).is_whole
    assert keys_of(torch.zeros(2, 1), use_cache=False).is_whole
    assert keys_of(torch.zeros(2, 1), use_cache=None).is_whole


def test_embeddings_have_keys_and_a_call_without_tokens_has_none() -> None:
    assert keys_of(inputs_embeds=torch.zeros(2, 3, 4)).token_BS.shape == (2, 3)
    assert pass_keys((), {}) is None


@pytest.mark.parametrize("names", [torch.arange(3), torch.zeros(2, 2), torch.tensor(1)])
def test_names_of_another_shape_are_refused(names: Tensor) -> None:
    told = r"sample_ids has shape \(.*\): give \(2,\), a name for each row, or \(2, 3\)"
    with pytest.raises(UserError, match=told):
        keys_of(torch.zeros(2, 3), sample_ids=names)


def test_packed_texts_beside_a_cache_are_refused() -> None:
    with pytest.raises(UserError, match="names packed texts, but the cache holds 5 tokens"):
        keys_of(torch.zeros(2, 3), past_key_values=cache_of(5), sample_ids=torch.zeros(2, 3))
