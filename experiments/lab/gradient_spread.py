"""How far gradients of the same policy scatter from batch to batch, by what scores are measured by.

The decision to know: nothing is trained and every estimator sees the same answers, so that what is
compared is the baseline alone. All of these are without a bias: their means agree, and the spread
is what is left.

Shapes: B answers of a batch, R response tokens, G parameters.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.lab.enumerable import PAD_ID, PROMPTS
from moe.counters import stream
from rlhf.group_advantage import leave_one_out
from sft.text import pad_batch

if TYPE_CHECKING:
    from experiments.lab.enumerable import World
    from moe import MoEForCausalLM

BASELINES = {"pg": 1, "rloo_2": 2, "rloo_4": 4}  # answers to a prompt that are measured together


def gradient_spread(
    policy: "MoEForCausalLM",
    logp_PA: Tensor,
    world: "World",
    *,
    answers: int,
    batches: int,
    seed: int,
) -> dict[str, float]:
    """Baseline -> trace of the gradient's covariance over batches of so many answers.

    logp_PA: the policy's own log-probabilities; answers come to each prompt in fours.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in BASELINES}
    for batch in range(batches):
        place_B, prompt_B = drawn(logp_PA, count=answers, seed=seed, batch=batch)
        reward_B = world.reward_PA[prompt_B, place_B]
        logp_B = answers_logp(policy, world, place_B=place_B, prompt_B=prompt_B)
        for name, group in BASELINES.items():
            advantage_B = reward_B if group == 1 else leave_one_out(reward_B, group_size=group)
            found[name].append(flat_gradient(policy, (advantage_B * logp_B).mean()))
    return {name: covariance_trace(torch.stack(rows)) for name, rows in found.items()}


def drawn(logp_PA: Tensor, *, count: int, seed: int, batch: int) -> tuple[Tensor, Tensor]:
    """(place of the answer, prompt) of each answer; four to a prompt, one after another."""
    draw = stream(seed, "gradient spread", batch)
    probability_PA = logp_PA.exp().numpy()
    prompts = [(number // 4) % len(PROMPTS) for number in range(count)]
    places = [
        int(draw.choice(probability_PA.shape[1], p=probability_PA[k] / probability_PA[k].sum()))
        for k in prompts
    ]
    return torch.tensor(places), torch.tensor(prompts)


def answers_logp(
    policy: "MoEForCausalLM", world: "World", *, place_B: Tensor, prompt_B: Tensor
) -> Tensor:
    """(B,) log-probabilities of answers, with their gradient."""
    texts = [
        PROMPTS[k] + list(world.answers[place])
        for k, place in zip(prompt_B.tolist(), place_B.tolist(), strict=True)
    ]
    ids_BS, mask_BS = pad_batch(texts, pad_id=PAD_ID, side="right")
    logits = policy(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits
    logp_BSV = logits[:, :-1].float().log_softmax(dim=-1)
    logp_BS = logp_BSV.gather(2, ids_BS[:, 1:, None])[..., 0]
    first_B = torch.tensor([len(PROMPTS[k]) for k in prompt_B.tolist()])
    place_S = torch.arange(1, ids_BS.shape[1])
    is_answer_BS = (place_S[None, :] >= first_B[:, None]) & mask_BS[:, 1:].bool()
    return torch.where(is_answer_BS, logp_BS, 0.0).sum(dim=1)


def flat_gradient(policy: "MoEForCausalLM", objective: Tensor) -> Tensor:
    """(G,) float64 gradient of a number; the graph is kept for the next one."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)
    return torch.cat([g.double().flatten() for g in gradients if g is not None])


def covariance_trace(rows_NG: Tensor) -> float:
    """Sum over parameters of the variance over count - 1."""
    return float(rows_NG.var(dim=0, unbiased=True).sum())
