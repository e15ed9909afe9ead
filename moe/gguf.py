"""GGUF files, read by transformers (extra `gguf`), opened as our model.

The decision to know: transformers dequantizes the tensors, but goes on where it knows only half of
a file - the frequencies of a stretched rotary embedding, Mixtral's experts under the name of Llama.
What it would lose is refused here before it reads, and what it did not fill afterwards.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from moe.errors import UserError
from moe.layouts import LAYOUTS, first_line, our_config
from moe.model import MoEForCausalLM, assembled

SUFFIX = ".gguf"


def find_gguf(path: Path) -> Path | None:
    """The GGUF file meant by a path: the file itself, or the only one of a folder without config.

    Raises UserError for a folder with several.
    """
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UserError(f"{path} holds several GGUF files ({names}): give one of them.")
    return found[0] if found else None


def load_gguf(file: Path, *, dtype: torch.dtype | None) -> MoEForCausalLM:
    """The model in a GGUF file, its quantized weights unpacked; dtype None is float32."""
    if find_spec("gguf") is None:
        raise UserError(
            f"{file} is a GGUF file, and the package that reads it is not installed: "
            "pip install 'switchyard[gguf]'."
        )
    _refuse_what_would_be_lost(file)
    try:
        theirs, report = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            dtype=dtype or torch.float32,
            output_loading_info=True,
            local_files_only=True,
        )
    except Exception as problem:  # the reader fails in many ways on what it does not know
        raise UserError(f"{file} cannot be read: {first_line(problem)}") from problem
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            raise UserError(
                f"{file} does not fill {sorted(map(str, report[kind]))[0]} of the model that it "
                f"describes: it is not whole, or its architecture is another one."
            )
    family = theirs.config.model_type
    if family not in LAYOUTS:
        raise UserError(f"{file} is a model of type {family!r}: load opens {', '.join(LAYOUTS)}.")
    config = our_config(theirs.config, LAYOUTS[family])
    config.name_or_path = str(file)
    tensors = {name: tensor.detach() for name, tensor in theirs.named_parameters()}
    return assembled(config, tensors)


def _refuse_what_would_be_lost(file: Path) -> None:
    from gguf import GGUFReader

    try:
        reader: Any = GGUFReader(file)
    except Exception as problem:  # a broken file fails wherever its bytes make no sense
        raise UserError(f"{file} is no whole GGUF file: {first_line(problem)}") from problem
    fields = {name: field.contents() for name, field in reader.fields.items()}
    family = fields.get("general.architecture")
    if family == "llama" and fields.get("llama.expert_count"):
        raise UserError(
            f"{file} holds {fields['llama.expert_count']} experts under the architecture 'llama': "
            "transformers cannot read them; use the safetensors of this model."
        )
    window = fields.get(f"{family}.attention.sliding_window")
    if window:
        raise UserError(
            f"{file} has a sliding window of {window}, which is lost in reading: use the "
            "safetensors of this model."
        )
    scaling = fields.get(f"{family}.rope.scaling.type", "none")
    tables = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    if scaling != "none" or tables:
        raise UserError(
            f"{file} stretches its rotary embedding ({tables[0] if tables else scaling}), which is "
            "lost in reading: use the safetensors of this model."
        )
