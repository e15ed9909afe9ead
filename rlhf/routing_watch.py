"""What each pass of PPO routes: each model's use of its experts, and tokens that two passes flip.

The decision to know: a pass is folded into sums and expert ids as soon as it is over, so that no
more than one pass's router logits are held; ids are kept sorted, because a flip is another SET of
experts, not another order.

Shapes: B batch, S sequence, T tokens (B*S), L MoE layers, K experts per token, P prompt,
R response.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moe.generation import Rollout
from moe.record import RecordedForward, has_router, record_routing
from moe.stats import RouterStats
from rlhf.routing_replay import NO_PASS as NO_PASS
from rlhf.routing_replay import free_choices

Metrics = dict[str, tuple[Tensor, Tensor]]

USAGE = {  # model -> its two keys; the policy's own are `router/load_entropy` and so on
    "critic": ("router/critic_load_entropy", "router/critic_max_vio"),
    "reference": ("router/reference_load_entropy", "router/reference_max_vio"),
    "reward": ("router/reward_load_entropy", "router/reward_max_vio"),
}
FLIPS = {  # pass that is compared with the old-policy pass -> its key
    "new": "router/flip_rate_new",
    "reference": "router/flip_rate_reference",
    "rollout": "router/flip_rate_rollout",
    # Under replay: what the routers would have chosen, against what is replayed.
    "new_free": "router/free_flip_rate_new",
    "rollout_free": "router/free_flip_rate_rollout",
}


class Watch:
    """What was seen so far: stats of all passes, if kept, and choice_BSLK of the last.

    Both are None without routers. replays: the model, if its passes replay; then free_BSLK is what
    its routers would have chosen in the last pass (`rlhf.routing_replay.free_choices`).
    """

    def __init__(self, *, keep_stats: bool = True, replays: nn.Module | None = None) -> None:
        self.keep_stats = keep_stats
        self.replays = replays
        self.stats: RouterStats | None = None
        self.choice_BSLK: Tensor | None = None
        self.free_BSLK: Tensor | None = None

    def add(self, forward: RecordedForward) -> None:
        self.choice_BSLK = choices(forward)
        if self.replays is not None:
            self.free_BSLK = free_choices(self.replays, forward)
        if self.keep_stats:
            found = RouterStats.from_routings(forward.routings)
            self.stats = found if self.stats is None else self.stats.merge(found)


@contextmanager
def watched(model: nn.Module | None, watch: Watch) -> Iterator[Watch]:
    """Watch the model's passes inside the `with`; nothing is seen of None or of a dense model."""
    if model is None or not has_router(model):
        yield watch
        return
    with record_routing(model) as trace:

        def fold(*_: Any) -> None:
            for forward in trace.forwards:
                watch.add(forward)
            trace.clear()

        handle = model.register_forward_hook(fold)
        try:
            yield watch
        finally:
            handle.remove()


@torch.no_grad()
def choices(forward: RecordedForward) -> Tensor:
    """Expert ids (B, S, L, K) of one pass, int16, sorted along K."""
    ids_TLK = torch.stack([r.expert_TK.sort(dim=-1).values for r in forward.routings], dim=1)
    return ids_TLK.to(torch.int16).unflatten(0, forward.mask_BS.shape)


def rollout_choices(rollout: Rollout, sample_ids: Sequence[int]) -> Tensor:
    """Expert ids (B, P + R, L, K) of a recorded rollout's passes, NO_PASS where there was none.

    sample_ids: what the rows were drawn as.
    """
    assert rollout.routing is not None
    place = {sample: row for row, sample in enumerate(sample_ids)}
    batch, num_prompt = rollout.prompt_BP.shape
    length = num_prompt + rollout.response_BR.shape[1]
    whole: Tensor | None = None
    for t, forward in enumerate(rollout.routing.forwards):
        rows = [place[sample] for sample in forward.sample_ids.tolist()]
        found = choices(forward)
        if whole is None:
            whole = found.new_full((batch, length, *found.shape[2:]), NO_PASS)
            whole[rows, :num_prompt] = found
        else:
            whole[rows, num_prompt + t - 1] = found[:, 0]
    assert whole is not None
    return whole


def flip_metrics(
    name: str, choice_BSLK: Tensor | None, old_BSLK: Tensor | None, *, mask_BS: Tensor
) -> Metrics:
    """Share of real tokens whose set of experts differs, per layer and as the layers' mean.

    Empty when a side has no routers or the two do not compare (other layers or experts per token).
    """
    if choice_BSLK is None or old_BSLK is None or choice_BSLK.shape != old_BSLK.shape:
        return {}
    seen_BSL = (choice_BSLK != NO_PASS).all(dim=-1) & (old_BSLK != NO_PASS).all(dim=-1)
    seen_BSL &= mask_BS.bool()[..., None]
    flipped_BSL = (choice_BSLK != old_BSLK).any(dim=-1) & seen_BSL
    flipped_L = flipped_BSL.sum(dim=(0, 1)).double()
    count = seen_BSL[..., 0].sum()
    key = FLIPS[name]
    layers = {f"{key}/layer_{i:02d}": (n, count) for i, n in enumerate(flipped_L)}
    return {key: (flipped_L.mean(), count), **layers}


def usage_metrics(
    name: str, stats: RouterStats | None, *, all_sum: Callable[[Tensor], Tensor], device: Any
) -> Metrics:
    """Load entropy and MaxVio over the passes of all processes, means over layers."""
    if stats is None:
        return {}
    whole = replace(stats, count_LE=all_sum(stats.count_LE.to(device)).cpu())
    tokens = stats.tokens_L[0].cpu()  # each process adds its share: the sum is the value again
    values = (whole.load_entropy_L.mean(), whole.max_vio_L.mean())
    return {key: (value * tokens, tokens) for key, value in zip(USAGE[name], values, strict=True)}
