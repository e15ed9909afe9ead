"""How far a stage moved the routing of fixed texts, and which experts serve the preferred answers.

The decision to know: change is one number for every kind of model, the share of a token's chosen
experts that are others, while KL needs two language models and is not told of a reward model.

Shapes: L MoE layers, E experts, N pairs, P permutations, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moe.counters import stream
from moe.record import RoutingTrace, record_routing
from moe.saturation import saturation
from moe.stats import jensen_shannon_bits
from sft.rows import SupervisedCollator, SupervisedRow
from sft.text import pad_batch

PERMUTATIONS = 199
ROWS = 32  # of one forward pass


def change_L(before: RoutingTrace, after: RoutingTrace) -> list[float]:
    """Per layer, 1 - mean over tokens of |A & B| / K of the two top-k sets; 0 is no change."""
    return (1 - saturation(before, after).share_L).tolist()


@torch.no_grad()
def token_kl(
    model: nn.Module, start: nn.Module, rows: Sequence[SupervisedRow], *, pad_id: int
) -> float:
    """Mean over the texts' tokens of KL(model || start) of the next token, in nats."""
    collate = SupervisedCollator(pad_id)
    total = count = 0.0
    for first in range(0, len(rows), ROWS):
        batch = collate(list(rows[first : first + ROWS]))
        real_BS = batch["attention_mask"].bool()
        logp, logq = (_log_probs(each, batch)[real_BS].double() for each in (model, start))
        total += float((logp.exp() * (logp - logq)).sum())
        count += float(real_BS.sum())
    return total / count


def _log_probs(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model.eval()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    return torch.log_softmax(logits.float(), dim=-1)


@torch.no_grad()
def answer_use(model: nn.Module, pairs: Sequence[Any], side: str, *, pad_id: int) -> Tensor:
    """Assignments (N, L, E) of the tokens of one side's answers; side: chosen or rejected."""
    model.eval()
    parts = []
    for first in range(0, len(pairs), ROWS):
        batch = pairs[first : first + ROWS]
        rows = [[*row["prompt_ids"], *row[f"{side}_ids"]] for row in batch]
        ids_BS, mask_BS = pad_batch(rows, pad_id=pad_id, side="right")
        with record_routing(model) as trace:
            model(input_ids=ids_BS, attention_mask=mask_BS.long(), use_cache=False)
        answer_BS = mask_BS.clone()
        for place, row in enumerate(batch):
            answer_BS[place, : len(row["prompt_ids"])] = False
        parts.append(_use(trace, answer_BS))
    return torch.cat(parts)


def _use(trace: RoutingTrace, counted_BS: Tensor) -> Tensor:
    """Assignments (B, L, E) of the counted tokens in the trace's only pass."""
    (forward,) = trace.forwards
    chosen_LTE = torch.stack(
        [
            nn.functional.one_hot(routing.expert_TK, routing.num_experts).sum(dim=1)
            for routing in forward.routings
        ]
    )
    by_row = rearrange(chosen_LTE, "l (b s) e -> b l s e", b=len(counted_BS))
    return (by_row * counted_BS[:, None, :, None]).sum(dim=2).double()


def preferred_use(chosen_NLE: Tensor, rejected_NLE: Tensor, *, seed: int) -> dict[str, Any]:
    """Which experts the chosen answers use more, per layer, and whether chance gives as much.

    chosen_rejected_jsd: Jensen-Shannon divergence of the two loads in bits; _by_chance: its mean
    when each pair's two answers change places at random; _p: share of those, the observed one among
    them, that reach it; chosen_minus_rejected: difference of the load shares (L, E).
    """
    observed_L = _divergence(chosen_NLE, rejected_NLE)
    total_NLE = chosen_NLE + rejected_NLE
    rng = stream(seed, "chosen-rejected")
    shuffled_PL = []
    for _ in range(PERMUTATIONS):
        swap_N = torch.from_numpy(rng.random(len(chosen_NLE)) < 0.5)
        first = torch.where(swap_N[:, None, None], rejected_NLE, chosen_NLE)
        shuffled_PL.append(_divergence(first, total_NLE - first))
    shuffled = torch.stack(shuffled_PL)
    reached_L = (shuffled >= observed_L).sum(dim=0)
    return {
        "chosen_rejected_jsd": observed_L.tolist(),
        "chosen_rejected_jsd_by_chance": shuffled.mean(dim=0).tolist(),
        "chosen_rejected_p": ((1 + reached_L.double()) / (1 + PERMUTATIONS)).tolist(),
        "chosen_minus_rejected": (_shares(chosen_NLE) - _shares(rejected_NLE)).tolist(),
    }


def _shares(count_NLE: Tensor) -> Tensor:
    count_LE = count_NLE.sum(dim=0)
    return count_LE / count_LE.sum(dim=-1, keepdim=True)


def _divergence(first_NLE: Tensor, second_NLE: Tensor) -> Tensor:
    return jensen_shannon_bits(_shares(first_NLE), _shares(second_NLE))
