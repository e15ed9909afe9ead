"""What balancing keeps between steps, running counts and the selection bias, and what moves it."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, TrainerCallback

from moe import MoEConfig, MoEForCausalLM
from moe.errors import UserError
from moe.record import record_routing
from moe.stats import RouterStats
from sft import command, settings
from sft.adapt import LoraSpec, add_lora
from sft.balancing import StepBalance
from sft.checkpoint import MANIFEST, live_tensors, read_checkpoint
from sft.rows import SupervisedCollator
from sft.session import balance_policy, describe_balance
from sft.settings import BalancePolicy, TrainSettings
from sft.supervised import Config
from sft.train import main
from sft.trainer import SFTTrainer

BIAS = "mlp.gate.e_score_correction_bias"
SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,  # routers with opinions
}


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    own = {"moe_intermediate_size": 8, "num_experts": 3, "num_experts_per_tok": 2}
    return MoEForCausalLM(MoEConfig(**{**SIZES, **own, **config}))


def biased_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    return tiny_lm(seed, router_selection_bias=True, **config)


def some_rows(count: int = 12) -> list[Any]:
    rng = random.Random(0)
    rows = []
    for index in range(count):
        ids = [rng.randrange(3, 32) for _ in range(rng.randrange(4, 14))]
        rows.append({"input_ids": ids, "labels": ids, "sample_id": index})
    return rows


def trainer(
    model: nn.Module, folder: Path, balance: BalancePolicy, *, rows: Any = None, **changes: Any
) -> SFTTrainer:
    chosen = {
        "max_steps": 4,
        "batch_size": 4,
        "lr": 1e-2,
        "lr_schedule": "constant",
        "log_steps": 1,
    }
    more = {k: changes.pop(k) for k in ("allow_changed",) if k in changes}
    return SFTTrainer(
        model,
        TrainSettings(**{**chosen, **changes}),
        rows=some_rows() if rows is None else rows,
        collator=SupervisedCollator(pad_id=0),
        folder=folder,
        balance=balance,
        **more,
    )


def biases(model: nn.Module) -> Tensor:
    """(L, E)"""
    held = [buffer for name, buffer in model.named_buffers() if name.endswith(BIAS)]
    return torch.stack(held).clone()


class EachStep(TrainerCallback):
    """What a function gives after each step."""

    def __init__(self, look: Callable[[], Any]) -> None:
        self.look, self.seen = look, [look()]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seen.append(self.look())


def counts_of(model: nn.Module, rows: list[Any]) -> Tensor:
    """Assignments (L, E) of these rows, one row after the other without padding."""
    total: Any = 0.0
    with torch.no_grad():
        for row in rows:
            with record_routing(model) as trace:
                model(input_ids=torch.tensor([row["input_ids"]]))
            total = total + RouterStats.from_trace(trace).count_LE
    return total


# --- the policy


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"load_balancing_coef": -1.0}, "load_balancing_coef -1.0 must be at least 0 and finite"),
        ({"z_loss_coef": float("nan")}, "z_loss_coef nan must be at least 0 and finite"),
        ({"bias_update_rate": -0.1}, "bias_update_rate -0.1 must be at least 0 and finite"),
        ({"running_decay": 1.0}, "running_decay 1.0 must be at least 0 .the last step alone. and"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(options: dict[str, float], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        BalancePolicy(**options)  # type: ignore[arg-type]


def test_the_commands_know_the_scopes_that_the_policy_knows() -> None:
    assert get_args(command.BalanceScope) == get_args(settings.BalanceScope)
    (flag,) = (f for f in command.fields(command.TrainingConfig) if f.name == "balance_scope")
    assert set(get_args(flag.type)) == {"auto", *get_args(settings.BalanceScope)}


# --- f of the steps before


def running(decay: float = 0.5) -> BalancePolicy:
    return BalancePolicy(scope="running", load_balancing_coef=0.5, running_decay=decay)


def test_three_steps_of_counts_by_hand() -> None:
    balance = StepBalance(running(decay=0.5), tiny_lm(), all_sum=lambda x: x)
    steps = [torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 2.0]])]
    for count_LE in steps:
        balance.begin_step()
        balance._count_LE = count_LE
        balance.end_step()
    assert balance.state()["past_count"].tolist() == [[2.0, 2.0, 2.0]]
    balance.begin_step()
    assert balance._fraction_LE is not None
    torch.testing.assert_close(balance._fraction_LE, torch.full((1, 3), 1 / 3))


def test_in_the_first_step_an_even_f_gives_one_and_the_gradient_of_no_balance(
    tmp_path: Path,
) -> None:
    made = []
    for name, policy in (("running", running()), ("off", BalancePolicy(scope="off"))):
        made.append(trainer(tiny_lm(), tmp_path / name, policy, max_steps=1))
        made[-1].fit()
    assert made[0].state.log_history[0]["router/balance_loss"] == pytest.approx(1.0, rel=1e-6)
    for one, other in zip(made[0].model.parameters(), made[1].model.parameters(), strict=True):
        # The even pull is 0 but for rounding; Adam's eps keeps it from being magnified.
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def test_the_next_steps_count_what_the_steps_before_chose(tmp_path: Path) -> None:
    """The whole data is one step's batch and nothing moves, so every step counts the same."""
    rows = some_rows(4)
    made = trainer(tiny_lm(), tmp_path, running(), rows=rows, lr=1e-12, max_steps=3)
    seen = EachStep(lambda: made.step_balance.state().get("past_count"))
    made.add_callback(seen)
    made.fit()
    count_LE = counts_of(made.model, rows).float()
    assert seen.seen[0] is None
    for past_LE, times in zip(seen.seen[1:], (1.0, 1.5, 1.75), strict=True):
        torch.testing.assert_close(past_LE, times * count_LE, rtol=0, atol=0)
    exact = trainer(
        tiny_lm(),
        tmp_path,
        BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5),
        rows=rows,
        lr=1e-12,
        max_steps=3,
    )
    exact.fit()
    key = "router/balance_loss"
    for step in (1, 2):
        expected = exact.state.log_history[step][key]
        assert made.state.log_history[step][key] == pytest.approx(expected, rel=1e-6)


# --- the selection bias


def test_each_step_moves_the_bias_by_hand(tmp_path: Path) -> None:
    rows = some_rows(4)
    model = biased_lm()
    before = counts_of(model, rows)
    policy = BalancePolicy(scope="off", bias_update_rate=0.25)
    made = trainer(model, tmp_path, policy, rows=rows, max_steps=1)
    made.fit()
    assert before.shape == (2, 3) and len(before[0].unique()) > 1
    for count_E, bias_E in zip(before.tolist(), biases(model).tolist(), strict=True):
        mean = sum(count_E) / 3
        by_hand = [0.25 * ((mean > load) - (mean < load)) for load in count_E]
        assert bias_E == by_hand


@pytest.mark.parametrize(
    "changes", [{"micro_batch_size": 1}, {"activation_checkpointing": True}, {"rows": "padded"}]
)
def test_the_bias_does_not_depend_on_micro_batches_recompute_or_padding(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    policy = BalancePolicy(scope="off", bias_update_rate=0.05)
    found = []
    for name, more in (("plain", {}), ("changed", changes)):
        model = biased_lm(initializer_range=0.05)  # close calls, so that a wrong count would show
        made = trainer(model, tmp_path / name, policy, lr=1e-12, max_steps=6)
        if more.get("rows") == "padded":
            plain = SupervisedCollator(pad_id=0)
            made.data_collator = lambda rows: padded(plain(rows))  # noqa: B023
        elif more:
            made = trainer(model, tmp_path / name, policy, lr=1e-12, max_steps=6, **more)
        seen = EachStep(lambda: biases(model))  # noqa: B023
        made.add_callback(seen)
        made.fit()
        found.append(torch.stack(seen.seen))
    assert torch.equal(found[0], found[1])
    assert len(found[0].flatten(1).unique(dim=0)) > 3


def padded(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Five more columns of padding."""
    more = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: nn.functional.pad(value, (0, 5), value=more[name]) if name in more else value
        for name, value in batch.items()
    }


def test_in_eval_nothing_is_added_and_nothing_is_counted(tmp_path: Path) -> None:
    policy = BalancePolicy(
        scope="running", load_balancing_coef=5.0, z_loss_coef=5.0, bias_update_rate=0.1
    )
    model = biased_lm()
    made = trainer(model, tmp_path, policy, max_steps=1)
    batch = SupervisedCollator(pad_id=0)(some_rows(3))
    made.measure_step([batch])
    with torch.no_grad():
        model.eval()
        loss = made.compute_loss(model, dict(batch))
        made.step_balance.end_step()
    bare = trainer(model, tmp_path, BalancePolicy(scope="off"), max_steps=1)
    bare.measure_step([batch])
    assert torch.equal(loss, bare.compute_loss(model, dict(batch)))
    assert not biases(model).any() and not made.step_balance.state()
    model.train()
    made.compute_loss(model, dict(batch)).backward()
    made.step_balance.end_step()
    assert biases(model).any() and made.step_balance.state()


def test_a_step_that_is_forgotten_moves_nothing() -> None:
    model = biased_lm()
    policy = BalancePolicy(scope="running", load_balancing_coef=0.1, bias_update_rate=0.1)
    balance = StepBalance(policy, model, all_sum=lambda x: x)
    with record_routing(model) as trace:
        model(input_ids=torch.tensor([some_rows(1)[0]["input_ids"]]))
    balance.begin_step()
    balance.count([trace.forwards[0].routings])
    balance.forget_step()
    balance.end_step()
    assert not biases(model).any() and not balance.state()


def test_a_step_that_mixed_precision_skips_moves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import Accelerator

    model = biased_lm()
    made = trainer(model, tmp_path, BalancePolicy(scope="off", bias_update_rate=0.1), max_steps=3)
    skips = iter([False, True, False])
    held: list[bool] = []

    def was_skipped(self: Accelerator) -> bool:
        if len(held) == made.state.global_step:
            held.append(next(skips))
        return held[-1]

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(was_skipped))
    seen = EachStep(lambda: biases(model))
    made.add_callback(seen)
    made.fit()
    start, first, second, third = seen.seen
    assert not torch.equal(first, start) and torch.equal(second, first)
    assert not torch.equal(third, second)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (tiny_lm, "MoEForCausalLM has no selection bias to update"),
        (lambda: tiny_lm(mlp_layer_types=["dense"] * 2), "has no selection bias to update"),
        (
            lambda: add_lora(biased_lm(), LoraSpec(rank=1, alpha=1)),
            "belongs to the base model, and neither an adapter's file",
        ),
    ],
    ids=["no bias", "no router", "adapters"],
)
@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_a_rate_with_nothing_to_move_is_refused(
    tmp_path: Path, make: Any, sentence: str, coef: float
) -> None:
    policy = BalancePolicy(load_balancing_coef=coef, bias_update_rate=0.001)
    with pytest.raises(UserError, match=f"bias_update_rate 0.001: .*{sentence}"):
        trainer(make(), tmp_path, policy)


# --- checkpoints


BOTH = BalancePolicy(scope="running", load_balancing_coef=0.5, bias_update_rate=0.01)


def checksums(folder: Path) -> Any:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]


def test_a_resumed_training_balances_as_the_uninterrupted_one_to_the_byte(tmp_path: Path) -> None:
    saving = {"save_steps": 1, "keep_checkpoints": 9, "micro_batch_size": 2}
    whole = trainer(biased_lm(), tmp_path / "whole", BOTH, **saving)
    whole.fit()
    assert biases(whole.model).any()
    for step in (1, 3):
        folder = tmp_path / f"from-{step}"
        name = f"checkpoint-{step}"
        shutil.copytree(tmp_path / "whole" / name, folder / name)
        held = read_checkpoint(folder / name).tensors
        assert held["balance"]["past_count"].shape == (2, 3)
        assert held["model"][f"model.layers.0.{BIAS}"].any()
        again = trainer(biased_lm(seed=7), folder, BOTH, **saving)
        again.fit(resume=True)
        assert checksums(folder / "checkpoint-4") == checksums(tmp_path / "whole" / "checkpoint-4")


def test_a_checkpoint_from_before_these_options_is_resumed_and_a_change_is_refused(
    tmp_path: Path,
) -> None:
    trainer(biased_lm(), tmp_path, BalancePolicy(), save_steps=2).fit()
    shutil.rmtree(tmp_path / "checkpoint-4")
    folder = tmp_path / "checkpoint-2"
    path = folder / "settings.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    for name in ("running_decay", "bias_update_rate"):
        del document["balance"][name]
    text = json.dumps(document).encode()
    path.write_bytes(text)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    facts = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    manifest["files"]["settings.json"] = facts
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    changed = trainer(biased_lm(), tmp_path, BalancePolicy(bias_update_rate=0.1), save_steps=2)
    with pytest.raises(UserError, match="balance.bias_update_rate was 0.0, is 0.1"):
        changed.fit(resume=True)
    again = trainer(biased_lm(), tmp_path, BalancePolicy(), save_steps=2)
    again.fit(resume=True)
    assert again.optimizer_steps == 2


# --- cost, checkpointing, commands


@pytest.mark.parametrize(
    ("scope", "micro", "costs"),
    [
        ("optimizer_step", 2, True),
        ("optimizer_step", 4, False),  # one micro-batch is the step
        ("sequence", 2, False),
        ("running", 2, False),
        ("micro_batch", 2, False),
    ],
)
def test_only_the_optimizer_steps_first_passes_cost_time(
    tmp_path: Path, scope: Any, micro: int, costs: bool
) -> None:
    policy = BalancePolicy(scope=scope, load_balancing_coef=0.5)
    made = trainer(tiny_lm(), tmp_path, policy, micro_batch_size=micro, max_steps=1)
    made.fit()
    assert (made.first_pass_seconds > 0) == costs


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "optimizer_step", "running"])
def test_reentrant_checkpointing_gives_the_same_weights(tmp_path: Path, scope: Any) -> None:
    policy = BalancePolicy(scope=scope, load_balancing_coef=0.5, z_loss_coef=0.1)
    made = []
    for reentrant in (False, True):
        model = tiny_lm()
        if reentrant:
            model.activation_checkpointing_enable({"use_reentrant": True})
        made.append(trainer(model, tmp_path / str(reentrant), policy, micro_batch_size=2))
        made[-1].fit()
    pairs = zip(
        live_tensors(made[0].model).items(), live_tensors(made[1].model).values(), strict=True
    )
    for (name, one), other in pairs:
        assert torch.equal(one, other), name
    assert made[0].state.log_history == made[1].state.log_history


def test_reentrant_checkpointing_of_another_familys_model_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 8, "num_local_experts": 4}
    for reentrant in (False, True):
        model = MixtralForCausalLM(MixtralConfig(**sizes))
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        made = trainer(model, tmp_path, BalancePolicy(load_balancing_coef=0.5), max_steps=1)
        if not reentrant:
            made.fit()
            continue
        with pytest.raises(UserError, match="use_reentrant=True, which cuts the balance loss off"):
            made.fit()


def config(**changes: Any) -> Config:
    return Config(model="folder", data=Path("rows.jsonl"), **changes)


def test_the_flags_make_the_policy_and_what_has_no_effect_is_named() -> None:
    asked = config(balance_scope="running", running_decay=0.8, bias_update_rate=0.01)
    policy, idle = balance_policy(asked, biased_lm())
    assert (policy.scope, policy.running_decay, policy.bias_update_rate) == ("running", 0.8, 0.01)
    assert not idle and "running_decay" not in asked.idle()
    assert describe_balance(policy, biased_lm()) == (
        "load balancing 0.01, z-loss 0.001, f over running, selection bias by 0.01 a step"
    )
    only = config(balance_scope="off", bias_update_rate=0.01)
    policy, idle = balance_policy(only, biased_lm())
    assert not idle and describe_balance(policy, biased_lm()) == "selection bias by 0.01 a step"
    assert config().idle()["running_decay"] == "without --balance-scope running"
    _, idle = balance_policy(config(), tiny_lm())
    assert idle == {"bias_update_rate": "for this model: its router has no selection bias"}
    _, idle = balance_policy(config(lora_rank=2), biased_lm())
    assert idle["bias_update_rate"].startswith("with adapters: their files do not hold")


def quick(tmp_path: Path, *flags: str) -> list[str]:
    lines = [json.dumps({"instruction": "say it", "output": f"it {i}"}) + "\n" for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return [
        *("--model", "new", "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run")),
        *("--hidden-size", "16", "--num-layers", "1", "--num-experts", "4", "--vocab-size", "270"),
        *("--max-steps", "2", "--batch-size", "4", "--batch-size-per-device", "2"),
        *("--num-samples", "0", "--save-steps", "0", "--val-set-size", "0", "--mirror", "none"),
        *flags,
    ]


@pytest.mark.parametrize("scope", ["auto", "sequence"])
def test_the_command_says_what_the_first_passes_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scope: str
) -> None:
    assert main(quick(tmp_path, "--balance-scope", scope)) == 0
    out = capsys.readouterr().out
    assert f"f over {'optimizer_step' if scope == 'auto' else scope}" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    timings = summary["timings"]
    if scope == "auto":
        assert "balance over the optimizer step: its first passes took 0." in out
        assert 0 < timings["balance_first_pass_seconds"] < timings["seconds"]
    else:
        assert "first passes" not in out and set(timings) == {"seconds"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--bias-update-rate", "0.001"), "--bias-update-rate has no effect for this model: its"),
        (("--running-decay", "0.5"), "--running-decay has no effect without --balance-scope run"),
        (("--balance-scope", "sequense"), "'sequense' is not one of auto, off, micro_batch, seq"),
    ],
)
def test_a_balance_option_without_effect_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert main(quick(tmp_path, *flags)) == 2
    assert sentence in capsys.readouterr().err


def test_an_unknown_scope_and_a_loss_that_can_move_no_choice_are_refused() -> None:
    with pytest.raises(UserError, match="scope 'optimiser_step' is unknown"):
        BalancePolicy(scope="optimiser_step")  # type: ignore[arg-type]
    config = MoEConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_experts=4,
        router_kind="hash",
        load_balancing_coef=0.0,
    )
    model = MoEForCausalLM(config)
    with pytest.raises(UserError, match="cannot change what a router of kind 'hash' chooses"):
        StepBalance(BalancePolicy(load_balancing_coef=0.01), model, all_sum=lambda x: x)
    StepBalance(BalancePolicy(z_loss_coef=0.01), model, all_sum=lambda x: x)


def test_the_z_loss_alone_needs_no_first_pass() -> None:
    policies = {
        coef: BalancePolicy(scope="optimizer_step", load_balancing_coef=coef, z_loss_coef=1)
        for coef in (0.0, 0.1)
    }
    passes = {
        coef: StepBalance(policy, biased_lm(), all_sum=lambda x: x).needs_first_pass(2)
        for coef, policy in policies.items()
    }
    assert passes == {0.0: False, 0.1: True}
