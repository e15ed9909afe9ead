"""Scalar heads: a reward per sequence, a value per token; and the registration of every class.

Both keep the backbone's router in sight (`moe.record`), which the generic classification heads of
other libraries lose.

Shapes: B batch, S sequence, D width.
"""

import copy
from dataclasses import dataclass
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
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.utils import can_return_tuple

from moe.config import MoEConfig
from moe.errors import UserError
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


@dataclass
class ScalarOutput(SequenceClassifierOutputWithPast):
    """What HF's classification heads give, and what the routers said.

    logits: (B, 1) rewards or (B, S, 1) values, float32. router_logits: per MoE layer, (B*S, E).
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class _ScalarHead(MoEPreTrainedModel):
    """Backbone and one linear unit, which starts as `init_scalar_head` says."""

    def __init__(self, config: MoEConfig) -> None:
        config = copy.deepcopy(config)  # the caller's stays as it is
        if config.num_labels > 2:  # two is what a configuration has that never named any
            raise UserError(
                f"num_labels {config.num_labels} cannot be: {type(self).__name__} gives one scalar."
            )
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

    def _read(self, score_BS1: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
        """What the head gives of all tokens' scores."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> ScalarOutput:
        """attention_mask (B, S); without one the last column is the end.

        labels, one number per scalar of `.logits`, -100 where not learned: the loss is then the
        mean squared error, with the balance terms and `num_items_in_batch` as in `MoEForCausalLM`.
        Raises UserError for labels of another shape.
        """
        with self._routings_to_balance(with_loss=labels is not None) as collected:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **kwargs,
            )
        logits = self._read(self.score(outputs.last_hidden_state).float(), attention_mask)
        loss = aux_loss = None
        if labels is not None:
            loss, share = self._squared_error(logits, labels, num_items_in_batch)
            if collected:
                aux_loss = self.balance_penalty(collected[0])
                loss = loss + share * aux_loss
        return ScalarOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            aux_loss=aux_loss,
            router_logits=outputs.router_logits,
        )

    def _squared_error(
        self, scalars: Tensor, labels: Tensor, num_items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        if labels.shape not in (scalars.shape, scalars.shape[:-1]):
            raise UserError(
                f"labels of shape {tuple(labels.shape)} do not fit {type(self).__name__}: give one "
                f"number per scalar, shape {tuple(scalars.shape[:-1])}."
            )
        labels = labels.reshape(scalars.shape)
        learned = labels != -100
        total = torch.where(learned, scalars - labels.float(), 0.0).square().sum()
        here = learned.sum()
        items = here.clamp(min=1) if num_items is None else num_items
        return total / items, here / items


class MoEForReward(_ScalarHead):
    """A reward per sequence, read at the last real token; HF's sequence classification.

    `.logits` (B, 1), labels (B,).
    """

    def _read(self, score_BS1: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
        score_BS = score_BS1.squeeze(-1)
        if attention_mask_BS is None:
            attention_mask_BS = torch.ones_like(score_BS, dtype=torch.long)
        return score_BS.gather(1, last_real_position(attention_mask_BS)[:, None])


class MoEForValue(_ScalarHead):
    """A value per token; HF's token classification with one label.

    `.logits` (B, S, 1), labels (B, S).
    """

    def _read(self, score_BS1: Tensor, attention_mask_BS: Tensor | None) -> Tensor:
        return score_BS1


AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(MoEConfig, MoEForReward, exist_ok=True)
AutoModelForTokenClassification.register(MoEConfig, MoEForValue, exist_ok=True)
