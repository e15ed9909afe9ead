"""The mixture-of-experts FFN: route, run the experts, combine.

Some families add one expert that every token passes, weighed by a gate of its own: the shared
expert. It is no part of the routing, so records, balance losses and capacity do not see it.

Shapes: B batch, S sequence, T = B*S tokens, D width, E experts.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional

from moe.dense_ffn import DenseFFN
from moe.experts import FusedExperts
from moe.routing import RouterSpec, Routing, route


class Router(nn.Linear):
    """A linear map to E logits, computed in float32 whatever the model runs in."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight.float())


class SwitchFFN(nn.Module):
    """Replaces a transformer's FFN (Shazeer et al. 2017; Fedus et al. 2022, section 2).

    shared_intermediate_size: width of a shared expert, which adds sigmoid(g x) * FFN(x) as in
    Qwen2-MoE; None for none.
    """

    def __init__(
        self,
        spec: RouterSpec,
        *,
        hidden_size: int,
        intermediate_size: int,
        shared_intermediate_size: int | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.gate = Router(hidden_size, spec.num_experts)
        self.experts = FusedExperts(
            num_experts=spec.num_experts,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
        )
        self.shared_expert: DenseFFN | None = None
        if shared_intermediate_size is not None:
            self.shared_expert = DenseFFN(hidden_size, shared_intermediate_size)
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x_BSD: Tensor, mask_BS: Tensor | None = None) -> tuple[Tensor, Routing]:
        """The output (B, S, D), zero on padding, and the decision for the T = B*S tokens."""
        batch, length, _ = x_BSD.shape
        x_TD = rearrange(x_BSD, "b s d -> (b s) d")
        routing = route(
            self.gate(x_TD),
            self.spec,
            mask_T=None if mask_BS is None else rearrange(mask_BS, "b s -> (b s)"),
            sequence_T=repeat(torch.arange(batch, device=x_BSD.device), "b -> (b s)", s=length),
        )
        y_TD = self.experts(x_TD, routing)
        if self.shared_expert is not None:
            shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * self.shared_expert(x_TD)
            y_TD = y_TD + torch.where(routing.mask_T[:, None], shared_TD, 0.0)
        return rearrange(y_TD, "(b s) d -> b s d", b=batch), routing
