"""From a folder to a model and its tokenizer, and back.

The decision to know: a folder is taken for what lies in it (a model, a PEFT adapter, a run of
`sft.train` or `rlhf.train` with either), and a model counts as loaded only if its weights named
every parameter. Nothing is ever fetched.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import moe.heads  # registers our classes with the Auto classes
from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from sft.adapt import (
    ADAPTER_CONFIG,
    LORA_PARTS,
    LoraSpec,
    adapter_base,
    add_lora,
    base_of,
    is_adapted,
    load_adapter,
    save_adapter,
    trainable_by_part,
)
from sft.text import TOKENIZER_FILES, TextPath, load_tokenizer

__all__ = ["ModelFolder", "NEW", "find_model", "load_causal_lm", "moe", "save_policy"]

NEW = "new"
MODEL, ADAPTER = "model", "adapter"  # where a run keeps what it trained
SFT_ADAPTER, POLICY_ADAPTER = "sft", "policy"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Where a model lies: its base, the adapter on it (or None), its tokenizer, its template.

    named: the folder as the user gave it. template: what its run was trained with, None if unknown.
    """

    named: str
    base: Path
    adapter: Path | None
    tokenizer: Path
    template: str | None

    @property
    def files(self) -> list[Path]:
        """Configuration and weights, in a fixed order."""
        folders = [self.base] if self.adapter is None else [self.base, self.adapter]
        return [
            path
            for folder in folders
            for path in sorted(folder.iterdir())
            if path.suffix == ".safetensors" or path.name in ("config.json", ADAPTER_CONFIG)
        ]


def find_model(directory: str | Path) -> ModelFolder:
    """What a folder holds: a model, an adapter, or a run with one of them.

    Raises UserError, in one sentence, for a folder that is absent or holds none of these.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise _no_folder(str(directory))
    template = _template_of(folder) or _template_of(folder.parent)
    for adapter in (folder, folder / ADAPTER):
        if (adapter / ADAPTER_CONFIG).is_file():
            base = Path(adapter_base(adapter))
            if not (base / "config.json").is_file():
                raise UserError(
                    f"{directory} is an adapter on {base}, which is no model folder (looked from "
                    f"{Path.cwd()}): put the base back there."
                )
            return ModelFolder(
                named=str(directory),
                base=base,
                adapter=adapter,
                tokenizer=adapter if _has_tokenizer(adapter) else base,
                template=template,
            )
    for base in (folder, folder / MODEL):
        if (base / "config.json").is_file():
            return ModelFolder(
                named=str(directory), base=base, adapter=None, tokenizer=base, template=template
            )
    if (folder / "status.json").is_file():
        raise UserError(f"The run {directory} has no final model yet: go on with it by --resume.")
    raise UserError(
        f"{directory} holds no model: it needs config.json with weights, an adapter, or a run of "
        "sft.train or rlhf.train."
    )


def _no_folder(name: str) -> UserError:
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return UserError(
            f"{name!r} is not a folder here, and names on a hub are not fetched: give a local "
            f"folder, or --model {NEW}."
        )
    return UserError(f"No model folder {name} (looked from {Path.cwd()}).")


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _template_of(run: Path) -> str | None:
    """The template that a run of ours was trained with."""
    path = run / "config.yaml"
    if not (path.is_file() and (run / "status.json").is_file()):
        return None
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    template = stored.get("template") if isinstance(stored, dict) else None
    return template if isinstance(template, str) else None


def load_causal_lm(found: ModelFolder, *, adapter: str = SFT_ADAPTER) -> nn.Module:
    """The language model in float32, with its adapter (under that name, frozen) if it has one."""
    model = _load(found.base, AutoModelForCausalLM)
    return model if found.adapter is None else load_adapter(model, found.adapter, name=adapter)


def load_scalar_model(directory: str | Path) -> PreTrainedModel:
    """A reward model that `rlhf.train --method rm` saved, one scalar per token, float32."""
    found = find_model(directory)
    document = json.loads((found.base / "config.json").read_text(encoding="utf-8"))
    kinds = document.get("architectures") or [""]
    if found.adapter is not None or not kinds[0].endswith(("ForTokenClassification", "ForValue")):
        raise UserError(
            f"{directory} is no reward model (it is a {kinds[0] or 'model without a class'}): give "
            "a run of rlhf.train --method rm."
        )
    return _load(found.base, AutoModelForTokenClassification)


def _load(folder: Path, auto_class: Any) -> PreTrainedModel:
    """Strict: every parameter has to come from the files."""
    try:
        model, report = auto_class.from_pretrained(
            str(folder),
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"The model in {folder} does not load: {first}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(map(str, report.get(kind) or ()))
        if names:
            raise UserError(
                f"The weights in {folder} do not fit its config.json: {len(names)} "
                f"{kind.replace('_', ' ')}, first {names[0]}."
            )
    loaded: PreTrainedModel = model
    return loaded


def new_model(
    text_path: TextPath,
    *,
    hidden_size: int,
    num_layers: int,
    num_experts: int,
    top_k: int,
    seed: int,
) -> MoEForCausalLM:
    """A small Switchyard MoE with the tokenizer's vocabulary, 4 query heads on 2 KV heads."""
    config = MoEConfig(
        vocab_size=len(text_path.tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        moe_intermediate_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        # The softmax over a single chosen expert is 1 whatever the router says: no gradient.
        norm_topk_prob=top_k > 1,
        max_position_embeddings=max(512, text_path.max_length),
    )
    torch.manual_seed(seed)
    return MoEForCausalLM(config)


def check_fit(model: nn.Module, text_path: TextPath, *, named: str) -> None:
    """Raises UserError when ids or positions would fall outside the model's tables."""
    config: Any = base_of(model).config
    if len(text_path.tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer has {len(text_path.tokenizer)} pieces, the model {named} embeds "
            f"{config.vocab_size}: they do not belong together; give --tokenizer."
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and text_path.max_length > positions:
        raise UserError(
            f"--max-length {text_path.max_length} is over the {positions} positions of {named}: "
            f"give {positions} or less."
        )


def make_consistent(model: nn.Module, text_path: TextPath) -> None:
    """Tell model and generation configuration the ids that we train with.

    Other tools then pad and stop as we do; our own code never reads them, masks are explicit.
    """
    base: Any = base_of(model)
    base.config.pad_token_id = text_path.pad_id
    base.config.bos_token_id = text_path.bos_id
    base.config.eos_token_id = text_path.eos_id
    generation = getattr(base, "generation_config", None)
    if generation is not None:
        generation.pad_token_id = text_path.pad_id
        generation.bos_token_id = text_path.bos_id
        generation.eos_token_id = list(text_path.stop_ids)


def lora_spec(
    model: nn.Module, *, rank: int, alpha: float | None, targets: Iterable[str]
) -> LoraSpec:
    """The adapter that the flags ask for on this model; alpha defaults to twice the rank.

    targets: parts by name, `all` for every part that the model has, `auto` for all but the router.
    """
    named = tuple(targets)
    whole = {"all": LORA_PARTS, "auto": tuple(p for p in LORA_PARTS if p != "router")}
    if set(named) & set(whole):
        if len(named) > 1:
            raise UserError(f"--lora-targets {' '.join(named)}: 'auto' and 'all' stand alone.")
        present = trainable_by_part(model)
        named = tuple(part for part in whole[named[0]] if part in present)
    return LoraSpec(rank=rank, alpha=2.0 * rank if alpha is None else alpha, targets=named)


def adapted(model: nn.Module, spec: LoraSpec, *, seed: int) -> nn.Module:
    """The model under one fresh trainable adapter."""
    torch.manual_seed(seed)
    return add_lora(model, spec)


def save_policy(
    model: nn.Module,
    text_path: TextPath,
    folder: Path,
    *,
    base: Path | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write the final model of a run into `folder` and return where it is.

    A full model goes to `model/` by save_pretrained, an adapter to `adapter/` in PEFT's layout
    (`base` is its base's folder); the tokenizer lies beside either. state: the weights to write
    in place of the model's own, where those are sharded.
    """
    if is_adapted(model):
        assert base is not None
        target = folder / ADAPTER
        save_adapter(model, target, base=str(base), state=state)
    else:
        target = folder / MODEL
        make_consistent(model, text_path)
        plain: Any = model
        plain.save_pretrained(target, state_dict=None if state is None else dict(state))
    _saveable_tokenizer(text_path).save_pretrained(target)
    return target


def _saveable_tokenizer(text_path: TextPath) -> PreTrainedTokenizerFast:
    """The tokenizer, naming the PAD that we used where it is a special token anyway."""
    tokenizer = text_path.tokenizer
    if text_path.pad_id in tokenizer.all_special_ids:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(text_path.pad_id)
    return tokenizer


def tokenizer_of(found: ModelFolder, tokenizer: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that was asked for, or the model's own."""
    return load_tokenizer(found.tokenizer if tokenizer is None else tokenizer)


# Fingerprints: what has to be the same when a run is resumed.


def fingerprint_files(paths: Iterable[Path]) -> str:
    """16 hex digits over the contents of these files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """16 hex digits over vocabulary, merges, special tokens and chat template."""
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps(sorted(map(int, tokenizer.all_special_ids))),
        str(tokenizer.chat_template),
    ]
    return hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:16]


def describe_size(model: nn.Module) -> str:
    """`LlamaForCausalLM, 260,032 parameters`; with experts also how many one token uses."""
    base: Any = base_of(model)
    parts = {part: total for part, (_, total) in trainable_by_part(base).items()}
    adapters = sum(p.numel() for n, p in base.named_parameters() if ".lora_" in n)
    total = sum(parts.values()) - adapters
    text = f"{type(base).__name__}, {total:,} parameters"
    config = base.config
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if parts.get("experts") and experts:
        of_experts = sum(
            p.numel() for n, p in base.named_parameters() if ".experts." in n and ".lora_" not in n
        )
        idle = of_experts * (experts - config.num_experts_per_tok) // experts
        text += f" ({total - idle:,} active), {experts} experts top-{config.num_experts_per_tok}"
    return text
