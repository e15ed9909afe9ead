"""Our model under Hugging Face's tests of tensor parallelism: two gloo processes on this machine.

Only with `--parallel`. Not collected by `make test`.
"""

import unittest
from typing import Any

from ... import test_expert_parallel_mixin, test_tensor_parallel_mixin
from .test_modeling_switchyard import CLASSES, SwitchyardModelTester

# None means every model; by default the shared tests name the families that they run for.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_expert_parallel_mixin.EP_DISTRIBUTED_TEST_MODEL_TYPES = None


class SwitchyardParallelTest(
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_expert_parallel_mixin.ExpertParallelTesterMixin,
    unittest.TestCase,
):
    all_model_classes = CLASSES
    settings: dict[str, Any] = {"window_pattern": "SL", "tie_word_embeddings": False}
    model_tester: Any = None

    def setUp(self) -> None:
        self.model_tester = SwitchyardModelTester(self.settings)
