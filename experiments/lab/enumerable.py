"""A world whose answers can all be listed: reward, KL and the best possible policy are numbers.

The objective E[r] - beta KL(policy || reference) has one optimum, reference * exp(r / beta) / Z
(Rafailov et al. 2023, eq. 4), and for any policy the objective is below the optimum's by exactly
beta KL(policy || optimum). The decision to know: r = ln w with small integers w, so that
Bradley-Terry preferences are shares w_i : w_j, which a finite table of pairs holds without error.

Shapes: P prompts, A answers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe.counters import stream
from sft.text import pad_batch

if TYPE_CHECKING:
    from moe import MoEForCausalLM

BETA = 0.5  # price of a nat
LETTERS = 4
EOS = LETTERS
PAD_ID = 0  # any letter: what is padding is told by masks
# None is one letter: attention over equal tokens is that over one of them, so that after `a` and
# after `a a` a model must say the same, and the optimum would lie outside what it can be.
PROMPTS = ([0, 3], [1, 2], [3, 0, 1], [2, 2, 3, 1])
MAX_WEIGHT = 8
Answer = tuple[int, ...]


def answers_up_to(longest: int) -> list[Answer]:
    """Every answer: letters and then EOS, or `longest` letters, which are cut off."""
    found: list[Answer] = []
    begun: list[Answer] = [()]
    for length in range(longest):
        found += [(*answer, EOS) for answer in begun]
        begun = [(*answer, letter) for answer in begun for letter in range(LETTERS)]
        if length == longest - 1:
            found += begun
    return found


@dataclass(frozen=True, kw_only=True)
class World:
    """Prompts, all answers to each, and the weights w; the reward of an answer is ln w."""

    answers: tuple[Answer, ...]
    weight_PA: tuple[tuple[int, ...], ...]

    @property
    def longest(self) -> int:
        return max(len(answer) for answer in self.answers)

    @property
    def reward_PA(self) -> Tensor:
        """float64."""
        return torch.tensor(self.weight_PA, dtype=torch.float64).log()

    def optimum(self, reference_PA: Tensor, *, beta: float = BETA) -> Tensor:
        """Log-probabilities of reference * exp(r / beta) / Z, float64."""
        return (reference_PA + self.reward_PA / beta).log_softmax(dim=1)

    def score(self, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
        """The reward of prompts with their answers, (B,); a `rlhf.reward.RewardSource`."""
        place = {answer: i for i, answer in enumerate(self.answers)}
        scores = []
        for ids, mask in zip(input_ids_BS.tolist(), attention_mask_BS.bool().tolist(), strict=True):
            text = [token for token, real in zip(ids, mask, strict=True) if real]
            # A prompt is told by its letters, none of which begins another prompt's.
            prompt = next(k for k, p in enumerate(PROMPTS) if text[: len(p)] == p)
            answer = tuple(text[len(PROMPTS[prompt]) :])
            scores.append(math.log(self.weight_PA[prompt][place[answer]]))
        return torch.tensor(scores)


def build_world(seed: int, *, longest: int) -> World:
    """Weights of 1 to MAX_WEIGHT, drawn by the seed."""
    answers = answers_up_to(longest)
    drawn = stream(seed, "enumerable weights").integers(
        1, MAX_WEIGHT + 1, size=(len(PROMPTS), len(answers))
    )
    return World(answers=tuple(answers), weight_PA=tuple(map(tuple, drawn.tolist())))


def new_policy(seed: int, *, width: int) -> "MoEForCausalLM":
    """A mixture of experts with preferences of its own, so that the reference is not uniform."""
    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    return MoEForCausalLM(
        MoEConfig(
            vocab_size=LETTERS + 1,
            hidden_size=width,
            moe_intermediate_size=width,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_experts=4,
            num_experts_per_tok=2,
            initializer_range=0.6 * width**-0.5,
            tie_word_embeddings=False,
        )
    )


@torch.no_grad()
def answer_logps(model: nn.Module, world: World) -> Tensor:
    """(P, A) float64 log-probabilities of all answers; each row sums to 1 in probability."""
    was_training = model.training
    model.eval()
    rows = []
    for prompt in PROMPTS:
        ids_AS, mask_AS = pad_batch(
            [prompt + list(answer) for answer in world.answers], pad_id=PAD_ID, side="right"
        )
        logits = model(input_ids=ids_AS, attention_mask=mask_AS, use_cache=False).logits
        logp_ASV = logits[:, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
        answer_AR, real_AR = ids_AS[:, len(prompt) :], mask_AS[:, len(prompt) :].bool()
        logp_AR = logp_ASV.gather(2, answer_AR[..., None])[..., 0]
        rows.append(torch.where(real_AR, logp_AR, 0.0).sum(dim=1))
    model.train(was_training)
    logp_PA = torch.stack(rows)
    off = float((logp_PA.logsumexp(dim=1)).abs().max())
    if off > 1e-5:
        raise RuntimeError(f"the answers listed have {off:.1e} nats more or less than all of them")
    return logp_PA.log_softmax(dim=1)  # the rounding of single passes is not the policy's


def divergence(one_PA: Tensor, other_PA: Tensor) -> float:
    """KL(one || other) in nats, mean over the prompts."""
    return float((one_PA.exp() * (one_PA - other_PA)).sum(dim=1).mean())


def exact(policy_PA: Tensor, reference_PA: Tensor, world: World) -> dict[str, float]:
    """What a policy is worth, means over prompts: nats, and rewards; nothing is sampled."""
    optimum_PA = world.optimum(reference_PA)
    reward = float((policy_PA.exp() * world.reward_PA).sum(dim=1).mean())
    kl = divergence(policy_PA, reference_PA)
    return {
        "kl_to_optimum": divergence(policy_PA, optimum_PA),
        "exact_reward": reward,
        "exact_kl": kl,
        "objective": reward - BETA * kl,
    }


def best_of(reference_PA: Tensor, world: World, *, n: int) -> Tensor:
    """Log-probabilities of the best of n answers of the reference, ties to the first drawn.

    P(y) = p(y) / p(same reward) * (F(reward <= r_y)^n - F(reward < r_y)^n).
    """
    rows = []
    for probability_A, reward_A in zip(reference_PA.exp(), world.reward_PA, strict=True):
        below_AA = reward_A[None, :] < reward_A[:, None]
        same_AA = reward_A[None, :] == reward_A[:, None]
        below_A = (below_AA * probability_A).sum(dim=1)
        same_A = (same_AA * probability_A).sum(dim=1)
        won_A = (below_A + same_A) ** n - below_A**n
        rows.append((probability_A / same_A * won_A).log())
    return torch.stack(rows)


def best_of_bound(n: int) -> float:
    """log n - (n - 1) / n: KL(best of n || reference) of rewards without ties, else above it."""
    return math.log(n) - (n - 1) / n


def exact_pairs(world: World, *, distances: Sequence[int]) -> list[dict[str, Any]]:
    """Answers i and i + d both ways, w_i times and w_j times: Bradley-Terry without an error."""
    return list(_numbered(_exact(world, distances)))


def _exact(world: World, distances: Sequence[int]) -> Iterator[dict[str, Any]]:
    for prompt, weights in zip(PROMPTS, world.weight_PA, strict=True):
        for i in range(len(world.answers)):
            for d in distances:
                j = (i + d) % len(world.answers)
                for better, worse in ((i, j), (j, i)):
                    for _ in range(weights[better]):
                        yield _pair(prompt, world.answers[better], world.answers[worse])


def drawn_pairs(
    world: World, reference_PA: Tensor, *, count: int, seed: int
) -> list[dict[str, Any]]:
    """Pairs of answers of the reference, labelled by one Bradley-Terry draw each."""
    draw = stream(seed, "enumerable pairs")
    probability_PA = reference_PA.exp().numpy()
    probability_PA = probability_PA / probability_PA.sum(axis=1, keepdims=True)
    rows = []
    for number in range(count):
        k = number % len(PROMPTS)
        i, j = draw.choice(len(world.answers), size=2, p=probability_PA[k]).tolist()
        w_i, w_j = world.weight_PA[k][i], world.weight_PA[k][j]
        if draw.random() >= w_i / (w_i + w_j):
            i, j = j, i
        rows.append(_pair(PROMPTS[k], world.answers[i], world.answers[j]))
    return list(_numbered(rows))


def _pair(prompt: Sequence[int], better: Answer, worse: Answer) -> dict[str, Any]:
    return {
        "prompt_ids": list(prompt),
        "chosen_ids": list(better),
        "rejected_ids": list(worse),
    }


def _numbered(rows: Any) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        yield {**row, "sample_id": number}
