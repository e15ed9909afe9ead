"""Counts are held against published integers, against PEFT, and against live tensors."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe.budget import budget, known_config, known_names, lora_tensors, main, meta_model
from moe.errors import UserError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
TINY_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 1},
    "qwen2_moe": {
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        **MLA,
    },
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
}


def tiny(kind: str) -> dict[str, Any]:
    shape = {} if kind == "gpt2" else TINY
    return {"model_type": kind, **shape, "vocab_size": 64, **TINY_MODELS[kind]}


def live(kind: str) -> Any:
    config = AutoConfig.for_model(**tiny(kind))
    return AutoModelForCausalLM.from_config(config)


# Total, active with both embeddings, active without the input embedding, KV bytes per token.
COUNTS = {
    "mistral-7b": (7_241_732_096, 7_241_732_096, 7_110_660_096, 131_072),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248, 12_748_853_248, 131_072),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744, 38_955_423_744, 229_376),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280, 1_178_994_688, 131_072),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504, 2_378_008_576, 196_608),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704, 3_041_867_776, 98_304),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496, 2_618_935_296, 229_376),
    "deepseek-v3": (671_026_404_352, 37_552_282_624, 36_625_603_584, 70_272),
    "gpt-oss-120b": (116_829_156_672, 5_711_982_912, 5_132_849_472, 73_728),
    "gpt-oss-20b": (20_914_757_184, 4_187_440_704, 3_608_307_264, 49_152),
    # The decoder's own keys and values: 12 layers, 12 heads of 64, 2 bytes.
    "switch-base-8": (619_339_008, 222_977_280, 222_977_280, 36_864),
    "llama-2-7b": (6_738_415_616, 6_738_415_616, 6_607_343_616, 524_288),
}


def test_every_pinned_model_has_an_expected_count() -> None:
    assert set(known_names()) == set(COUNTS)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_counts_of_a_known_model_match_to_the_integer(name: str) -> None:
    counted = budget(name)
    assert COUNTS[name] == (
        counted.total,
        counted.active,
        counted.active_without_input_embedding,
        counted.kv_bytes_per_token,
    )


@pytest.mark.parametrize(
    ("name", "gigaflops"),
    [
        ("mistral-7b", 14.221),
        ("mixtral-8x7b", 25.497),
        ("olmoe-1b-7b", 2.358),
        ("qwen3-30b-a3b", 6.083),
    ],
)
def test_forward_flops_match_to_the_printed_digit(name: str, gigaflops: float) -> None:
    assert round(budget(name).flops_per_token / 1e9, 3) == gigaflops


def test_a_field_changed_in_a_mapping_changes_the_count() -> None:
    wider = budget({**known_config("mixtral-8x22b"), "vocab_size": 32768})
    assert (wider.total, wider.active) == (140_630_071_296, 39_161_468_928)


@pytest.mark.parametrize(
    ("targets", "trainable", "total", "percent"),
    [
        ("all-linear", 20_971_520, 7_262_703_616, 0.2888),
        (["q_proj", "k_proj", "v_proj"], 4_718_592, 7_246_450_688, 0.0651),
        ("q_proj,v_proj", 3_407_872, 7_245_139_968, 0.0470),
        (
            "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj,lm_head",
            21_260_288,
            7_262_992_384,
            0.2927,
        ),
    ],
)
def test_lora_of_rank_8_on_mistral_matches_the_published_counts(
    targets: Any, trainable: int, total: int, percent: float
) -> None:
    counted = budget("mistral-7b", method="lora", lora_rank=8, targets=targets)
    assert (counted.trainable, counted.total, counted.percent) == (trainable, total, percent)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        *((kind, "all-linear") for kind in TINY_MODELS),
        *((kind, ["q_proj", "v_proj"]) for kind in ("llama", "mixtral", "olmoe", "gpt_oss")),
        ("llama", ["down_proj", "embed_tokens", "lm_head"]),
        ("mixtral", ["gate"]),
        ("mixtral", ["w1", "w2", "w3"]),
        ("olmoe", ["gate_proj", "up_proj", "down_proj"]),
        ("deepseek_v3", ["down_proj"]),
        ("qwen2_moe", ["down_proj"]),
    ],
)
def test_lora_counts_what_peft_counts(kind: str, targets: Any) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(live(kind), LoraConfig(r=3, target_modules=targets, lora_dropout=0.0))
    counted = budget(tiny(kind), method="lora", lora_rank=3, targets=targets)
    assert (counted.trainable, counted.total) == model.get_nb_trainable_parameters()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_naming_a_fused_tensor_counts_as_peft_does_with_target_parameters() -> None:
    from peft import LoraConfig, get_peft_model

    words = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(
        live("gpt_oss"), LoraConfig(r=3, target_modules=[], target_parameters=words)
    )
    counted = budget(tiny("gpt_oss"), method="lora", lora_rank=3, targets=words)
    assert (counted.trainable, counted.total) == model.get_nb_trainable_parameters()


def test_all_linear_on_mixtral_reaches_experts_and_router() -> None:
    adapted = lora_tensors(meta_model(tiny("mixtral")), 3, targets="all-linear")
    sizes = {tensor.name.removeprefix("model.layers.0."): tensor.size for tensor in adapted}
    # 4 experts; w1 and w3 are one tensor of 2 x 48 rows, at twice the rank.
    assert sizes["mlp.experts.gate_up_proj"] == 4 * (2 * 3) * (32 + 2 * 48)
    assert sizes["mlp.experts.down_proj"] == 4 * 3 * (48 + 32)
    assert sizes["mlp.gate.weight"] == 3 * (32 + 4)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("mixtral", "q_proj,gate_proj", r"'gate_proj' matches nothing .* it has .*q_proj.*w1"),
        ("mixtral", "w1", "w1 alone cannot be adapted: .* w1 and w3 fused"),
        ("llama", "w1", r"'w1' matches nothing .*gate_proj"),
        ("llama", [], "match nothing"),
        ("llama", "", "'' matches nothing"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(kind: str, targets: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        budget(tiny(kind), method="lora", lora_rank=2, targets=targets)


def test_active_parameters_by_hand() -> None:
    counted = budget({**tiny("mixtral"), "num_hidden_layers": 1})
    attention = 2 * 32 * 32 + 2 * 32 * 16
    one_expert = 3 * 32 * 48
    rest = 4 * 32 + 3 * 32 + 2 * 64 * 32  # router, norms, both embeddings
    assert counted.total == attention + 4 * one_expert + rest
    assert counted.active == attention + 2 * one_expert + rest
    assert counted.active_without_input_embedding == counted.active - 64 * 32
    assert counted.flops_per_token == 2 * (attention + 2 * one_expert + 4 * 32 + 64 * 32)


def test_a_tied_embedding_is_counted_once_and_stays_active_as_output_head() -> None:
    apart = budget(tiny("llama"))
    tied = budget({**tiny("llama"), "tie_word_embeddings": True})
    assert tied.total == apart.total - 64 * 32
    assert tied.active_without_input_embedding == tied.active
    assert tied.flops_per_token == apart.flops_per_token


def test_our_own_model_is_counted_from_its_directory(tmp_path: Path) -> None:
    moe = pytest.importorskip("moe")
    config = moe.MoEConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_experts=4)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = moe.MoEForCausalLM(config)
    counted = budget(tmp_path)
    expert = 3 * 32 * config.moe_intermediate_size
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.active == counted.total - 2 * (4 - 2) * expert


@pytest.mark.parametrize(
    ("dtype", "per_parameter"),
    [("float32", (4, 4, 8)), ("bfloat16", (2, 2, 4)), ("mixed", (2, 2, 12))],
)
def test_bytes_per_trained_parameter(dtype: str, per_parameter: tuple[int, int, int]) -> None:
    counted = budget(tiny("llama"), dtype=dtype)
    memory = counted.memory
    held = (memory.weights, memory.gradients, memory.optimizer)
    assert held == tuple(each * counted.total for each in per_parameter)


@pytest.mark.parametrize(
    ("method", "dtype", "gigabytes"),
    [("lora", "bfloat16", 14.819), ("qlora", "bfloat16", 4.461), ("full", "float32", 115.868)],
)
def test_memory_of_mistral_by_method(method: str, dtype: str, gigabytes: float) -> None:
    rank = 0 if method == "full" else 8
    counted = budget("mistral-7b", method=method, lora_rank=rank, dtype=dtype)
    assert round(counted.memory.total / 1e9, 3) == gigabytes


def test_qlora_stores_linear_weights_in_four_bits_and_their_scales() -> None:
    # 6,979,321,856 numbers in Linear layers, the other 262,410,240 in bfloat16, adapters float32.
    memory = budget("mistral-7b", method="qlora", lora_rank=8).memory
    linear = 6_979_321_856 * (4 + 0.126953125) / 8
    assert memory.weights == round(linear) + 262_410_240 * 2 + 20_971_520 * 4


def test_a_float32_step_of_adamw_holds_the_bytes_that_are_counted() -> None:
    torch.manual_seed(0)
    model = live("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 64, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()

    def size(tensors: Any) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    # Adam's step counter, one scalar a tensor, is left out.
    moments = (s[key] for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    memory = budget(tiny("llama")).memory
    assert memory.weights == size(model.parameters())
    assert memory.gradients == size(p.grad for p in model.parameters())
    assert memory.optimizer == size(moments)


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_activations_are_within_a_quarter_of_what_autograd_saves(kind: str) -> None:
    torch.manual_seed(0)
    model = live(kind)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, 64, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=tokens, labels=tokens, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    counted = budget(tiny(kind), batch_size=2, sequence_length=128).memory.activations
    assert counted == pytest.approx(measured, rel=0.25)


def test_no_tokens_no_activations_and_twice_the_tokens_twice_the_bytes() -> None:
    def activations(batch_size: int, sequence_length: int) -> int:
        sizes = {"batch_size": batch_size, "sequence_length": sequence_length}
        return budget(tiny("llama"), **sizes).memory.activations

    assert activations(0, 0) == 0
    assert activations(4, 16) == 2 * activations(2, 16) == 2 * activations(4, 8) > 0


def test_each_stage_holds_the_models_that_it_needs() -> None:
    total = budget(tiny("llama")).total
    scored = total - 64 * 32 + 32  # one scalar row in the place of the output head
    held = {
        stage: budget(tiny("llama"), stage=stage).memory for stage in ("sft", "rm", "dpo", "ppo")
    }
    assert held["sft"].total == 16 * total
    assert held["rm"].total == 16 * scored
    assert held["dpo"].total == 16 * total + 4 * total
    assert held["ppo"].reference == 4 * total
    assert held["ppo"].reward == 4 * scored
    assert held["ppo"].value == 16 * scored


def test_a_lora_policy_is_its_own_reference() -> None:
    options: dict[str, Any] = {"method": "lora", "lora_rank": 2, "targets": "q_proj,v_proj"}
    sft = budget(tiny("llama"), **options)
    assert budget(tiny("llama"), stage="dpo", **options).memory == sft.memory
    assert sft.memory.gradients + sft.memory.optimizer == 12 * sft.trainable
    reward_model = budget(tiny("llama"), stage="rm", **options)
    assert reward_model.trainable == sft.trainable + 32
    assert reward_model.total == sft.total - 64 * 32 + 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 8}, "lora_rank 8 has no effect with method full"),
        ({"targets": "q_proj"}, "targets 'q_proj' has no effect with method full"),
        ({"method": "lora"}, "needs a lora_rank of at least 1, not 0"),
        ({"method": "lora", "lora_rank": 2, "dtype": "mixed"}, "choose bfloat16"),
        ({"method": "adapter"}, "'adapter' is unknown: choose one of full, lora, qlora"),
        ({"stage": "grpo"}, "'grpo' is unknown: choose one of sft, rm, dpo, ppo"),
        ({"batch_size": 2}, "batch_size 2 and sequence_length 0"),
        (
            {"method": "lora", "lora_rank": 2, "targets": "lm_head", "stage": "rm"},
            "stage rm has one scalar row in its place",
        ),
    ],
)
def test_an_option_without_effect_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        budget(tiny("llama"), **options)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean mixtral-8x7b"):
        budget("mixtral-8x7")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no config.json"),
        ("{", "is not JSON"),
        ("[]", "must be a JSON object"),
        ('{"model_type": "no_such"}', "'no_such' is no class of transformers"),
        ('{"model_type": "llama", "vocab_size": "many"}', "transformers refuses this llama config"),
        (
            '{"model_type": "mamba", "num_hidden_layers": 1}',
            "a mamba model has layers of type linear_attention",
        ),
        ('{"model_type": "vit"}', "cannot build a vit language model"),
    ],
)
def test_a_bad_directory_gets_one_sentence(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        budget(tmp_path)


def test_the_command_prints_the_keys_that_others_read(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["llama-2-7b", "--method", "lora", "--lora_rank=8", "--targets", "q_proj,v_proj"]
    assert main([*flags, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {
        "name",
        "method",
        "total",
        "active",
        "active_without_input_embedding",
        "trainable",
        "percent",
        "kv_bytes_per_token",
        "flops_per_token",
        "memory",
    }
    assert set(printed["memory"]) == set(asdict(budget("llama-2-7b").memory))
    assert (printed["trainable"], printed["total"]) == (4_194_304, 6_742_609_920)
    assert printed["percent"] == 0.0622


def test_the_table_names_what_is_adapted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mistral-7b", "--method", "lora", "--lora-rank", "8", "--targets", "q_proj"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.self_attn.q_proj" in printed
    assert "7,241,732,096" in printed


def test_a_mistake_on_the_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-model"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no model 'no-such-model'")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_flags_are_parsed_before_torch_is_imported() -> None:
    program = (
        "import sys, moe.budget\n"
        "try: moe.budget.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'rich'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mixtral-8x7b" in done.stdout
