"""Two processes give the result of one: the commands under DDP, the model under FSDP2."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
ACCELERATE = ROOT / "sft" / "accelerate"
# Sums over two halves of a batch round otherwise than over the whole; Adam's step is lr at most.
TOLERANCE = 1e-5
COMMON = (
    *("--max-length", "40", "--lr", "1e-3", "--mirror", "none", "--quiet"),
    *("--balance-scope", "optimizer_step", "--val-set-size", "0.2"),
)
ONCE = ("--save-steps", "0", "--log-steps", "1")
# A checkpoint at step 1 holds half of what is logged at step 2, on either process.
KEPT = ("--save-steps", "1", "--keep-checkpoints", "9", "--log-steps", "2")
DRAWN = ("--max-new-tokens", "4", "--num-samples", "1")
SFT = (
    *("--model", "new", "--data", "rows.jsonl", "--max-steps", "2", "--batch-size", "8", *DRAWN),
    *("--hidden-size", "16", "--num-layers", "2", "--num-experts", "4", "--vocab-size", "300"),
)
PAIRS = ("--model", "sft-1", "--data", "pairs.jsonl", "--max-steps", "2", "--batch-size", "8")
RM = ("--method", "rm", *PAIRS)
DPO = ("--method", "dpo", *PAIRS, *DRAWN)
PPO = (
    *("--method", "ppo", "--model", "sft-1", "--data", "pairs.jsonl", "--reward-model", "rm-1"),
    *("--updates", "2", "--episodes", "8", "--ppo-epochs", "1", "--minibatches", "2", *DRAWN),
    "--allow-weak-reward-model",
)
LORA_SFT = (
    *("--model", "sft-1", "--data", "rows.jsonl", "--max-steps", "4", "--batch-size", "8"),
    *("--lora-rank", "2", "--lora-targets", "all", *DRAWN, *KEPT),
)
LORA_DPO = (*DPO, "--lora-rank", "2")
WORDS = "the cat dog sat ran red blue home tree sun moon sang saw big small".split()


def complete(flags: tuple[str, ...]) -> list[str]:
    """With what all commands share; a resumed run has everything from its folder."""
    if "--resume" in flags:
        return list(flags)
    return [*flags, *COMMON, *(() if "--save-steps" in flags else ONCE)]


@dataclass(frozen=True)
class Place:
    """Data files and the one-process runs that later commands start from."""

    folder: Path

    def run(self, module: str, *flags: str) -> None:
        """The command in this process."""
        from importlib import import_module

        assert import_module(module).main(complete(flags)) == 0

    def launch(self, module: str, *flags: str) -> str:
        """The command over two processes; what they printed."""
        answer = subprocess.run(
            [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(ACCELERATE / "ddp_cpu.yaml")),
                *("--num_processes", "2", "--main_process_port", "0"),  # a free one
                *("-m", module, *complete(flags)),
            ],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            timeout=240,
        )
        assert answer.returncode == 0, answer.stderr[-3000:]
        return answer.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("distributed")
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    rows = [{"instruction": words(4), "output": words(5)} for _ in range(24)]
    pairs = [{"prompt": words(4), "chosen": words(6), "rejected": words(3)} for _ in range(24)]
    for name, held in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in held)
        (folder / name).write_text(text, encoding="utf-8")
    here = Path.cwd()
    os.chdir(folder)
    try:
        made = Place(folder)
        made.run("sft.train", *SFT, "--out", "sft-1")
        made.run("rlhf.train", *RM, "--out", "rm-1")
        yield made
    finally:
        os.chdir(here)


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def assert_same_result(
    one: Path, two: Path, printed: str, *, weights: str = "model/model.safetensors"
) -> None:
    first, second = load_file(one / weights), load_file(two / weights)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=TOLERANCE)
    rows_one, rows_two = metrics(one), metrics(two)
    key = ("step", "stage", "split", "name")
    assert [[r[k] for k in key] for r in rows_one] == [[r[k] for k in key] for r in rows_two]
    for a, b in zip(rows_one, rows_two, strict=True):
        assert b["value"] == pytest.approx(a["value"], rel=1e-4, abs=1e-4), (a, b)
        assert b["count"] == a["count"], (a, b)
    assert printed.count("\nin ") == 1, "more than the first process printed"
    assert json.loads((two / "status.json").read_text(encoding="utf-8")) == {"status": "done"}


def test_sft_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    before = set(place.folder.iterdir())
    printed = place.launch("sft.train", *SFT, "--out", "sft-2")
    assert_same_result(place.folder / "sft-1", place.folder / "sft-2", printed)
    assert {path.name for path in set(place.folder.iterdir()) - before} == {"sft-2"}


def test_reward_model_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    printed = place.launch("rlhf.train", *RM, "--out", "rm-2")
    assert_same_result(place.folder / "rm-1", place.folder / "rm-2", printed)


def test_dpo_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    place.run("rlhf.train", *DPO, "--out", "dpo-1")
    printed = place.launch("rlhf.train", *DPO, "--out", "dpo-2")
    assert_same_result(place.folder / "dpo-1", place.folder / "dpo-2", printed)


def test_ppo_over_two_processes_gives_the_result_of_one(place: Place) -> None:
    place.run("rlhf.train", *PPO, "--out", "ppo-1")
    printed = place.launch("rlhf.train", *PPO, "--out", "ppo-2")
    assert_same_result(place.folder / "ppo-1", place.folder / "ppo-2", printed)


ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapter_run(place: Place) -> Path:
    """A LoRA run over two processes that kept all its checkpoints, compared with that of one."""
    place.run("sft.train", *LORA_SFT, "--out", "lora-1")
    printed = place.launch("sft.train", *LORA_SFT, "--out", "lora-2")
    run = place.folder / "lora-2"
    assert_same_result(place.folder / "lora-1", run, printed, weights=ADAPTER)
    return run


def test_an_adapter_over_two_processes_is_that_of_one(place: Place, adapter_run: Path) -> None:
    start, end = (
        load_file(adapter_run / "checkpoints" / f"checkpoint-{step}" / "model.safetensors")
        for step in (1, 4)
    )
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert moved and all(".lora_" in name for name in moved)
    for part in (".experts.", ".gate.", ".self_attn."):
        assert any(part in name for name in moved), part


def test_a_dpo_adapter_over_two_processes_is_that_of_one(place: Place) -> None:
    place.run("rlhf.train", *LORA_DPO, "--out", "dpo-lora-1")
    printed = place.launch("rlhf.train", *LORA_DPO, "--out", "dpo-lora-2")
    one, two = place.folder / "dpo-lora-1", place.folder / "dpo-lora-2"
    assert_same_result(one, two, printed, weights=ADAPTER)


def test_two_processes_resume_to_the_bits_of_two_that_were_not_stopped(
    place: Place, adapter_run: Path
) -> None:
    cut = place.folder / "lora-cut"
    shutil.copytree(adapter_run, cut)
    shutil.rmtree(cut / "adapter")
    for step in (2, 3, 4):
        shutil.rmtree(cut / "checkpoints" / f"checkpoint-{step}")
    (cut / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    place.launch("sft.train", "--resume", str(cut))
    for step in (2, 4):
        name = f"checkpoints/checkpoint-{step}/MANIFEST.json"
        assert (cut / name).read_bytes() == (adapter_run / name).read_bytes()
    manifest = json.loads((cut / name).read_text(encoding="utf-8"))
    assert manifest["num_processes"] == 2
    for name in (ADAPTER, "metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (adapter_run / name).read_bytes(), name
    found, expected = (
        json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in (cut, adapter_run)
    )
    found.pop("timings"), expected.pop("timings")
    assert found == expected


def test_one_process_does_not_go_on_for_two_unless_told(
    place: Place, adapter_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from sft.train import main

    cut = place.folder / "lora-alone"
    shutil.copytree(adapter_run, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    (cut / "status.json").write_text('{"status": "running"}', encoding="utf-8")
    assert main(["--resume", str(cut)]) == 2
    assert "num_processes was 2, is 1; the result would not be" in capsys.readouterr().err
    assert main(["--resume", str(cut), "--allow-changed", "machine"]) == 0
    alone, two = load_file(cut / ADAPTER), load_file(adapter_run / ADAPTER)
    for name, tensor in two.items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=TOLERANCE)


def shard_and_step(rank: int, folder: str) -> None:
    """One process: a sharded and a whole copy make the same step; rank 0 writes what differs."""
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)  # a port could be another's by now
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(0)
    config = MoEConfig(
        vocab_size=50,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_experts=4,
    )
    whole, sharded = MoEForCausalLM(config), MoEForCausalLM(config)
    sharded.load_state_dict(whole.state_dict())
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ids = torch.randint(0, 50, (4, 12))
    for model, rows in ((whole, ids), (sharded, ids[2 * rank : 2 * rank + 2])):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        logits = model(input_ids=rows, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
    differences = {}
    for (name, part), parameter in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(part, DTensor), name
        assert part.to_local().numel() < parameter.numel(), name
        difference = (part.full_tensor() - parameter).detach().abs().max()
        differences[name] = float(difference)
    if rank == 0:
        (Path(folder) / "differences.json").write_text(json.dumps(differences), encoding="utf-8")
    torch.distributed.destroy_process_group()


def test_fully_sharded_model_makes_the_step_of_the_whole_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(shard_and_step, args=(str(tmp_path),), nprocs=2)
    differences = json.loads((tmp_path / "differences.json").read_text(encoding="utf-8"))
    assert "model.layers.1.mlp.experts.gate_up_proj" in differences
    assert max(differences.values()) <= TOLERANCE, differences


@pytest.mark.parametrize("name", ["ddp_cpu", "fsdp2", "zero3"])
def test_launcher_configuration_has_only_keys_that_accelerate_knows(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises for a key it does not know
    stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert stored["num_processes"] == config.num_processes
    for section in ("fsdp_config", "deepspeed_config"):
        unknown = set(stored.get(section, {})) - launcher_options(section)
        assert not unknown, f"accelerate launch has no option for {unknown}"
    text = path.read_text(encoding="utf-8")
    assert ("not run" in text.splitlines()[0].lower()) == (name != "ddp_cpu")


def test_fsdp_wraps_the_layers_of_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """No class is named in the file: accelerate then asks the model, under adapters too."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from transformers import LlamaConfig, LlamaForCausalLM

    from moe import MoEConfig, MoEForCausalLM
    from moe.heads import MoEForValue
    from sft.adapt import LoraSpec, add_lora

    stored = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    assert "fsdp_transformer_layer_cls_to_wrap" not in stored
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP", raising=False)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=stored["fsdp_version"],
        auto_wrap_policy=stored["fsdp_auto_wrap_policy"].lower(),
    )
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ours = MoEConfig(**sizes, moe_intermediate_size=8, num_experts=4, num_key_value_heads=1)
    llama = LlamaConfig(**sizes, intermediate_size=16)
    spec = LoraSpec(rank=2, alpha=4, targets=("attention",))
    for model in (
        MoEForCausalLM(ours),
        MoEForValue(ours),
        LlamaForCausalLM(llama),
        add_lora(LlamaForCausalLM(llama), spec),
    ):
        wrapped = fsdp2_prepare_auto_wrap_policy(plugin, model)
        assert wrapped is not None
        names = [name for name, module in model.named_modules() if wrapped(module)]
        assert len(names) == 2 and all(".layers." in name for name in names), names


def launcher_options(section: str) -> set[str]:
    """The options of `accelerate launch` that a section of its configuration may set."""
    from accelerate.commands.launch import launch_command_parser

    options = {action.dest for action in launch_command_parser()._actions}
    # In DeepSpeed's own section accelerate drops no prefix; FSDP's options are all fsdp_*.
    return {o for o in options if o.startswith("fsdp_")} if section == "fsdp_config" else options
