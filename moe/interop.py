"""Open other families' models as ours, and write ours in their layouts.

    model = load("Mixtral-8x7B-v0.1")          # Mixtral, Mistral, Llama, Qwen2, OLMoE, Qwen2-MoE,
    save(model, "copy", layout="mixtral")      # Qwen3-MoE: in and out
    sparse = upcycle(load("Llama-3.2-1B"), num_experts=8, top_k=2)

The decision to know: all or nothing. Every option of a configuration is built or refused by name,
every tensor of a folder is used and every tensor of the model filled, or nothing is returned.
Tokenizers are not touched: they lie in the same folder and every library reads them from there.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, GenerationConfig

import moe.heads  # noqa: F401  registers our classes
from moe.config import MoEConfig
from moe.errors import UserError
from moe.gguf import find_gguf, load_gguf
from moe.layouts import LAYOUTS, OWN, Layout, Piece, first_line, our_config, pieces, their_config
from moe.model import MoEForCausalLM, assembled, meta_causal_lm, stored_tensors
from moe.switch_ffn import SELECTION_BIAS
from moe.tensor_files import INDEX, TensorFiles, inside, read_json
from moe.upcycle import upcycle, write_receipt

__all__ = ["load", "save", "upcycle", "write_receipt"]

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
GENERATION = "generation_config.json"


def load(directory: str | Path, *, dtype: torch.dtype | None = torch.float32) -> MoEForCausalLM:
    """The language model in a folder, as our class, on the CPU, in eval mode.

    The folder holds config.json and safetensors of one of the families of `moe.layouts.LAYOUTS` or
    of our own; or give a .gguf file (needs the extra `gguf`).
    dtype: of the weights, whatever the files hold; float32 by default, because that is what
    equality with the family's own class is promised in. None keeps the files' own.

    Equality is at real tokens: our experts skip padding, so what comes out there differs, and with
    it a loss that asks padding for the token after it (in a row that is padded on the left, label
    the first token -100). The loss has a balance term where config.json says output_router_logits,
    as in Hugging Face's classes, but ours: one value per layer, in training only. Rotary
    frequencies, which old checkpoints store, are computed, not read.
    Raises UserError, in one sentence, for an option that we cannot build and for files that are
    not exactly the model that config.json describes.
    """
    folder = Path(directory)
    packed = find_gguf(folder)
    if packed is not None:
        return load_gguf(packed, dtype=dtype)
    if not folder.is_dir():
        raise UserError(f"No model folder {directory} (looked from {Path.cwd()}).")
    layout, config = _read_config(folder)
    config.name_or_path = str(directory)
    files = TensorFiles(folder)
    plans = _checked_plans(files, layout, config)
    kept = dtype or files.common_dtype()
    tensors = {
        # Exact whatever the weights are in: its steps would be lost in bfloat16.
        name: _read(files, plan, torch.float32 if name.endswith(SELECTION_BIAS) else kept)
        for name, plan in plans.items()
    }
    model = assembled(config, tensors)
    if config.tie_word_embeddings and HEAD in files.stored:
        _check_tied_head(files, model, kept)
    if inside(folder, GENERATION).is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder, GENERATION))
    return model


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    layout: str = "mixtral",
    max_shard_size: str = "5GB",
) -> Path:
    """Write the model as a family publishes its own, so that its class opens it with equal logits.

    directory: new or empty. layout: a name of `moe.layouts.LAYOUTS`. max_shard_size: files above
    it are split, with an index.
    Raises UserError naming what of this model the layout cannot express; then nothing is written.
    """
    if not isinstance(model, MoEForCausalLM):
        raise UserError(
            f"save takes a MoEForCausalLM, not a {type(model).__name__}: merge an adapter first, "
            "and save other heads with save_pretrained."
        )
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is unknown: give one of {', '.join(LAYOUTS)}.")
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{directory} is there already: give a new folder or an empty one.")
    family = LAYOUTS[layout]
    config = their_config(model.config, family)
    config.dtype = model.dtype
    published = _published(model, family)
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config.save_pretrained(temporary)
    # Not save_pretrained: it refuses published settings such as a temperature without sampling.
    model.generation_config.to_json_file(temporary / GENERATION)
    _write_shards(published, temporary, max_shard_size=max_shard_size)
    if target.is_dir():
        target.rmdir()
    temporary.rename(target)
    return target


# --- in ------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> tuple[Layout | None, MoEConfig]:
    """The family (None: our own) and our configuration of it."""
    fields = read_json(folder, "config.json")
    kind = fields.get("model_type")
    heads = fields.get("architectures") or []
    if heads and not all(str(head).endswith("ForCausalLM") for head in heads):
        raise UserError(
            f"{folder} holds a {heads[0]}: load opens language models (...ForCausalLM)."
        )
    if kind != OWN and kind not in LAYOUTS:
        raise UserError(
            f"{folder} is a model of type {kind!r}: load opens {', '.join([*LAYOUTS, OWN])}."
        )
    if fields.get("quantization_config"):
        raise UserError(
            f"quantization_config in {folder / 'config.json'}: quantized weights are not opened; "
            "take the model as it was before."
        )
    try:
        theirs = CONFIG_MAPPING[kind].from_dict(fields)
        if kind == OWN:
            return None, theirs
        return LAYOUTS[kind], our_config(theirs, LAYOUTS[kind])
    except UserError as problem:
        raise UserError(f"{folder / 'config.json'}: {problem}") from problem
    except Exception as problem:  # each config class refuses bad values in its own way
        raise UserError(
            f"{folder / 'config.json'} is no {kind} configuration: {first_line(problem)}"
        ) from problem


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One of our tensors: its shape, and the stored tensors it is put together from."""

    shape: torch.Size
    parts: list[Piece]


def _checked_plans(
    files: TensorFiles, layout: Layout | None, config: MoEConfig
) -> dict[str, _Plan]:
    """How to fill each of our tensors, once every header agrees with the model."""
    plans: dict[str, _Plan] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in stored_tensors(meta_causal_lm(config)).items():
        # transformers can also write its tensors as it holds them, experts stacked: as we do.
        if layout is None or name in files.stored:
            parts = [Piece(name=name)]
        else:
            parts = pieces(name, tensor.shape, layout=layout)
        plans[name] = _Plan(shape=tensor.shape, parts=parts)
        shapes |= {piece.name: tuple(tensor[piece.place].shape) for piece in parts}
    _check_names(files, shapes, tied=config.tie_word_embeddings)
    for name, shape in shapes.items():
        stored = files.stored[name]
        if stored.shape != shape:
            turned = " (it lies transposed)" if stored.shape == shape[::-1] else ""
            raise UserError(
                f"{name} in {files.directory / stored.file} has the shape {stored.shape}, but "
                f"config.json makes it {shape}{turned}."
            )
    return plans


def _check_names(files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    missing = [name for name in shapes if name not in files.stored]
    if missing:
        raise UserError(
            f"{files.directory} lacks {len(missing)} tensors of the model in its config.json, "
            f"first {missing[0]}: it is not whole, or not this model."
        )
    known = {HEAD} if tied else set()
    extra = [
        name
        for name in files.stored
        if name not in shapes and name not in known and not name.endswith("rotary_emb.inv_freq")
    ]
    if extra:
        raise UserError(
            f"{files.directory} has {len(extra)} tensors that the model in its config.json does "
            f"not have, first {extra[0]}: they would be lost, so it is not opened."
        )


def _read(files: TensorFiles, plan: _Plan, dtype: torch.dtype) -> Tensor:
    whole = torch.empty(plan.shape, dtype=dtype)
    for piece in plan.parts:
        whole[piece.place] = files.read(piece.name).to(dtype)
    return whole


def _check_tied_head(files: TensorFiles, model: MoEForCausalLM, dtype: torch.dtype) -> None:
    if not torch.equal(files.read(HEAD).to(dtype), model.lm_head.weight):
        raise UserError(
            f"{files.directory} stores {HEAD} with other values than {TABLE}, but "
            "tie_word_embeddings is true in its config.json: set it to false, or take the head out."
        )


# --- out -----------------------------------------------------------------------------------------


def _published(model: MoEForCausalLM, layout: Layout) -> dict[str, Tensor]:
    """Our tensors, cut into the family's."""
    published: dict[str, Tensor] = {}
    for name, tensor in model.named_parameters():
        if ".lora_" in name or ".base_layer." in name:
            raise UserError(f"the model carries an adapter ({name}): merge it before saving.")
        for piece in pieces(name, tensor.shape, layout=layout):
            part = tensor.detach()[piece.place]
            published[piece.name] = part.to("cpu", copy=True).contiguous()
    return published


def _write_shards(tensors: dict[str, Tensor], folder: Path, *, max_shard_size: str) -> None:
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in shards.filename_to_tensors.items():
        part = {name: tensors[name] for name in names}
        save_file(part, folder / file, metadata={"format": "pt"})
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
