"""GGUF files through transformers' reader; without the package, a sentence."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from moe.errors import UserError
from moe.interop import load

HAS_GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="the extra gguf is not installed")
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gguf_name(name: str) -> str:
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write_gguf(model: PreTrainedModel, file: Path, *, skip: str = "", **extra: Any) -> Path:
    """A Llama as llama.cpp stores it: query and key rows of a head pairwise interleaved."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(str(file), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for key, value in extra.items():
        getattr(writer, key)(value)
    for name, tensor in model.state_dict().items():
        if skip and skip in name:
            continue
        rows = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            rows = rearrange(rows, "(h two n) d -> (h n two) d", two=2, n=config.head_dim // 2)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@needs_gguf
def test_a_gguf_file_and_its_folder_give_the_models_logits(tmp_path: Path) -> None:
    theirs = llama()
    file = write_gguf(theirs, tmp_path / "tiny.gguf")
    ids = torch.arange(1, 21).view(2, 10)
    for path in (file, tmp_path):
        ours = load(path)
        assert not ours.training
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


@needs_gguf
def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    file = write_gguf(llama(), tmp_path / "tiny.gguf", skip="layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"does not fill model.layers.1.mlp.up_proj.weight"):
        load(file)


@needs_gguf
@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"add_expert_count": 8}, "8 experts under the architecture 'llama'"),
        ({"add_sliding_window": 16}, "sliding window of 16"),
    ],
)
def test_what_the_reader_would_lose_is_refused(
    extra: dict[str, Any], told: str, tmp_path: Path
) -> None:
    file = write_gguf(llama(), tmp_path / "tiny.gguf", **extra)
    with pytest.raises(UserError, match=told):
        load(file)


@needs_gguf
def test_a_stretched_rotary_embedding_is_refused(tmp_path: Path) -> None:
    from gguf import RopeScalingType

    extra = {"add_rope_scaling_type": RopeScalingType.LINEAR, "add_rope_scaling_factor": 2.0}
    file = write_gguf(llama(), tmp_path / "tiny.gguf", **extra)
    with pytest.raises(UserError, match=r"stretches its rotary embedding \(linear\)"):
        load(file)


@needs_gguf
def test_a_broken_gguf_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(UserError, match=r"is no whole GGUF file"):
        load(tmp_path)


@pytest.mark.skipif(HAS_GGUF, reason="the extra gguf is installed")
def test_without_the_package_the_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"pip install 'switchyard\[gguf\]'"):
        load(tmp_path)


def test_of_several_gguf_files_one_must_be_named(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"a.gguf, b.gguf.*give one of them"):
        load(tmp_path)
