"""The losses of pairs by name, as `python -m rlhf.train --method dpo --loss NAME` takes them.

To add one: its file, its test, a line here, and its name beside its options in `rlhf.options`
(apart, so that flags are read without torch; a test holds the two together).
"""

from collections.abc import Mapping
from types import MappingProxyType

from rlhf.losses import PreferenceLoss
from rlhf.losses.dpo import DPOLoss
from rlhf.losses.hinge import HingeLoss
from rlhf.losses.ipo import IPOLoss
from rlhf.losses.orpo import ORPOLoss
from rlhf.losses.simpo import SimPOLoss

PAIR_LOSSES: Mapping[str, type[PreferenceLoss]] = MappingProxyType(
    {
        "dpo": DPOLoss,
        "ipo": IPOLoss,
        "hinge": HingeLoss,
        "simpo": SimPOLoss,
        "orpo": ORPOLoss,
    }
)
