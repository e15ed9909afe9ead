"""Policy and critic as one module, so that one wrapper and one optimizer hold both.

The decision to know: a shared critic is one linear unit that reads what the language-model head
reads. It listens at that head instead of asking the model for its hidden states, so that one pass
gives logits and values for every family, with adapters or without, and the policy's own modules
stay as they are: it is saved without the value head.

Shapes: B batch, S sequence, R response, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.errors import UserError
from moe.generation import positions
from rlhf.reward import token_scores
from sft.adapt import base_of


class Actor(nn.Module):
    """A policy that needs no critic, with the interface of the two."""

    critic: nn.Module | None = None
    is_shared = False

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, num_response: int
    ) -> tuple[Tensor, None]:
        """Logits (B, R+1, V) of the last R+1 positions, and no values."""
        return response_logits(self.policy, input_ids, attention_mask, num_response), None


class ActorCritic(nn.Module):
    """critic: a scalar model per token, or None for a value head on the policy's trunk."""

    def __init__(self, policy: nn.Module, critic: nn.Module | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = zero_value_head(policy) if critic is None else critic
        self.is_shared = critic is None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        num_response: int,
        *,
        trunk_learns_values: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, R+1, V) of the last R+1 positions, and the value (B, R) before each token.

        trunk_learns_values: false keeps the value's gradient out of a shared trunk.
        """
        if not self.is_shared:
            logits = response_logits(self.policy, input_ids, attention_mask, num_response)
            value_BS = token_scores(self.critic, input_ids, attention_mask)
            return logits, value_BS[:, -num_response - 1 : -1]
        with _input_of(_language_model_head(self.policy)) as seen:
            logits = response_logits(self.policy, input_ids, attention_mask, num_response)
        (hidden_BSD,) = seen
        hidden_BRD = hidden_BSD[:, -num_response - 1 : -1].float()
        if not trunk_learns_values:
            hidden_BRD = hidden_BRD.detach()
        return logits, self.critic(hidden_BRD).squeeze(-1)


def response_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_response: int
) -> Tensor:
    """Logits (B, R+1, V): the position before the response and its R positions."""
    # 2: positions count real tokens, so that left padding changes nothing.
    outputs = model(
        input_ids=input_ids,
        attention_mask=attention_mask.long(),
        position_ids=positions(attention_mask),
        use_cache=False,
        logits_to_keep=num_response + 1,
    )
    return outputs.logits


def zero_value_head(policy: nn.Module) -> nn.Linear:
    """A linear unit of weight and bias 0, float32: every value starts at 0 (Ziegler et al. 2019).

    Its first gradient reaches only itself; the trunk's follows once its weight has moved.
    """
    weight = _language_model_head(policy).weight
    assert isinstance(weight, Tensor)
    head = nn.Linear(weight.shape[-1], 1, device=weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _language_model_head(policy: nn.Module) -> nn.Module:
    model: Any = base_of(policy)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Module):
        raise UserError(
            f"{type(model).__name__} names no language-model head, on whose input a shared critic "
            "would stand: give a separate critic."
        )
    return head


@contextmanager
def _input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What the module is called with inside the `with`, one tensor a call."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        handle.remove()
