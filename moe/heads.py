"""Scalar heads: a reward per sequence, a value per token; and the registration of every class.

Both keep the backbone's router in sight (`moe.record`), which the generic classification heads of
other libraries lose.

Shapes: B batch, S sequence, D width.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers import initialization as init
from transformers.modeling_outputs import (
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from moe.config import MoEConfig
from moe.model import MoEForCausalLM, MoEModel, MoEPreTrainedModel


def last_real_position(attention_mask_BS: Tensor) -> Tensor:
    """Index (B,) of each row's last real token, whichever side the padding is on.

    Read from the mask, never from token ids: a PAD that equals EOS would hide the end.
    """
    length = attention_mask_BS.shape[1]
    places = torch.arange(length, device=attention_mask_BS.device)
    return torch.where(attention_mask_BS.bool(), places, -1).amax(dim=1).clamp(min=0)


@torch.no_grad()
def init_scalar_head(head: nn.Linear) -> None:
    """N(0, 1/sqrt(D+1)) and bias 0 (Stiennon et al. 2020); what a file gave stays as it is."""
    init.normal_(head.weight, std=(head.in_features + 1) ** -0.5)
    init.zeros_(head.bias)


class _ScalarHead(MoEPreTrainedModel):
    """Backbone and one linear unit, which starts as `init_scalar_head` says."""

    def __init__(self, config: MoEConfig) -> None:
        config = copy.deepcopy(config)  # the caller's stays as it is
        config.num_labels = 1
        super().__init__(config)
        self.model = MoEModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "score", None):
            init_scalar_head(self.score)

    def token_scores(self, input_ids: Tensor | None, **kwargs: Any) -> Tensor:
        """One scalar per token, (B, S), float32."""
        hidden_BSD = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        return self.score(hidden_BSD).squeeze(-1).float()


class MoEForReward(_ScalarHead):
    """A reward per sequence, read at the last real token; HF's sequence classification."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """`.logits` (B, 1). attention_mask (B, S); without one the last column is the end."""
        kwargs.setdefault("use_cache", False)
        score_BS = self.token_scores(input_ids, attention_mask=attention_mask, **kwargs)
        if attention_mask is None:
            attention_mask = torch.ones_like(score_BS, dtype=torch.long)
        last_B = last_real_position(attention_mask)
        return SequenceClassifierOutputWithPast(logits=score_BS.gather(1, last_B[:, None]))


class MoEForValue(_ScalarHead):
    """A value per token; HF's token classification with one label."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """`.logits` (B, S, 1)."""
        kwargs.setdefault("use_cache", False)
        score_BS = self.token_scores(input_ids, attention_mask=attention_mask, **kwargs)
        return TokenClassifierOutput(logits=score_BS[..., None])


AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MoEConfig, MoEForReward, exist_ok=True)
AutoModelForTokenClassification.register(MoEConfig, MoEForValue, exist_ok=True)
