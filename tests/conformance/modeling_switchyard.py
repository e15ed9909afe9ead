"""Our model under Hugging Face's shared tests; `run.py` copies this file beside them.

Two small models, which together use most parts of a layer. A test that asks for what we refuse by
design skips here and says so; `skips.txt` lists it like any other skip.

Not collected by `make test`.
"""

import unittest
from typing import Any

import torch
from transformers.models.auto import modeling_auto

import moe

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, ids_tensor
from ...test_training_mixin import TrainingTesterMixin

CLASSES = (moe.MoEModel, moe.MoEForCausalLM, moe.MoEForReward, moe.MoEForValue)
# The shared tests choose inputs and labels by these tables, which hold names of classes.
TABLES = (
    modeling_auto.MODEL_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)
for table, kind in zip(TABLES, CLASSES, strict=True):
    table[moe.MoEConfig.model_type] = kind.__name__

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class SwitchyardModelTester:
    """The small model and its inputs, as the shared tests ask for them."""

    batch_size = 13
    seq_length = 7
    is_training = True
    causal_lm_class = moe.MoEForCausalLM

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = SMALL | settings
        self.vocab_size: int = self.settings["vocab_size"]
        self.hidden_size: int = self.settings["hidden_size"]
        self.num_hidden_layers: int = self.settings["num_hidden_layers"]
        self.num_attention_heads: int = self.settings["num_attention_heads"]

    def get_config(self) -> moe.MoEConfig:
        return moe.MoEConfig(**self.settings)

    def prepare_config_and_inputs_for_common(self) -> tuple[moe.MoEConfig, dict[str, Any]]:
        ids_BS = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Row b has b + 1 real tokens, then padding on the right, until the rows are full.
        mask_BS = torch.ones_like(ids_BS).tril()
        return self.get_config(), {"input_ids": ids_BS, "attention_mask": mask_BS}


class SharedTests(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = CLASSES
    # An expert that no token of a tiny batch chose has no gradient.
    test_all_params_have_gradient = False
    # Asked of families that are newer than their tests for it; ours is.
    test_can_init_all_missing_weights_before_2023 = True
    model_tester: SwitchyardModelTester
    settings: dict[str, Any]

    def setUp(self) -> None:
        self.model_tester = SwitchyardModelTester(self.settings)

    def test_config(self) -> None:
        settings = self.model_tester.settings
        ConfigTester(self, config_class=moe.MoEConfig, **settings).run_common_tests()

    def test_problem_types(self) -> None:
        self.skipTest("refused by design: a reward is one scalar, so there are no other problems")

    def test_load_with_mismatched_shapes(self) -> None:
        self.skipTest("refused by design: the test asks the reward head for 42 labels")

    def test_can_load_ignoring_mismatched_shapes(self) -> None:
        self.skipTest("refused by design: the test asks the reward head for 42 labels")

    def test_model_rope_scaling_from_config_1_dynamic(self) -> None:
        self.skipTest("refused by design: dynamic angles depend on the longest row of the batch")

    def test_model_rope_scaling_frequencies(self) -> None:
        self.skipTest("refused by design: the test needs dynamic angles")


class SwitchyardModelTest(SharedTests, unittest.TestCase):
    """Window and full attention, softmax routers, a shared expert, an own output matrix."""

    settings = {
        "window_pattern": "SL",
        "shared_expert_intermediate_size": 16,
        "tie_word_embeddings": False,
    }


class SwitchyardVariantTest(SharedTests, unittest.TestCase):
    """A dense layer and one routed by sigmoid scores with biases; normed heads; tied matrices."""

    settings = {
        "window_pattern": "LS",
        "mlp_layer_types": ["dense", "sparse"],
        "scoring_func": "sigmoid",
        "router_selection_bias": True,
        "router_bias": True,
        "qk_norm": "head",
        "attention_bias": True,
        "tie_word_embeddings": True,
    }
