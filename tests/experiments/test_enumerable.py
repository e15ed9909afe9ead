"""A world whose answers are listed: what is said of it is checked by hand or by drawing."""

import math
from collections import Counter

import pytest
import torch

from experiments.lab.enumerable import (
    BETA,
    EOS,
    LETTERS,
    PROMPTS,
    World,
    answer_logps,
    answers_up_to,
    best_of,
    best_of_bound,
    build_world,
    divergence,
    drawn_pairs,
    exact,
    exact_pairs,
    new_policy,
)


def three(weights: tuple[int, ...] = (1, 2, 4)) -> World:
    """Three answers, alike for every prompt."""
    return World(answers=((0,), (1,), (2,)), weight_PA=(weights,) * len(PROMPTS))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities] * len(PROMPTS), dtype=torch.float64).log()


def test_all_answers_are_listed_once() -> None:
    assert answers_up_to(1) == [(EOS,), *((a,) for a in range(LETTERS))]
    two = answers_up_to(2)
    assert len(set(two)) == len(two) == 1 + LETTERS + LETTERS**2
    assert all(EOS not in answer[:-1] for answer in two)


def test_the_answers_of_a_model_have_all_its_probability_and_that_of_its_tokens() -> None:
    world = build_world(0, longest=2)
    policy = new_policy(0, width=16)
    logp_PA = answer_logps(policy, world)
    assert logp_PA.exp().sum(dim=1).tolist() == pytest.approx([1.0] * len(PROMPTS), abs=1e-5)
    prompt, answer = PROMPTS[1], (2, EOS)
    with torch.no_grad():
        logits = policy.eval()(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    logp_SV = logits.double().log_softmax(dim=-1)
    by_hand = float(logp_SV[len(prompt) - 1, 2] + logp_SV[len(prompt), EOS])
    assert float(logp_PA[1, world.answers.index(answer)]) == pytest.approx(by_hand, abs=1e-5)


def test_the_optimum_is_the_reference_times_the_weights_squared() -> None:
    optimum = three().optimum(logs(0.5, 0.25, 0.25))  # beta 1/2: times w^2 = 1, 4, 16
    assert BETA == 0.5
    assert optimum[0].exp().tolist() == pytest.approx([0.5 / 5.5, 1 / 5.5, 4 / 5.5])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_a_policy_lacks_of_the_objective_is_beta_times_its_distance(seed: int) -> None:
    world = three()
    reference = logs(0.5, 0.25, 0.25)
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(len(PROMPTS), 3, generator=generator).double().log_softmax(dim=1)
    best = exact(world.optimum(reference), reference, world)
    found = exact(policy, reference, world)
    assert best["kl_to_optimum"] == pytest.approx(0.0, abs=1e-12)
    lacking = best["objective"] - found["objective"]
    assert lacking == pytest.approx(BETA * found["kl_to_optimum"])
    assert found["exact_kl"] == pytest.approx(divergence(policy, reference))


def test_the_best_of_two_by_hand_with_and_without_ties() -> None:
    reference = logs(0.5, 0.3, 0.2)
    won = best_of(reference, three(), n=2)[0].exp().tolist()
    assert won == pytest.approx([0.25, 0.8**2 - 0.25, 1 - 0.8**2])
    # Answers 1 and 2 are alike: together 1 - .5^2, shared as the reference shares them.
    tied = best_of(reference, three((1, 2, 2)), n=2)[0].exp().tolist()
    assert tied == pytest.approx([0.25, 0.75 * 0.6, 0.75 * 0.4])
    assert torch.allclose(best_of(reference, three(), n=1), reference)


def test_the_best_of_n_stays_below_its_bound_and_comes_near_it_with_many_answers() -> None:
    assert best_of_bound(4) == pytest.approx(0.6363, abs=1e-4)
    count = 2000
    world = World(
        answers=tuple((i,) for i in range(count)),
        weight_PA=(tuple(range(1, count + 1)),) * len(PROMPTS),
    )
    reference = torch.full((len(PROMPTS), count), 1 / count, dtype=torch.float64).log()
    for n in (2, 4, 16):
        found = divergence(best_of(reference, world, n=n), reference)
        assert best_of_bound(n) - 0.01 < found <= best_of_bound(n)


def test_exact_pairs_are_bradley_terry_to_the_row() -> None:
    world = three()
    rows = exact_pairs(world, distances=(1,))
    wins = Counter((row["chosen_ids"][0], row["rejected_ids"][0]) for row in rows)
    assert wins[(0, 1)] == len(PROMPTS) and wins[(1, 0)] == 2 * len(PROMPTS)
    assert [row["sample_id"] for row in rows] == list(range(len(rows)))


def test_drawn_pairs_are_labelled_by_the_odds_of_their_rewards() -> None:
    world, count = three((1, 1, 8)), 8000
    rows = drawn_pairs(world, logs(0.4, 0.2, 0.4), count=count, seed=0)
    pairs = [(row["chosen_ids"][0], row["rejected_ids"][0]) for row in rows]
    met = sum({a, b} == {0, 2} for a, b in pairs)
    assert met / count == pytest.approx(0.32, abs=0.03)  # 5 standard deviations
    share = pairs.count((2, 0)) / met
    assert share == pytest.approx(8 / 9, abs=0.035)


def test_the_score_is_the_log_weight_of_the_answer_behind_its_prompt() -> None:
    world = build_world(3, longest=2)
    prompt, answer = PROMPTS[2], (1, 0)
    ids = torch.tensor([[0, 0, *prompt, *answer], [0, *prompt, *answer, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0]])
    expected = math.log(world.weight_PA[2][world.answers.index(answer)])
    assert world.score(ids, mask).tolist() == pytest.approx([expected, expected])
