"""The model: what it is, and what can be asked of it without training it.

Names resolve on first use, so that a command can parse its flags before torch is imported.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe.config import MoEConfig as MoEConfig
    from moe.heads import MoEForReward as MoEForReward
    from moe.heads import MoEForValue as MoEForValue
    from moe.model import MoEForCausalLM as MoEForCausalLM
    from moe.model import MoEModel as MoEModel

_HOME = {
    "MoEConfig": "moe.config",
    "MoEModel": "moe.model",
    "MoEForCausalLM": "moe.model",
    "MoEForReward": "moe.heads",
    "MoEForValue": "moe.heads",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'moe' has no attribute {name!r}")
    import_module("moe.heads")  # registers every class with the Auto classes
    return getattr(import_module(_HOME[name]), name)
