"""Parameters, FLOPs, KV cache and memory of a model: exact, on the meta device, in seconds.

    python -m moe.budget mixtral-8x7b
    python -m moe.budget mistral-7b --method lora --lora-rank 8 --targets all-linear --json

The one decision: nothing is counted from a formula of our own where a real model can be built.
`moe/known/*.json` pins whole configurations, because the defaults of transformers are not the
published models (its OLMoE default has twice the expert width); the class of transformers is built
on the meta device, without memory, and its tensors are summed. deepseek-moe-16b has no native
class: glm4_moe without query and key norms has the same parameters, and is built in its place.

Conventions, all of which other people choose otherwise:

- `total` is base + adapter. `active` is what one token's forward reads of the base: every
  parameter outside the routed experts, and k / E of those. "Without input embedding" leaves out
  the lookup table, except where it is tied and serves as the output head too. Routing biases that
  are buffers (DeepSeek-V3: 14,848 numbers) and multi-token-prediction layers are not counted.
- `flops_per_token` is the forward: 2 x the active parameters that take part in a matrix product,
  output head included, attention scores apart (they add 4 L H N for each token in the context).
  Training is three times as much. An encoder-decoder is counted for a source and a target token.
- `kv_bytes_per_token` is 2 bytes (bfloat16) x keys and values of all layers, whatever dtype trains,
  before a sliding window caps it. Multi-head latent attention keeps the latent and the rotary key.
  An encoder-decoder's cross-attention cache, which grows with the source, is not in it.
- Memory is in bytes (GB = 1e9) for AdamW. Per trained parameter, weights / gradients / optimizer:
  float32 4/4/8; bfloat16 2/2/4 (everything in bfloat16); mixed 2/2/12 (bfloat16 weights and
  gradients, float32 master and moments). All add to 16 but the pure bfloat16. With LoRA the base is
  frozen, without gradients or moments, in the dtype given, and the adapter is float32 (4/4/8).
  qlora stores the weights of Linear layers except the output head in NF4 with double quantization:
  4 + 8/64 + 32/(64*256) bits each (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). Fused
  experts are not Linear layers: bitsandbytes leaves them in bfloat16, and so does the count.
- `activations` is 0 unless batch_size and sequence_length are given: no tokens, no activations.
  Then each active matrix product keeps its input and its output, and the loss keeps the logits
  once more in float32. An estimate, without checkpointing, for attention that never stores its
  scores: within 20 % of what autograd saves in transformers 5.23. Adapters do not shrink it.
- The stages: sft holds the trained model alone; rm trains the model with one row instead of the
  output head, and `total` and the others are of that model; dpo adds a frozen reference; ppo adds
  a reference, a frozen reward model and a value model trained in the same way as the policy. No
  two of them share weights, but a LoRA policy is its own reference with the adapter off.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KNOWN = Path(__file__).parent / "known"
METHODS = ("full", "lora", "qlora")
STAGES = ("sft", "rm", "dpo", "ppo")
ALL_LINEAR = "all-linear"
KV_BYTES = 2
NF4_BITS = Fraction(4) + Fraction(8, 64) + Fraction(32, 64 * 256)
# Bytes per trained parameter: weights, gradients, optimizer.
TRAINED_BYTES = {"float32": (4, 4, 8), "bfloat16": (2, 2, 4), "mixed": (2, 2, 12)}
ADAPTER_BYTES = TRAINED_BYTES["float32"]

# transformers 5 fuses experts that were Linear layers before. PEFT carries the old words over to
# the fused tensors, by the family whose checkpoint layout a model shares, and then no longer
# applies the same words to that model's Linear layers (shared experts, dense layers): nor do we.
FUSED_WORDS: dict[str, dict[str, str]] = {
    "mixtral": {
        "gate": "gate.weight",
        "w1": "gate_up_proj",
        "w3": "gate_up_proj",
        "w2": "down_proj",
    },
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter tensor, counted once however many names it has."""

    name: str
    size: int
    share: Fraction  # of it, read for one token: k / E in a routed expert, else 1
    features: int  # numbers in and out of its matrix product if every expert ran; 0 without one
    matmul: bool  # takes part in a matrix product
    is_linear: bool  # the weight of a Linear layer other than the output head
    is_scalar_head: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One tensor that LoRA adapts, and the size of its A and B together."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the trained model (first four) and of the models that the stage keeps beside it."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    reference: int
    value: int
    reward: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model costs; the conventions are in the head of this file."""

    name: str
    method: str
    stage: str
    dtype: str
    total: int
    active: int
    active_without_input_embedding: int
    trainable: int
    kv_bytes_per_token: int
    flops_per_token: int
    memory: Memory
    adapted: tuple[Adapted, ...]

    @property
    def percent(self) -> float:
        """Trainable of total, rounded to the four decimals that PEFT prints."""
        return round(100 * self.trainable / self.total, 4)

    def to_dict(self) -> dict[str, Any]:
        """The keys of `--json`."""
        fields = asdict(self)
        for word in ("stage", "dtype", "adapted"):
            del fields[word]
        return {**fields, "percent": self.percent}


def known_names() -> tuple[str, ...]:
    """The models whose configuration is pinned here."""
    return tuple(sorted(path.stem for path in KNOWN.glob("*.json")))


def known_config(name: str) -> dict[str, Any]:
    """The pinned configuration of a known model, in HF's field names.

    Raises UserError with the nearest name for an unknown one.
    """
    path = KNOWN / f"{name.lower()}.json"
    if name.lower() not in known_names():
        nearest = get_close_matches(name.lower(), known_names(), n=1, cutoff=0.5)
        hint = f" Did you mean {nearest[0]}?" if nearest else ""
        raise UserError(
            f"no model {name!r}: give one of {', '.join(known_names())}, "
            f"or a directory with a config.json.{hint}"
        )
    fields = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in fields.items() if not key.startswith("_")}


def meta_model(name_or_config: str | Path | Mapping[str, Any] | Any) -> PreTrainedModel:
    """The model on the meta device: its shapes without its memory.

    Takes a known name, a directory with config.json, a mapping of HF's fields, or a config object.
    Raises UserError when there is no such model or transformers refuses the configuration.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, logging

    config = name_or_config
    if isinstance(config, str | Path):
        config = _fields_of(config)
    if isinstance(config, Mapping):
        config = _config_of(config)
    if not isinstance(config, PreTrainedConfig):
        raise UserError(
            f"a {type(config).__name__} is no model: give a name, a directory, "
            "a mapping of config fields or a config object."
        )
    family = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    loudness = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print a generation config
    try:
        with torch.device("meta"):
            return family.from_config(config)
    except UserError:
        raise
    except Exception as problem:  # each model class fails on bad sizes in its own way
        raise UserError(
            f"transformers cannot build a {config.model_type} language model from this config: "
            f"{_first_line(problem)}"
        ) from problem
    finally:
        logging.set_verbosity(loudness)


def budget(
    name_or_config: str | Path | Mapping[str, Any] | Any,
    *,
    method: str = "full",
    lora_rank: int = 0,
    targets: str | Sequence[str] | None = None,
    dtype: str | None = None,
    stage: str = "sft",
    batch_size: int = 0,
    sequence_length: int = 0,
) -> Budget:
    """Counts a model and what training it by `method` in `stage` takes.

    `name_or_config` is as for `meta_model`. `targets` is "all-linear" (the default with LoRA: every
    Linear layer but the output head and, where PEFT maps them, the fused experts and the router) or
    module names, in a list or with commas. `dtype` is float32 (default), bfloat16 (default with
    qlora) or mixed (full only). `batch_size` sequences (a preference pair is two) of
    `sequence_length` tokens set `activations`.

    Raises UserError for an unknown model, a target that matches nothing, an option without effect.
    """
    dtype = dtype or ("bfloat16" if method == "qlora" else "float32")
    _check_options(method, lora_rank=lora_rank, targets=targets, dtype=dtype, stage=stage)
    _check_tokens(batch_size, sequence_length=sequence_length)
    model = meta_model(name_or_config)
    name = _name(name_or_config)
    adapted: tuple[Adapted, ...] = ()
    if method != "full":
        words = ALL_LINEAR if targets is None else targets
        adapted = lora_tensors(model, lora_rank, targets=words, name=name)
    language = _Role(model, adapted, method=method, dtype=dtype, has_scalar_head=False)
    scored = _Role(model, adapted, method=method, dtype=dtype, has_scalar_head=True)
    if stage == "rm" and scored.adapter != language.adapter:
        raise UserError(
            "the output head is a target, but stage rm has one scalar row in its place, "
            "which is always trained: leave the output head out."
        )
    trained = scored if stage == "rm" else language
    weights, gradients, optimizer = trained.trained_bytes()
    has_reference = stage in ("dpo", "ppo") and method == "full"
    active = trained.active()
    return Budget(
        name=name,
        method=method,
        stage=stage,
        dtype=dtype,
        total=trained.base + trained.adapter,
        active=active,
        active_without_input_embedding=active - _lookup_only(model),
        trainable=trained.trainable,
        kv_bytes_per_token=KV_BYTES * _kv_numbers(model.config),
        flops_per_token=trained.flops(),
        memory=Memory(
            weights=weights,
            gradients=gradients,
            optimizer=optimizer,
            activations=batch_size * sequence_length * trained.activation_bytes(),
            reference=language.frozen_bytes() if has_reference else 0,
            value=sum(scored.trained_bytes()) if stage == "ppo" else 0,
            reward=scored.frozen_bytes() if stage == "ppo" else 0,
        ),
        adapted=adapted,
    )


class _Role:
    """One model of a stage: a language model, or the same with a scalar head (reward, value)."""

    def __init__(
        self,
        model: PreTrainedModel,
        adapted: Sequence[Adapted],
        *,
        method: str,
        dtype: str,
        has_scalar_head: bool,
    ) -> None:
        self.weights = _weights(model, has_scalar_head=has_scalar_head)
        self.method = method
        self.bytes_each = TRAINED_BYTES[dtype]
        self.num_logits = 0 if has_scalar_head else model.get_output_embeddings().weight.shape[0]
        head = _output_head_name(model) if has_scalar_head else None
        self.adapter = sum(tensor.size for tensor in adapted if tensor.name != head)
        self.base = sum(weight.size for weight in self.weights)
        scalar_head = sum(weight.size for weight in self.weights if weight.is_scalar_head)
        self.trainable = self.base if method == "full" else self.adapter + scalar_head

    def active(self) -> int:
        return int(sum(weight.share * weight.size for weight in self.weights))

    def flops(self) -> int:
        return int(2 * sum(weight.share * weight.size for weight in self.weights if weight.matmul))

    def activation_bytes(self) -> int:
        """Estimate for one token: see the head of this file."""
        numbers = sum(weight.share * weight.features for weight in self.weights)
        return math.ceil(self.bytes_each[0] * numbers) + 4 * self.num_logits

    def frozen_bytes(self, *, with_scalar_head: bool = True) -> int:
        def width(weight: Weight) -> Fraction:
            quantized = self.method == "qlora" and weight.is_linear
            return NF4_BITS / 8 if quantized else Fraction(self.bytes_each[0])

        kept = [w for w in self.weights if with_scalar_head or not w.is_scalar_head]
        return math.ceil(sum(width(weight) * weight.size for weight in kept))

    def trained_bytes(self) -> tuple[int, int, int]:
        """Weights, gradients, optimizer."""
        if self.method == "full":
            weights, gradients, optimizer = (each * self.base for each in self.bytes_each)
            return weights, gradients, optimizer
        weights, gradients, optimizer = (each * self.trainable for each in ADAPTER_BYTES)
        return self.frozen_bytes(with_scalar_head=False) + weights, gradients, optimizer


def lora_tensors(
    model: PreTrainedModel, rank: int, *, targets: str | Sequence[str], name: str = "this model"
) -> tuple[Adapted, ...]:
    """What LoRA of this rank adapts, one entry a tensor, as PEFT 0.21 would with `target_modules`.

    A matrix (out, in) gets rank * (in + out) numbers (Hu et al. 2021, section 4.1), each of E
    experts as much; two words that were fused into one tensor (w1 and w3) double its rank. A word
    that names a fused tensor itself (experts.down_proj) is what PEFT calls `target_parameters`.
    Names match whole or from a dot on.

    Raises UserError for a word that matches nothing, where PEFT goes on with the others.
    """
    shapes = _adaptable(model)
    words, family = _target_words(model, targets, shapes)
    found: dict[str, Adapted] = {}
    fused: dict[str, set[str]] = {}
    for word in words:
        old = next((old for old in family if _ends_with(word, old)), None)
        if old is not None:
            fused.setdefault(family[old], set()).add(old)
            continue
        modules = {
            known: shape for known, shape in shapes.modules.items() if _ends_with(known, word)
        }
        for match, shape in modules.items():
            found[match] = Adapted(name=match, size=rank * sum(shape))
        if not modules and not _adapt_tensors(found, shapes, word, rank=rank):
            raise UserError(f"target {word!r} matches nothing in {name}: {shapes.offer(family)}.")
    for tensor, olds in fused.items():
        together = [old for old in family if family[old] == tensor]
        if olds != set(together):
            raise UserError(
                f"target {', '.join(sorted(olds))} alone cannot be adapted: {name} keeps "
                f"{' and '.join(together)} fused in {tensor}; give them together."
            )
        adapted = _adapt_tensors(found, shapes, tensor, rank=rank * len(together))
        if not adapted and targets != ALL_LINEAR:
            words_given = ", ".join(together)
            raise UserError(
                f"target {words_given!r} matches nothing in {name}: {shapes.offer({})}."
            )
    if not found:
        raise UserError(f"targets {targets!r} match nothing in {name}: {shapes.offer(family)}.")
    return tuple(found[key] for key in sorted(found))


@dataclass(frozen=True, kw_only=True)
class _Shapes:
    """What LoRA can adapt: modules (Linear, Embedding), and bare expert or router tensors."""

    modules: dict[str, tuple[int, ...]]
    linear: tuple[str, ...]  # of the modules, those of all-linear
    tensors: dict[str, tuple[int, ...]]

    def offer(self, family: Mapping[str, str]) -> str:
        """What a user may write instead."""
        leaves = sorted({known.rpartition(".")[2] for known in self.modules} - set(family))
        tensors = {".".join(known.split(".")[-2:]) for known in self.tensors}
        return f"it has {', '.join([*leaves, *sorted(family), *sorted(tensors)])}"


def _adaptable(model: PreTrainedModel) -> _Shapes:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    modules: dict[str, tuple[int, ...]] = {}
    linear = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            modules[name] = tuple(module.weight.shape)
            if module is not head and not isinstance(module, nn.Embedding):
                linear.append(name)
    tensors = {
        name: tuple(weight.shape)
        for name, weight in model.named_parameters()
        if weight.dim() in (2, 3)
        and name.rpartition(".")[0] not in modules
        and not name.endswith("bias")
    }
    return _Shapes(modules=modules, linear=tuple(linear), tensors=tensors)


def _target_words(
    model: PreTrainedModel, targets: str | Sequence[str], shapes: _Shapes
) -> tuple[list[str], dict[str, str]]:
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    kind = model.config.model_type
    layout = "mixtral" if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    family = FUSED_WORDS.get(layout, {})
    if targets == ALL_LINEAR:
        if not family:
            return list(shapes.linear), family
        leaves = {name.rpartition(".")[2] for name in shapes.linear}
        return sorted(leaves | set(family)), family
    words = targets.split(",") if isinstance(targets, str) else list(targets)
    return [word.strip() for word in words], family


def _adapt_tensors(found: dict[str, Adapted], shapes: _Shapes, word: str, *, rank: int) -> bool:
    """Adds the bare tensors that `word` names to `found`; says whether there were any."""
    matches = [known for known in shapes.tensors if _ends_with(known, word)]
    for match in matches:
        *experts, rows, columns = shapes.tensors[match]
        found[match] = Adapted(name=match, size=rank * math.prod(experts) * (rows + columns))
    return bool(matches)


def _ends_with(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _weights(model: PreTrainedModel, *, has_scalar_head: bool) -> tuple[Weight, ...]:
    """Every tensor of the model, its output head replaced by one row if `has_scalar_head`."""
    from torch import nn

    head = model.get_output_embeddings().weight
    weights = []
    for name, tensor in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        is_table = isinstance(owner, nn.Embedding)
        if tensor is head and has_scalar_head and not is_table:
            continue
        is_head = tensor is head and not has_scalar_head
        matmul = tensor.dim() >= 2 and not name.endswith("bias") and (is_head or not is_table)
        is_routed = "experts" in name.split(".")
        weights.append(
            Weight(
                name=name,
                size=tensor.numel(),
                share=_routed_share(model.config) if is_routed else Fraction(1),
                features=matmul * math.prod(tensor.shape[:-2]) * sum(tensor.shape[-2:]),
                matmul=matmul,
                is_linear=isinstance(owner, nn.Linear) and matmul and not is_head,
            )
        )
    if has_scalar_head:
        width = head.shape[1]
        row = {"name": "score.weight", "size": width, "features": width + 1, "matmul": True}
        one = Fraction(1)
        weights.append(Weight(**row, share=one, is_linear=False, is_scalar_head=True))
    return tuple(weights)


def _routed_share(config: Any) -> Fraction:
    """k / E, the share of the routed experts that one token reads."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if config.model_type == "switch_transformers":
        chosen = 1  # Fedus et al. 2021: the router of this class takes the first choice only
    for word in ("num_experts", "num_local_experts", "n_routed_experts"):
        experts = getattr(config, word, None)
        if experts and chosen:
            return Fraction(chosen, experts)
    raise UserError(
        f"a {config.model_type} model has experts, but its config lacks num_experts_per_tok or a "
        "number of experts (num_experts, num_local_experts, n_routed_experts): add them."
    )


def _lookup_only(model: PreTrainedModel) -> int:
    """Size of the input embedding, 0 where it is the output head as well."""
    table = model.get_input_embeddings().weight
    return 0 if model.get_output_embeddings().weight is table else table.numel()


def _output_head_name(model: PreTrainedModel) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def _kv_numbers(config: Any) -> int:
    """Numbers that one token leaves in the cache of all (decoder) layers together."""
    kinds = getattr(config, "layer_types", None) or ()
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"})
    if strange:
        raise UserError(
            f"a {config.model_type} model has layers of type {', '.join(strange)}, "
            "whose cache is not keys and values per token: it cannot be counted here."
        )
    try:
        layers = config.num_hidden_layers
        if config.is_encoder_decoder:
            layers = getattr(config, "num_decoder_layers", None) or config.decoder_layers
        if getattr(config, "kv_lora_rank", None):
            return layers * (config.kv_lora_rank + config.qk_rope_head_dim)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        return 2 * layers * heads * (width or config.hidden_size // config.num_attention_heads)
    except AttributeError as problem:
        raise UserError(
            f"the cache of a {config.model_type} model cannot be counted: {_first_line(problem)}."
        ) from problem


def _check_options(
    method: str,
    *,
    lora_rank: int,
    targets: str | Sequence[str] | None,
    dtype: str,
    stage: str,
) -> None:
    for word, value, allowed in (
        ("method", method, METHODS),
        ("dtype", dtype, tuple(TRAINED_BYTES)),
        ("stage", stage, STAGES),
    ):
        if value not in allowed:
            raise UserError(f"{word} {value!r} is unknown: choose one of {', '.join(allowed)}.")
    if method == "full" and (lora_rank or targets is not None):
        given = f"lora_rank {lora_rank}" if lora_rank else f"targets {targets!r}"
        raise UserError(f"{given} has no effect with method full: use method lora or drop it.")
    if method != "full" and lora_rank < 1:
        raise UserError(f"method {method} needs a lora_rank of at least 1, not {lora_rank}.")
    if method != "full" and dtype == "mixed":
        raise UserError(
            f"dtype mixed keeps a float32 master of every weight, but {method} freezes the base: "
            "choose bfloat16, whose adapter is float32 already."
        )


def _check_tokens(batch_size: int, *, sequence_length: int) -> None:
    if min(batch_size, sequence_length) < 0 or bool(batch_size) != bool(sequence_length):
        raise UserError(
            f"batch_size {batch_size} and sequence_length {sequence_length} set the activations "
            "together: give both, at least 1 each, or neither."
        )


def _fields_of(name: str | Path) -> dict[str, Any]:
    """Config fields of a known name or of a directory's config.json."""
    if not Path(name).is_dir() or str(name).lower() in known_names():
        return known_config(str(name))
    path = Path(name) / "config.json"
    if not path.is_file():
        adapter = (Path(name) / "adapter_config.json").is_file()
        hint = " (it holds an adapter: give its base model)" if adapter else ""
        raise UserError(f"{name} has no config.json{hint}: give a model's directory.")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{path} is not JSON: {_first_line(problem)}.") from problem
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}: it must be a JSON object.")
    return fields


def _config_of(fields: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    kind = fields.get("model_type")
    if kind == "switchyard":
        import_module("moe.heads")  # registers our classes
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"model_type {kind!r} is no class of transformers: "
            "give a config whose model_type it knows (remote code is never run)."
        )
    try:
        return CONFIG_MAPPING[kind].from_dict(dict(fields))
    except UserError:
        raise
    except Exception as problem:  # each config class refuses bad values in its own way
        raise UserError(
            f"transformers refuses this {kind} config: {_first_line(problem)}"
        ) from problem


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _name(name_or_config: Any) -> str:
    if isinstance(name_or_config, str | Path):
        name = str(name_or_config)
        return name.lower() if name.lower() in known_names() else name
    if isinstance(name_or_config, Mapping):
        return str(name_or_config.get("model_type"))
    return getattr(name_or_config, "_name_or_path", "") or name_or_config.model_type


def _table(result: Budget) -> Any:
    from rich.table import Table

    title = f"{result.name}: {result.method}, stage {result.stage}, {result.dtype}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("in short", justify="right")

    def billions(count: int) -> str:
        return f"{count / 1e9:.3f} B" if count >= 1e7 else f"{count / 1e6:.3f} M"

    def gigabytes(count: int) -> str:
        return f"{count / 1e9:.3f} GB"

    table.add_row("total parameters", f"{result.total:,}", billions(result.total))
    table.add_row("active", f"{result.active:,}", billions(result.active))
    lookup_free = result.active_without_input_embedding
    table.add_row("  without input embedding", f"{lookup_free:,}", billions(lookup_free))
    table.add_row("trainable", f"{result.trainable:,}", f"{result.percent:.4f} %")
    flops = result.flops_per_token
    table.add_row("forward FLOPs per token", f"{flops:,}", f"{flops / 1e9:.3f} G")
    cache = result.kv_bytes_per_token
    table.add_row("KV cache bytes per token", f"{cache:,}", f"{cache / 1024:.1f} KiB")
    table.add_section()
    for part, count in asdict(result.memory).items():
        if count or part in ("weights", "gradients", "optimizer"):
            table.add_row(f"{part} bytes", f"{count:,}", gigabytes(count))
    table.add_row("memory together", f"{result.memory.total:,}", gigabytes(result.memory.total))
    if result.adapted:
        table.add_section()
        patterns = Counter(re.sub(r"\b\d+\b", "*", tensor.name) for tensor in result.adapted)
        for pattern, count in patterns.items():
            table.add_row(pattern, f"{count:,}", "adapted")
    if not result.memory.activations:
        table.caption = "without activations: give --batch-size and --sequence-length"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moe.budget",
        description="Parameters, FLOPs, KV cache and memory of a model, without its weights.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help=f"{', '.join(known_names())}, or a directory with config.json",
    )
    parser.add_argument("--method", choices=METHODS, default="full")
    parser.add_argument("--lora-rank", "--lora-r", type=int, default=0, metavar="R")
    parser.add_argument(
        "--targets", metavar="A,B", help="all-linear (default with LoRA) or module names"
    )
    parser.add_argument("--dtype", choices=tuple(TRAINED_BYTES), help="default float32")
    parser.add_argument(
        "--stage", choices=STAGES, default="sft", help="which models are held at once"
    )
    parser.add_argument("--batch-size", type=int, default=0, metavar="B")
    parser.add_argument("--sequence-length", type=int, default=0, metavar="S")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = sys.argv[1:] if argv is None else argv
    # "-" and "_" are equal in the names of flags, not in their values.
    words = [_dashed(word) if word.startswith("--") else word for word in words]
    flags = vars(_parser().parse_args(words))
    as_json = flags.pop("json")
    try:
        result = budget(flags.pop("name"), **flags)
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
        return 0
    from rich.console import Console

    Console().print(_table(result))
    return 0


def _dashed(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


if __name__ == "__main__":
    raise SystemExit(main())
