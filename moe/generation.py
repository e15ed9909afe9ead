"""Sample completions from a causal LM, with the log-probabilities they were drawn with.

One loop for our model and for any Hugging Face causal LM: left-padded prompts, a cache, plain
temperature sampling (no top-p, no penalties: a changed distribution is not the policy's, and its
KL turns negative). Uniform numbers come from named counters, so a sample does not depend on the
batch it is drawn in.

Shapes: B batch, P prompt, R response, V vocabulary.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moe import record
from moe.counters import uniforms
from moe.errors import UserError
from moe.model import MoEModel
from moe.record import RoutingTrace
from moe.replay import is_replaying
from moe.router_spec import RouterSpec, refuse_undecodable


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Prompts and what was drawn for them.

    prompt_BP int64, left-padded; prompt_mask_BP bool; response_BR int64, `pad_id` where masked;
    mask_BR bool, True up to and including the stop token; logp_BR float32, log-probability under
    the sampling temperature, zero where masked; ended_B bool, whether a stop token came.
    routing: one recorded pass for the prompts and one per drawn token, if asked for.
    """

    prompt_BP: Tensor
    prompt_mask_BP: Tensor
    response_BR: Tensor
    mask_BR: Tensor
    logp_BR: Tensor
    ended_B: Tensor
    routing: RoutingTrace | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.mask_BR.sum())


def router_specs(model: nn.Module) -> list[RouterSpec]:
    """The routers of the Switchyard models in it, wrapped or not; empty for other families."""
    own = (module for module in model.modules() if isinstance(module, MoEModel))
    return [backbone.config.router_spec for backbone in own if backbone.config.sparse_layers]


def positions(attention_mask_BS: Tensor) -> Tensor:
    """Position of each token counted over real tokens, 0 for padding on the left."""
    return (attention_mask_BS.long().cumsum(dim=-1) - 1).clamp(min=0)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse-CDF draw; returns token (B,) and log-probability (B,), float32.

    The CDF is summed in float64, so that its last step cannot fall short of the uniform number.
    """
    logp_BV = torch.log_softmax(logits_BV.float(), dim=-1)
    cdf_BV = logp_BV.double().exp().cumsum(dim=-1)
    target_B1 = (uniform_B.to(cdf_BV) * cdf_BV[:, -1])[:, None]
    token_B1 = torch.searchsorted(cdf_BV, target_B1, right=True).clamp(max=logits_BV.shape[-1] - 1)
    return token_B1.squeeze(-1), logp_BV.gather(-1, token_B1).squeeze(-1)


@torch.no_grad()
def sample(
    model: nn.Module,
    prompt_BP: Tensor,
    *,
    prompt_mask_BP: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_ids: Sequence[int],
    seed: int,
    purpose: str = "sample",
    sample_ids: Sequence[int] | None = None,
    pad_id: int = 0,
    record_routing: bool = False,
) -> Rollout:
    """Draw one completion per row of the left-padded prompts.

    temperature: above 0; 0 means greedy, with log-probabilities at temperature 1.
    sample_ids: global index of each row, the counter of its random numbers; default 0..B-1.
    record_routing: keep the routing of every pass.
    Raises ValueError for a negative temperature or a mask that is not left-padded, UserError for a
    router that is not decodable and inside `replay_routing`, since new tokens have no record.
    """
    for spec in router_specs(model):
        refuse_undecodable(spec)
    if is_replaying(model):
        raise UserError("sample draws new tokens, which have no record: call it outside a replay.")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} must be at least 0")
    if bool((~prompt_mask_BP[:, -1].bool()).any()):
        raise ValueError("prompts must be left-padded: the last column has padding")
    batch = prompt_BP.shape[0]
    rows = list(range(batch)) if sample_ids is None else [int(i) for i in sample_ids]
    uniform_BR = uniforms(seed, purpose, rows, length=max_new_tokens)
    draw_all = functools.partial(
        _draw_all,
        model,
        prompt_BP,
        prompt_mask_BP,
        uniform_BR=uniform_BR,
        temperature=temperature,
        stop_ids=stop_ids,
        pad_id=pad_id,
    )
    was_training = model.training
    model.eval()  # dropout would sample from another distribution than the one that is trained
    try:
        if not record_routing:
            return draw_all()
        with record.record_routing(model) as trace:
            rollout = draw_all()
        _name_rows(trace, rollout.mask_BR, rows)
        return replace(rollout, routing=trace)
    finally:
        model.train(was_training)


def _name_rows(trace: RoutingTrace, mask_BR: Tensor, rows: list[int]) -> None:
    """Pass t held the rows that drew token t: after a row has stopped, row numbers name others."""
    for t, forward in enumerate(trace.forwards):
        live = mask_BR[:, t].nonzero().squeeze(-1)
        ids = torch.tensor(rows, device=live.device)[live]
        trace.forwards[t] = replace(forward, sample_ids=ids)


def _draw_all(
    model: nn.Module,
    prompt_BP: Tensor,
    prompt_mask_BP: Tensor,
    *,
    uniform_BR: Tensor,
    temperature: float,
    stop_ids: Sequence[int],
    pad_id: int,
) -> Rollout:
    batch, length = prompt_BP.shape[0], uniform_BR.shape[1]
    device = prompt_BP.device
    response_BR = torch.full((batch, length), pad_id, dtype=torch.long, device=device)
    mask_BR = torch.zeros(batch, length, dtype=torch.bool, device=device)
    logp_BR = torch.zeros(batch, length, device=device)
    ended_B = torch.zeros(batch, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop_ids), device=device)

    live = torch.arange(batch, device=device)  # rows still going; the cache holds only these
    attention = prompt_mask_BP.long()
    step_ids, cache = prompt_BP, None
    step_positions = positions(attention)
    for t in range(length):
        out = model(
            input_ids=step_ids,
            attention_mask=attention,
            position_ids=step_positions,
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits = out.logits[:, -1].float()
        if temperature == 0:
            token = logits.argmax(dim=-1)
            logp = torch.log_softmax(logits, dim=-1).gather(-1, token[:, None]).squeeze(-1)
        else:
            token, logp = draw(logits / temperature, uniform_BR[live.cpu(), t].to(device))
        response_BR[live, t] = token
        mask_BR[live, t] = True
        logp_BR[live, t] = logp
        stopped = torch.isin(token, stops)
        ended_B[live[stopped]] = True
        going = ~stopped
        if not bool(going.any()) or t + 1 == length:
            break
        step_positions = step_positions[:, -1:] + 1
        attention = torch.cat([attention, attention.new_ones(len(live), 1)], dim=1)
        if int(going.sum()) < len(live):
            keep = going.nonzero().squeeze(-1)
            cache.batch_select_indices(keep)
            live, token, attention, step_positions = (
                x[keep] for x in (live, token, attention, step_positions)
            )
        step_ids = token[:, None]
    return Rollout(
        prompt_BP=prompt_BP,
        prompt_mask_BP=prompt_mask_BP.bool(),
        response_BR=response_BR,
        mask_BR=mask_BR,
        logp_BR=logp_BR,
        ended_B=ended_B,
    )
