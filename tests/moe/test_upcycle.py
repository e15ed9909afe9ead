"""Dense models made sparse: what keeps the function keeps it, and the receipt tells the rest.

Tolerance 1e-5 on logits of a few units: the weights of equal experts sum to 1 up to float32
rounding (measured: below 3e-6).
"""

import copy
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from moe import MoEConfig, MoEForCausalLM, MoEForReward
from moe.errors import UserError
from moe.interop import load, save, upcycle, write_receipt
from moe.record import record_routing
from moe.upcycle import receipt_of

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": 5}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "ours": (MoEConfig, {"mlp_layer_types": ["dense"] * 3, "window_pattern": None}),
}


def livelier(model: Any) -> Any:
    """Weights large enough that a difference would be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def dense(family: str, tmp_path: Path) -> MoEForCausalLM:
    kind, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = livelier(AutoModelForCausalLM.from_config(kind(**{**TINY, **fields})))
    model.save_pretrained(tmp_path / "dense")
    return load(tmp_path / "dense")


def own_dense(**changes: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    fields = {**TINY, "mlp_layer_types": ["dense"] * 3, **changes}
    return livelier(MoEForCausalLM(MoEConfig(**fields)))


def ids() -> Tensor:
    return torch.randint(61, (4, 15), generator=torch.Generator().manual_seed(1))


def difference(one: MoEForCausalLM, other: MoEForCausalLM) -> float:
    with torch.no_grad():
        return float((one(ids()).logits - other(ids()).logits).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("num_experts", "top_k", "options"),
    [
        (8, 2, {}),
        (5, 3, {}),
        (2, 2, {}),
        (8, 4, {"variant": "granular", "granularity": 2}),
        (12, 4, {"variant": "granular", "granularity": 4}),
        (10, 5, {"variant": "granular", "granularity": 5}),
    ],
    ids=str,
)
def test_copies_and_slices_keep_the_function_of_every_dense_family(
    family: str, num_experts: int, top_k: int, options: dict[str, Any], tmp_path: Path
) -> None:
    before = dense(family, tmp_path)
    after = upcycle(before, num_experts, top_k, **options)
    assert after.config.sparse_layers == (0, 1, 2) and not after.training
    assert (after.config.num_experts, after.config.num_experts_per_tok) == (num_experts, top_k)
    assert difference(before, after) <= 1e-5
    assert receipt_of(after).preserving


def test_the_default_is_eight_copies_of_which_two_are_used() -> None:
    after = upcycle(own_dense())
    assert (after.config.num_experts, after.config.num_experts_per_tok) == (8, 2)
    assert after.config.norm_topk_prob and after.config.moe_intermediate_size == 20


def test_the_dense_model_stays_as_it_is_and_shares_nothing() -> None:
    before = own_dense()
    kept = copy.deepcopy(before.state_dict())
    after = upcycle(before, 4, 2)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.zero_()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.state_dict().items())


def test_a_random_router_breaks_the_ties_between_copies() -> None:
    after = upcycle(own_dense(), 8, 2)
    with torch.no_grad(), record_routing(after) as trace:
        after(ids())
    for routing in trace.forwards[0].routings:
        assert len(routing.expert_TK.unique()) > 2


def test_slices_of_one_copy_are_chosen_together() -> None:
    after = upcycle(own_dense(), 8, 4, variant="granular", granularity=2)
    with torch.no_grad(), record_routing(after) as trace:
        after(ids())
    for routing in trace.forwards[0].routings:
        copies = (routing.expert_TK // 2).sort(dim=-1).values
        assert torch.equal(copies[:, ::2], copies[:, 1::2])
    assert after.config.moe_intermediate_size == 10


def test_every_expert_and_the_router_learn_from_the_first_step() -> None:
    after = upcycle(own_dense(), 4, 2).train()
    batch = ids()
    after(batch, labels=batch).loss.backward()
    for name, parameter in after.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_seed_decides_and_nothing_else() -> None:
    before = own_dense()
    torch.manual_seed(1)
    one = upcycle(before, 4, 2, variant="drop", seed=3).state_dict()
    torch.manual_seed(2)
    same = upcycle(before, 4, 2, variant="drop", seed=3).state_dict()
    other = upcycle(before, 4, 2, variant="drop", seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(one[gate], other[gate])
    assert not torch.equal(one[gate], one["model.layers.1.mlp.gate.weight"])


def test_noise_is_relative_to_the_spread_of_each_source() -> None:
    before = own_dense(intermediate_size=200)
    after = upcycle(before, 4, 2, variant="noise", noise=0.05)
    source = before.state_dict()["model.layers.1.mlp.down_proj.weight"]
    experts = after.state_dict()["model.layers.1.mlp.experts.down_proj"]
    added = experts - source
    assert float(added.std() / source.std()) == pytest.approx(0.05, rel=0.05)
    assert not torch.equal(added[0], added[1])
    assert 1e-4 < difference(before, after) < 1
    assert not receipt_of(after).preserving


def test_drop_draws_the_same_share_of_dimensions_anew_in_all_three_projections() -> None:
    before = own_dense(intermediate_size=200)
    after = upcycle(before, 4, 2, variant="drop", drop_ratio=0.3)
    state, source = after.state_dict(), before.state_dict()
    place = "model.layers.1.mlp"
    gate_up, down = state[f"{place}.experts.gate_up_proj"], state[f"{place}.experts.down_proj"]
    changed = []
    for e in range(4):
        gate, up = gate_up[e].chunk(2)
        moved = [
            (gate != source[f"{place}.gate_proj.weight"]).all(dim=1),
            (up != source[f"{place}.up_proj.weight"]).all(dim=1),
            (down[e] != source[f"{place}.down_proj.weight"]).all(dim=0),
        ]
        assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])
        assert int(moved[0].sum()) == 60
        changed.append(moved[0])
        drawn, old = gate[moved[0]], source[f"{place}.gate_proj.weight"][moved[0]]
        assert float(drawn.std() / old.std()) == pytest.approx(1, rel=0.1)
        assert float(drawn.mean() - old.mean()) == pytest.approx(0, abs=0.03)
    assert not torch.equal(changed[0], changed[1])
    assert difference(before, after) > 1e-3 and not receipt_of(after).preserving


def test_an_upcycled_llama_is_a_mixtral(tmp_path: Path) -> None:
    after = upcycle(dense("llama", tmp_path), 4, 2)
    save(after, tmp_path / "sparse", layout="mixtral")
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    with torch.no_grad():
        torch.testing.assert_close(reopened(ids()).logits, after(ids()).logits, atol=1e-5, rtol=0)


# --- the receipt ---------------------------------------------------------------------------------


def test_the_receipt_names_every_tensor_and_hashes_its_sources(tmp_path: Path) -> None:
    before = dense("qwen2", tmp_path)
    after = upcycle(before, 4, 4, variant="granular", seed=7)
    receipt = receipt_of(after)
    names = [origin.name for origin in receipt.tensors]
    assert sorted(names) == sorted(name for name, _ in after.named_parameters())
    assert (receipt.variant, receipt.granularity, receipt.seed) == ("granular", 2, 7)
    assert receipt.source == str(tmp_path / "dense")
    sources = before.state_dict()
    by_name = {origin.name: origin for origin in receipt.tensors}
    for origin in receipt.tensors:
        for name, digest in zip(origin.sources, origin.sha256, strict=True):
            assert digest == hashlib.sha256(sources[name].numpy().tobytes()).hexdigest()
    experts = by_name["model.layers.2.mlp.experts.gate_up_proj"]
    place = "model.layers.2.mlp"
    assert experts.sources == (f"{place}.gate_proj.weight", f"{place}.up_proj.weight")
    assert experts.expert_rows == ((0, 10), (10, 20), (0, 10), (10, 20))
    assert by_name["model.layers.0.mlp.gate.weight"].sources == ()
    assert by_name["model.layers.0.self_attn.q_proj.bias"].how == "copied"


def test_the_receipt_is_written_as_json(tmp_path: Path) -> None:
    receipt = receipt_of(upcycle(own_dense(), 4, 2, variant="drop"))
    path = write_receipt(tmp_path / "run", receipt)
    assert path.name == "upcycle.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert document == json.loads(json.dumps(dataclasses.asdict(receipt)))
    down = next(t for t in document["tensors"] if t["name"].endswith("experts.down_proj"))
    assert len(set(down["redrawn_sha256"])) == 4
    assert "10 of 20" in down["how"]


def test_a_model_from_elsewhere_has_no_receipt() -> None:
    with pytest.raises(UserError, match="no receipt"):
        receipt_of(own_dense())


# --- what cannot be ------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"top_k": 1}, ["top_k 1", "no gradient", "scales the FFN's output", "2 or more"]),
    ({"num_experts": 2, "top_k": 3}, ["top_k 3", "num_experts 2"]),
    ({"variant": "merge"}, ["variant 'merge'", "copy, granular, noise, drop"]),
    ({"noise": 0.1}, ["noise 0.1 has no effect in variant 'copy'"]),
    ({"variant": "noise", "drop_ratio": 0.5}, ["drop_ratio 0.5 has no effect"]),
    ({"variant": "noise", "noise": 0.0}, ["noise 0.0", "above 0"]),
    ({"variant": "drop", "drop_ratio": 1.5}, ["drop_ratio 1.5", "at most 1"]),
    ({"variant": "granular", "granularity": 1}, ["granularity 1", "at least 2"]),
    ({"variant": "granular", "granularity": 3}, ["num_experts 8", "granularity 3"]),
    ({"variant": "granular", "top_k": 3}, ["top_k 3", "granularity 2"]),
    (
        {"variant": "granular", "granularity": 8, "top_k": 8},
        ["intermediate_size 20", "granularity 8"],
    ),
    ({"router_std": 0.0}, ["router_std 0.0", "above 0"]),
]


@pytest.mark.parametrize(("options", "told"), REFUSED, ids=str)
def test_what_cannot_be_upcycled_is_refused_with_the_reason(
    options: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        upcycle(own_dense(), **options)
    message = str(caught.value)
    assert all(re.search(re.escape(part), message) for part in told), message


def test_only_a_dense_language_model_without_ffn_biases_is_upcycled() -> None:
    with pytest.raises(UserError, match=r"layers \[2\] of this model have experts already"):
        upcycle(own_dense(mlp_layer_types=["dense", "dense", "sparse"]))
    with pytest.raises(UserError, match="mlp_bias"):
        upcycle(own_dense(mlp_bias=True))
    with pytest.raises(UserError, match="MoEForReward"):
        upcycle(MoEForReward(MoEConfig(**TINY)))


# --- a real model --------------------------------------------------------------------------------


def perplexity(model: Any, stories: list[list[int]]) -> float:
    """Token-weighted over stories that begin with BOS, which is not scored."""
    total, count = 0.0, 0
    for story in stories:
        row = torch.tensor([story])
        with torch.no_grad():
            logits = model(row).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
        count += len(story) - 1
    return math.exp(total / count)


def test_a_pretrained_llama_keeps_its_perplexity_loaded_and_upcycled(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K" / "hf"
    files = sorted((shared_data / "lm").glob("tinystories_*.txt"))
    if not folder.is_dir() or not files:
        pytest.skip("real data absent: no stories260K model or tinystories text")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    stories = [story.strip() for story in text.split("<|endoftext|>") if story.strip()]
    rows = [[1, *tokenizer(story, add_special_tokens=False).input_ids] for story in stories]
    before = load(folder)
    assert perplexity(before, rows) == pytest.approx(3.548, abs=0.005)
    for options in ({}, {"top_k": 4, "variant": "granular"}):
        after = upcycle(before, 8, **options)
        assert perplexity(after, rows) == pytest.approx(3.548, abs=0.005)
        assert difference(before, after) <= 1e-5
