import math

import pytest
import torch

from sft.loss import LossOutput, language_model_loss


def test_the_loss_by_hand_on_three_tokens() -> None:
    # Row 0 predicts tokens 1 and 2; row 1 only its last. p = softmax of ln(weights) is known.
    weights = torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 1.0], [7.0, 2.0, 1.0]])
    logits_BSV = weights.log().expand(2, 3, 3).clone()
    labels_BS = torch.tensor([[-100, 2, 0], [0, -100, 1]])
    output = language_model_loss(logits_BSV, labels_BS)
    by_hand = -math.log(2 / 4) - math.log(1 / 4) - math.log(2 / 4)
    assert float(output.loss_sum) == pytest.approx(by_hand, rel=1e-6)
    assert int(output.count) == 3
    assert float(output.loss) == pytest.approx(by_hand / 3, rel=1e-6)
    hits, count = output.metrics["lm/accuracy"]  # the likeliest are 2 and 1: two of three are right
    assert (int(hits), int(count)) == (2, 3)


def test_a_label_on_the_first_token_and_logits_after_the_last_count_for_nothing() -> None:
    logits_BSV = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    labels_BS = torch.tensor([[-100, 1, 2, -100]])
    plain = language_model_loss(logits_BSV, labels_BS)
    first = language_model_loss(logits_BSV, torch.tensor([[3, 1, 2, -100]]))
    other = logits_BSV.clone()
    other[:, -1] = 99.0
    last = language_model_loss(other, labels_BS)
    for output in (first, last):
        assert torch.equal(output.loss_sum, plain.loss_sum)
        assert int(output.count) == 2


def test_nan_logits_where_nothing_is_learned_do_not_reach_the_value() -> None:
    logits_BSV = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    labels_BS = torch.tensor([[-100, 1, -100, -100]])
    expected = language_model_loss(logits_BSV, labels_BS).loss_sum
    logits_BSV[:, 1:] = float("nan")
    assert torch.equal(language_model_loss(logits_BSV, labels_BS).loss_sum, expected)


def test_nan_logits_where_nothing_is_learned_do_not_reach_the_gradient() -> None:
    logits_BSV = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels_BS = torch.tensor([[-100, 1, -100, 3], [-100, -100, -100, 2]])
    unlearned_BS = torch.ones(2, 4, dtype=torch.bool)
    unlearned_BS[:, :-1] = labels_BS[:, 1:] == -100
    clean = logits_BSV.clone().requires_grad_(True)
    dirty = logits_BSV.masked_fill(unlearned_BS[..., None], float("nan")).requires_grad_(True)
    for logits in (clean, dirty):
        language_model_loss(logits, labels_BS).loss_sum.backward()
    assert clean.grad is not None and dirty.grad is not None
    assert torch.equal(dirty.grad, clean.grad)
    assert not dirty.grad[unlearned_BS].any()
    assert dirty.grad[~unlearned_BS].any()


def test_leaving_out_what_is_not_learned_costs_no_bit_of_value_or_gradient() -> None:
    """Against cross-entropy with ignore_index, which only lets NaN through."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        logits_BSV = torch.randn(5, 67, 41, generator=generator) * 3
        labels_BS = torch.randint(0, 41, (5, 67), generator=generator)
        labels_BS[torch.rand(5, 67, generator=generator) < 0.6] = -100
        ours, theirs = (logits_BSV.clone().requires_grad_(True) for _ in range(2))
        loss = language_model_loss(ours, labels_BS).loss_sum
        plain = torch.nn.functional.cross_entropy(
            theirs[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten(), reduction="sum"
        )
        assert torch.equal(loss, plain)
        loss.backward(), plain.backward()
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_a_batch_without_labels_is_a_zero_that_has_no_mean() -> None:
    logits_BSV = torch.randn(1, 3, 5, requires_grad=True)
    output = language_model_loss(logits_BSV, torch.full((1, 3), -100))
    assert float(output.loss_sum.detach()) == 0.0
    assert int(output.count) == 0
    with pytest.raises(ValueError, match="the loss has no mean"):
        _ = output.loss
    output.loss_sum.backward()
    assert logits_BSV.grad is not None
    assert not logits_BSV.grad.any()


def test_losses_are_float32_whatever_the_model_runs_in() -> None:
    logits_BSV = torch.randn(1, 3, 5).bfloat16()
    output = language_model_loss(logits_BSV, torch.tensor([[0, 1, 2]]))
    assert output.loss_sum.dtype == torch.float32


def test_micro_batches_add_up_to_the_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    logits_BSV = torch.randn(4, 6, 7, generator=generator, dtype=torch.float32)
    labels_BS = torch.randint(0, 7, (4, 6), generator=generator)
    labels_BS[1, 2:] = labels_BS[3, :4] = -100
    whole = language_model_loss(logits_BSV, labels_BS)
    parts = [language_model_loss(logits_BSV[i], labels_BS[i]) for i in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(sum(p.loss_sum for p in parts), whole.loss_sum)
    assert sum(int(p.count) for p in parts) == int(whole.count)


def test_the_mean_of_a_loss_is_its_sum_over_its_count() -> None:
    assert LossOutput(loss_sum=torch.tensor(6.0), count=torch.tensor(4)).loss == 1.5
