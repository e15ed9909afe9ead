"""What of a model is trained: everything, or low-rank adapters on named parts.

The only file that imports peft. Parts are named by what they are (attention, experts, router,
ffn), never by a family's module names, because a list of names silently misses fused experts.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
PARTS = ("attention", "experts", "router", "ffn", "embeddings", "norms", "head", "other")
LORA_PARTS = ("attention", "experts", "router", "ffn")
# The first that matches decides: `post_attention_layernorm` is a norm, `embed_out` a head.
_PART_PATTERNS = (
    ("experts", r"\.experts\b"),
    ("router", r"(^|\.)(gate|router)\b"),
    ("norms", r"norm"),
    ("head", r"(^|\.)(lm_head|score|classifier|embed_out)\b"),
    ("attention", r"attn|attention"),
    ("embeddings", r"embed|wte|wpe"),
    ("ffn", r"(^|\.)(mlp|ffn|feed_forward)\b"),
)


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters: W + (alpha / rank) B A (Hu et al. 2021, eq. 3), B zero at the start.

    targets: parts out of attention, experts, router, ffn; each must exist in the model.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("attention", "experts")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora rank {self.rank} must be at least 1 (0 means a full update).")
        unknown = sorted(set(self.targets) - set(LORA_PARTS))
        if unknown or not self.targets:
            raise UserError(
                f"lora targets {list(self.targets)}: name some of {', '.join(LORA_PARTS)}."
            )


def part_of(name: str) -> str:
    """The part that a parameter's name belongs to."""
    plain = re.sub(r"\.(lora_[AB]|base_layer|modules_to_save)\b.*", "", name)
    for part, pattern in _PART_PATTERNS:
        if re.search(pattern, plain):
            return part
    return "other"


def lora_targets(model: nn.Module, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Linear modules and stacked parameters of the named parts.

    Raises UserError naming what the model has when a part is absent.
    """
    modules: dict[str, list[str]] = {part: [] for part in LORA_PARTS}
    parameters: dict[str, list[str]] = {part: [] for part in LORA_PARTS}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            modules.get(part_of(f"{name}.weight"), []).append(name)
        else:
            for own_name, parameter in module.named_parameters(recurse=False):
                part = part_of(f"{name}.{own_name}")
                if part in ("experts", "router") and parameter.dim() in (2, 3):
                    parameters[part].append(f"{name}.{own_name}")
    present = [part for part in LORA_PARTS if modules[part] or parameters[part]]
    for part in parts:
        if part not in present:
            raise UserError(
                f"lora target {part!r} matches nothing: this model has {', '.join(present)}."
            )
    return (
        [name for part in parts for name in modules[part]],
        [name for part in parts for name in parameters[part]],
    )


def add_lora(model: nn.Module, spec: LoraSpec, *, name: str = "default") -> nn.Module:
    """Wrap the model with one trainable adapter; everything else is frozen.

    A scalar head, where there is one, is trained in full beside the adapter.
    """
    from peft import LoraConfig, get_peft_model

    modules, parameters = lora_targets(model, spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=parameters or None,
        modules_to_save=[name for name in ("score", "classifier") if hasattr(model, name)] or None,
    )
    return get_peft_model(model, config, adapter_name=name)


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base: str,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write the active adapter in PEFT's own layout; `peft.PeftModel.from_pretrained` opens it.

    base: the folder of the base model, as `adapter_config.json` is to name it. state: the wrapped
    model's weights, where its own are sharded.
    """
    wrapped: Any = model
    name = wrapped.active_adapter
    wrapped.peft_config[name].base_model_name_or_path = base
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    # Looking at the base's embeddings to decide whether to save them would ask the network.
    options: dict[str, Any] = {} if state is None else {"state_dict": dict(state)}
    wrapped.save_pretrained(
        temporary, selected_adapters=[name], save_embedding_layers=False, **options
    )
    (temporary / "README.md").unlink(missing_ok=True)  # an empty form to fill in
    for path in temporary.rglob(ADAPTER_CONFIG):
        _sort_lists(path)
    shutil.rmtree(folder, ignore_errors=True)
    # PEFT puts an adapter that is not called "default" one folder deeper.
    (temporary if name == "default" else temporary / name).rename(folder)
    shutil.rmtree(temporary, ignore_errors=True)


def _sort_lists(path: Path) -> None:
    """PEFT keeps the targets in a set, whose order is another in every process."""
    document = json.loads(path.read_text(encoding="utf-8"))
    ordered = {k: sorted(v) if isinstance(v, list) else v for k, v in document.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load_adapter(model: nn.Module, folder: Path, *, name: str) -> nn.Module:
    """The model with the saved adapter `name` on it, frozen.

    Raises UserError unless the folder's tensors are exactly those the adapter has on this model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{folder} has no {path.name}: it holds no whole adapter.")
    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(folder), adapter_name=name)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the adapter in {folder} does not fit its base: {error}") from error
    live = get_peft_model_state_dict(wrapped, adapter_name=name, save_embedding_layers=False)
    with safe_open(path, framework="pt") as file:
        missing = sorted(set(live) ^ set(file.keys()))
    if missing:
        raise UserError(
            f"the adapter in {folder} does not fit its base: {len(missing)} tensors are on "
            f"one side only, first {missing[0]}."
        )
    loaded: nn.Module = wrapped
    return loaded


def adapter_base(folder: Path) -> str:
    """The base model's folder, as the adapter's own configuration names it."""
    try:
        document = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        return str(document["base_model_name_or_path"])
    except (ValueError, KeyError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG} cannot be read: {error!r}.") from error


def adapter_spec(model: nn.Module, name: str) -> LoraSpec:
    """Rank, alpha and parts of an adapter that the model carries."""
    wrapped: Any = model
    config = wrapped.peft_config[name]
    found = {part_of(n) for n, _ in model.named_parameters() if f".{name}" in n and "lora_" in n}
    targets = tuple(part for part in LORA_PARTS if part in found)
    return LoraSpec(rank=config.r, alpha=config.lora_alpha, targets=targets)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries adapters."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def base_of(model: nn.Module) -> nn.Module:
    """The model under the adapters, or the model itself."""
    return model.get_base_model() if is_adapted(model) else model  # type: ignore[operator]


def copy_adapter(model: Any, source: str, *, name: str) -> None:
    """Add a trainable copy `name` of the adapter `source` and make it the active one."""
    model.add_adapter(name, model.peft_config[source])
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, parameter in parameters.items():
            if f".{name}." in key or key.endswith(f".{name}"):
                original = re.sub(rf"\.{re.escape(name)}(\.|$)", rf".{source}\1", key)
                parameter.copy_(parameters[original])
    model.set_adapter(name)


@contextmanager
def active_adapter(model: Any, name: str | None) -> Iterator[None]:
    """Run with adapter `name` (None: with adapters off), then put everything back as it was."""
    trainable = {id(p): p.requires_grad for p in model.parameters()}
    before = model.active_adapter
    try:
        if name is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(name)
            yield
    finally:
        if name is not None:
            model.set_adapter(before)
        for parameter in model.parameters():
            parameter.requires_grad_(trainable[id(parameter)])


def merged(model: nn.Module) -> nn.Module:
    """The plain model with the active adapter folded into its weights (the adapters are gone)."""
    return model.merge_and_unload() if is_adapted(model) else model  # type: ignore[operator]


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: two passes over a text must give the same log-probabilities."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "hidden_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if isinstance(getattr(config, name, None), float):
            setattr(config, name, 0.0)


def trainable_by_part(model: nn.Module) -> Mapping[str, tuple[int, int]]:
    """part -> (trainable, all) parameters, for the parts that the model has."""
    counts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        count = counts.setdefault(part_of(name), [0, 0])
        count[0] += parameter.numel() if parameter.requires_grad else 0
        count[1] += parameter.numel()
    return {part: (counts[part][0], counts[part][1]) for part in PARTS if part in counts}


def describe_trainable(model: nn.Module) -> str:
    """One line: trainable parameters of each part, and the share of the whole."""
    parts = trainable_by_part(model)
    trained = sum(count for count, _ in parts.values())
    total = sum(count for _, count in parts.values())
    each = ", ".join(f"{part} {count:,}" for part, (count, _) in parts.items())
    return f"trainable: {each} ({100 * trained / max(total, 1):.2f} % of {total:,})"
