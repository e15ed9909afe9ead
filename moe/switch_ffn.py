"""The mixture-of-experts FFN: route, run the experts, combine.

Some families add one expert that every token passes: the shared expert. It is no part of the
routing, so records, balance losses and capacity do not see it.

Shapes: B batch, S sequence, T = B*S tokens, D width, E experts, K experts per token.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from moe.dense_ffn import DenseFFN
from moe.errors import UserError
from moe.experts import FusedExperts
from moe.router_noise import global_generator, jittered
from moe.routing import RouterSpec, Routing, route

SHARED_MODES = ("gated", "added", "averaged")
SELECTION_BIAS = "e_score_correction_bias"  # Hugging Face's name for it


class Router(nn.Linear):
    """A linear map to E logits, computed in float32 whatever the model runs in.

    selection_bias: give it the buffer `e_score_correction_bias` (E,), which the choice alone reads
    and no gradient moves. It is saved, and stays float32 when the model is cast: steps of 1e-3 are
    lost in bfloat16.
    """

    e_score_correction_bias: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool = False,
        selection_bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=bias)
        if selection_bias:
            zeros_E = torch.zeros(num_experts, dtype=torch.float32)
            self.register_buffer(SELECTION_BIAS, zeros_E)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return functional.linear(input.float(), self.weight.float(), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self._buffers.get(SELECTION_BIAS)
        super()._apply(fn, recurse)
        if exact is not None:
            applied = self._buffers[SELECTION_BIAS]
            assert applied is not None
            if applied.dtype != torch.float32:  # cast: take the device, not the rounding
                self._buffers[SELECTION_BIAS] = exact.to(applied.device)
        return self


class SwitchFFN(nn.Module):
    """Replaces a transformer's FFN (Shazeer et al. 2017; Fedus et al. 2022, section 2).

    shared_intermediate_size: width of the shared expert, None for none. shared_mode: how its output
    s joins that of the routed experts, r: "gated" r + sigmoid(g x) s (Qwen2-MoE), "added" r + s
    (DeepSeek), "averaged" (K r + s) / (K + 1), all experts as one mean (OLMo-core).
    router_bias: the router's linear map has a bias (gpt-oss).
    Raises UserError for a shared_mode that is unknown.
    """

    def __init__(
        self,
        spec: RouterSpec,
        *,
        hidden_size: int,
        intermediate_size: int,
        shared_intermediate_size: int | None = None,
        shared_mode: str = "gated",
        router_bias: bool = False,
    ) -> None:
        super().__init__()
        if shared_mode not in SHARED_MODES:
            raise UserError(
                f"shared_expert_mode {shared_mode!r} is unknown: give one of "
                f"{', '.join(SHARED_MODES)}."
            )
        self.spec = spec
        self.shared_mode = shared_mode
        self.gate = Router(
            hidden_size, spec.num_experts, bias=router_bias, selection_bias=spec.selection_bias
        )
        self.experts = FusedExperts(
            num_experts=spec.num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )
        self.shared_expert: DenseFFN | None = None
        if shared_intermediate_size is not None:
            self.shared_expert = DenseFFN(hidden_size, shared_intermediate_size)
            if shared_mode == "gated":
                self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    @property
    def selection_bias_E(self) -> Tensor | None:
        """The router's selection bias, also where an adapter has wrapped the router."""
        gate: Any = self.gate
        router = gate.get_base_layer() if hasattr(gate, "get_base_layer") else gate
        return getattr(router, SELECTION_BIAS, None)

    def forward(
        self,
        x_BSD: Tensor,
        mask_BS: Tensor | None = None,
        *,
        token_BS: Tensor | None = None,
        forced_TK: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Routing]:
        """The output (B, S, D), zero on padding, and the decision for the T = B*S tokens.

        token_BS: int64 token ids, needed by a hash. forced_TK: see `moe.routing.route`.
        generator: draws the router's noise, in training alone; default torch's own.
        """
        batch, length, _ = x_BSD.shape
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        noise = generator if generator is not None else global_generator(x_BSD.device)
        seen_TD = x_TD
        if self.training and self.spec.jitter_noise:
            seen_TD = jittered(x_TD, self.spec.jitter_noise, generator=noise)
        # The router sees to float32 itself; what an adapter puts beside it follows autocast.
        with torch.autocast(x_BSD.device.type, enabled=False):
            logits_TE = self.gate(seen_TD)
        routing = route(
            logits_TE,
            self.spec,
            mask_T=None if mask_BS is None else rearrange(mask_BS, "b s -> (b s)"),
            sequence_T=repeat(torch.arange(batch, device=x_BSD.device), "b -> (b s)", s=length),
            bias_E=self.selection_bias_E,
            token_T=None if token_BS is None else rearrange(token_BS, "b s -> (b s)"),
            forced_TK=forced_TK,
            generator=noise if self.training else None,
        )
        y_TD = self.experts(x_TD, routing)
        if self.shared_expert is not None:
            y_TD = self._with_shared(x_TD, y_TD, mask_T=routing.mask_T)
        return rearrange(y_TD, "(b s) d -> b s d", b=batch), routing

    def _with_shared(self, x_TD: Tensor, y_TD: Tensor, *, mask_T: Tensor) -> Tensor:
        assert self.shared_expert is not None
        if self.shared_mode == "gated":
            shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
        else:
            shared_TD = self.shared_expert(x_TD)
        shared_TD = torch.where(mask_T[:, None], shared_TD, 0.0)
        if self.shared_mode == "averaged":
            routed = self.spec.top_k
            return (routed * y_TD + shared_TD) / (routed + 1)
        return y_TD + shared_TD
