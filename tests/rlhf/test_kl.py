import json
import math

import pytest
import torch

from moe.errors import UserError
from rlhf.kl import AdaptiveKL, FixedKL, KLController, k1, k2, k3


def test_the_three_estimators_by_hand() -> None:
    logp = torch.tensor([0.0, -1.0, -3.0])
    ref_logp = torch.tensor([0.0, -2.0, -1.0])  # d = 0, 1, -2
    torch.testing.assert_close(k1(logp, ref_logp), torch.tensor([0.0, 1.0, -2.0]))
    torch.testing.assert_close(k2(logp, ref_logp), torch.tensor([0.0, 0.5, 2.0]))
    by_hand = torch.tensor([0.0, math.exp(-1.0), math.exp(2.0) - 3.0])
    torch.testing.assert_close(k3(logp, ref_logp), by_hand)


def test_k1_and_k3_average_to_the_exact_kl_and_k2_nearly() -> None:
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    reference = torch.tensor([0.25, 0.3, 0.45], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    means = [(policy * k(policy.log(), reference.log())).sum() for k in (k1, k2, k3)]
    torch.testing.assert_close(means[0], exact, rtol=0, atol=1e-15)
    torch.testing.assert_close(means[2], exact, rtol=0, atol=1e-15)
    assert abs(means[1] / exact - 1.0) < 0.1 and abs(means[1] - exact) > 1e-6


def test_as_a_loss_k1_does_not_pull_k2_pulls_along_the_kl_and_k3_along_the_other_direction() -> (
    None
):
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(-1)
    ref_logp = torch.tensor([0.1, 0.4, -0.6], dtype=torch.float64).log_softmax(-1)
    weight = logp.detach().exp()  # sampling from the policy: the weight is not differentiated

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    forward = gradient((logp.exp() * (logp - ref_logp)).sum())
    backward = gradient((ref_logp.exp() * (ref_logp - logp)).sum())
    close = {"rtol": 0, "atol": 1e-15}
    zero = torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(gradient((weight * k1(logp, ref_logp)).sum()), zero, **close)
    torch.testing.assert_close(gradient((weight * k2(logp, ref_logp)).sum()), forward, **close)
    torch.testing.assert_close(gradient((weight * k3(logp, ref_logp)).sum()), backward, **close)


def test_k3_keeps_its_digits_when_the_models_are_close() -> None:
    difference = torch.tensor([1e-4])  # exp(-d) - 1 + d in float32 is off by more than itself
    torch.testing.assert_close(
        k3(difference, torch.zeros(1)), torch.tensor([0.5e-8]), rtol=2e-3, atol=0
    )


def test_the_adaptive_coefficient_follows_its_rule_by_hand() -> None:
    controller = AdaptiveKL(0.2)  # target 6, horizon 10000
    controller.update(6.0, 512)  # on target
    assert controller.coef == 0.2
    controller.update(12.0, 512)  # error 1, clipped to 0.2
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 0.0512), rel=1e-12)
    controller.update(5.4, 1000)  # error -0.1
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 0.0512) * 0.99, rel=1e-12)
    controller.update(-1.0, 1000)  # a negative estimate: error clipped to -0.2
    assert controller.coef == pytest.approx(0.2 * (1 + 0.2 * 0.0512) * 0.99 * 0.98, rel=1e-12)


def test_the_adaptive_coefficient_brings_a_policy_to_the_target() -> None:
    controller = AdaptiveKL(0.15, target=3.0, horizon=100)
    for _ in range(200):  # a policy whose KL is inverse to the price, as with a linear reward
        controller.update(9.0 / controller.coef, 10)
    assert controller.coef == pytest.approx(3.0, rel=1e-3)


def test_a_controller_resumes_from_json_as_if_it_had_not_stopped() -> None:
    stopped = AdaptiveKL(0.2, target=3.0, horizon=100)
    stopped.update(5.0, 10)
    resumed = AdaptiveKL(0.2, target=3.0, horizon=100)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for controller in (stopped, resumed):
        controller.update(1.0, 10)
    assert resumed == stopped


def test_a_fixed_coefficient_stays() -> None:
    controller: KLController = FixedKL(0.05)
    controller.update(100.0, 512)
    controller.load_state_dict(json.loads(json.dumps(controller.state_dict())))
    assert controller.coef == 0.05


def test_the_state_of_another_controller_is_refused() -> None:
    for state in (
        FixedKL(0.2).state_dict(),
        AdaptiveKL(0.2, target=5.0).state_dict(),
        {"kind": "adaptive", "target": 6.0, "horizon": 10_000},
    ):
        with pytest.raises(UserError, match="is not the configured one"):
            AdaptiveKL(0.2).load_state_dict(state)
    with pytest.raises(UserError, match="is not the configured one"):
        FixedKL(0.2).load_state_dict(FixedKL(0.1).state_dict())
    with pytest.raises(UserError, match="stored coefficient"):
        AdaptiveKL(0.2).load_state_dict(AdaptiveKL(0.2).state_dict() | {"coef": -1.0})


@pytest.mark.parametrize("options", [{"coef": 0.0}, {"coef": 0.1, "target": 0.0}])
def test_an_adaptive_controller_that_could_not_move_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="must be a finite number above 0"):
        AdaptiveKL(**options)


def test_a_negative_fixed_coefficient_is_refused() -> None:
    with pytest.raises(UserError, match="0 or more"):
        FixedKL(-0.1)


@pytest.mark.parametrize("controller", [FixedKL(0.1), AdaptiveKL(0.1)])
def test_a_mean_kl_that_is_not_a_number_is_an_error_and_moves_nothing(
    controller: KLController,
) -> None:
    for kl_mean in (math.nan, math.inf):
        with pytest.raises(ValueError, match="diverged"):
            controller.update(kl_mean, 8)
    with pytest.raises(ValueError, match="no mean KL"):
        controller.update(1.0, 0)
    assert controller.coef == 0.1


def test_an_update_so_large_that_the_coefficient_would_change_sign_is_refused() -> None:
    with pytest.raises(UserError, match="give a horizon above 100.0"):
        AdaptiveKL(0.1, horizon=100).update(0.0, 500)
