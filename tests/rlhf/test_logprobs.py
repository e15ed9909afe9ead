import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from moe.errors import UserError
from rlhf.logprobs import entropy, response_logps, sequence_logps, token_logps

NAN = float("nan")


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain_logps(logits_BSV: Tensor, ids_BS: Tensor, temperature: float) -> Tensor:
    """The definition, from a full log-softmax."""
    logp_BSV = (logits_BSV[:, :-1] / temperature).log_softmax(-1)
    return pad(logp_BSV.gather(2, ids_BS[:, 1:, None])[..., 0], (1, 0))


def test_the_logits_at_a_position_score_the_token_after_it_by_hand() -> None:
    logits_BSV = torch.tensor([[[0.0, math.log(3.0)], [math.log(4.0), 0.0], [9.0, -9.0]]])
    logp_BS = token_logps(logits_BSV, torch.tensor([[0, 1, 0]]))
    expected = torch.tensor([[0.0, math.log(3 / 4), math.log(4 / 5)]])
    torch.testing.assert_close(logp_BS, expected)


def test_temperature_divides_the_logits_before_the_softmax() -> None:
    logits_BSV = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    logp_BS = token_logps(logits_BSV, torch.tensor([[0, 1]]), temperature=0.5)
    torch.testing.assert_close(logp_BS, torch.tensor([[0.0, math.log(9 / 10)]]))
    entropy_BS = entropy(logits_BSV, temperature=0.5)
    by_hand = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    torch.testing.assert_close(entropy_BS, torch.tensor([[0.0, by_hand]]))


# The larger one is worked through in two pieces (of 1048 and 155 tokens).
@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 401, 1000)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_the_plain_definition(
    shape: tuple[int, int, int], temperature: float
) -> None:
    logits = random_logits(*shape).requires_grad_()
    ids_BS = torch.randint(0, shape[2], shape[:2], generator=torch.Generator().manual_seed(1))
    weight_BS = random_logits(*shape[:2], seed=2)

    ours = token_logps(logits, ids_BS, temperature=temperature)
    (ours_grad,) = torch.autograd.grad((ours * weight_BS).sum(), logits)
    plain = plain_logps(logits, ids_BS, temperature)
    (plain_grad,) = torch.autograd.grad((plain * weight_BS).sum(), logits)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=0, atol=1e-12)

    ours = entropy(logits, temperature=temperature)
    (ours_grad,) = torch.autograd.grad((ours * weight_BS).sum(), logits)
    plain = torch.distributions.Categorical(logits=logits / temperature).entropy()
    plain = pad(plain[:, :-1], (1, 0))
    (plain_grad,) = torch.autograd.grad((plain * weight_BS).sum(), logits)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours_grad, plain_grad, rtol=0, atol=1e-12)


def test_gradients_agree_with_finite_differences() -> None:
    logits = random_logits(2, 3, 4).requires_grad_()
    ids_BS = torch.tensor([[0, 3, 1], [2, 2, 0]])
    assert torch.autograd.gradcheck(lambda z: token_logps(z, ids_BS, temperature=1.3), logits)
    assert torch.autograd.gradcheck(lambda z: entropy(z, temperature=1.3), logits)


def test_a_row_of_one_token_predicts_nothing() -> None:
    logits = random_logits(2, 1, 4).requires_grad_()
    logp_BS = token_logps(logits, torch.zeros(2, 1, dtype=torch.long))
    entropy_BS = entropy(logits)
    assert logp_BS.tolist() == entropy_BS.tolist() == [[0.0], [0.0]]
    (grad,) = torch.autograd.grad((logp_BS + entropy_BS).sum(), logits)
    assert not grad.any()


def test_low_precision_logits_are_summed_in_float32_without_keeping_a_float32_copy() -> None:
    logits = random_logits(2, 6, 50, dtype=torch.bfloat16).requires_grad_()
    ids_BS = torch.arange(12).view(2, 6)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        logp_BS = token_logps(logits, ids_BS, temperature=0.7)
        entropy_BS = entropy(logits, temperature=0.7)
    assert logp_BS.dtype == entropy_BS.dtype == torch.float32
    torch.testing.assert_close(logp_BS, plain_logps(logits.float(), ids_BS, 0.7))
    wide = [x for x in kept if x.numel() >= logits.numel()]
    assert wide and all(x.data_ptr() == logits.data_ptr() for x in wide)
    (grad,) = torch.autograd.grad((logp_BS + entropy_BS).sum(), logits)
    assert grad.dtype == torch.bfloat16


def test_nan_logits_under_padding_reach_neither_values_nor_gradients() -> None:
    logits = random_logits(2, 4, 3)
    logits[0, 3] = NAN  # right padding: predicts a token beyond the row
    logits[1, :2] = NAN  # left padding: predicts tokens 1 and 2
    logits.requires_grad_()
    mask_BS = torch.tensor([[False, True, True, True], [False, False, False, True]])
    ids_BS = torch.tensor([[0, 1, 2, 0], [0, 0, 1, 2]])
    logp_BS = response_logps(token_logps(logits, ids_BS), mask_BS)
    entropy_BS = response_logps(entropy(logits), mask_BS)
    sum_B, _ = sequence_logps(token_logps(logits, ids_BS), mask_BS)
    total = logp_BS.sum() + entropy_BS.sum() + sum_B.sum()
    (grad,) = torch.autograd.grad(total, logits)
    assert torch.isfinite(total) and torch.isfinite(grad).all()
    assert not grad[1, :2].any() and not grad[0, 3].any()
    assert not logp_BS[~mask_BS].any()


def test_a_forbidden_token_has_entropy_share_zero() -> None:
    logits = torch.tensor([[[0.0, 0.0, -math.inf], [0.0, 0.0, 0.0]]]).requires_grad_()
    entropy_BS = entropy(logits)
    torch.testing.assert_close(entropy_BS, torch.tensor([[0.0, math.log(2.0)]]))
    (grad,) = torch.autograd.grad(entropy_BS.sum(), logits)
    assert torch.isfinite(grad).all()


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]]])
    assert token_logps(logits, torch.tensor([[0, 1]]))[0, 1] == -2e4
    assert entropy(logits)[0, 1] == 0.0


def test_sequence_sums_count_the_completion_and_an_empty_row_gives_zero() -> None:
    logp_BS = torch.tensor([[0.0, -1.0, -2.0, -4.0], [0.0, -1.0, NAN, NAN]])
    mask_BS = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])
    sum_B, length_B = sequence_logps(logp_BS, mask_BS)
    assert sum_B.tolist() == [-6.0, 0.0]
    assert length_B.tolist() == [2, 0]


def test_a_completion_that_begins_at_token_0_is_refused() -> None:
    with pytest.raises(ValueError, match="keeps token 0, which no token predicts"):
        sequence_logps(torch.zeros(1, 2), torch.tensor([[True, True]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, math.inf])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(UserError, match="temperature must be a finite number above 0"):
        token_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), temperature=temperature)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) do not belong to ids of shape \(1, 4\)"):
        token_logps(torch.zeros(1, 2, 3), torch.zeros(1, 4).long())
    with pytest.raises(ValueError, match=r"must be \(B, S, V\)"):
        entropy(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"logp \(2, 3\), mask \(2,\)"):
        response_logps(torch.zeros(2, 3), torch.ones(2).bool())
