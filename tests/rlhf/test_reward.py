"""Reward models: the scalar head, where a score is read, accuracy, and the trainer."""

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from moe import MoEConfig, MoEForCausalLM, MoEForValue
from moe.errors import UserError
from moe.heads import init_scalar_head
from rlhf.losses.bradley_terry import BradleyTerryLoss
from rlhf.reward import (
    ModelReward,
    RewardTrainer,
    center_reward,
    normalize_reward,
    reward_accuracy,
    scalar_head,
    scalar_model,
    sequence_scores,
    token_scores,
    wilson_interval,
)
from sft.adapt import LoraSpec, add_lora, merged
from sft.checkpoint import MANIFEST, live_tensors
from sft.rows import PreferenceCollator
from sft.settings import BalancePolicy, TrainSettings
from sft.text import pad_batch

EOS = 2


def tiny_lm(seed: int = 0, **config: Any) -> MoEForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 4,
        "initializer_range": 0.2,
        "pad_token_id": EOS,  # PAD equals EOS everywhere in this file: the harder case
        "eos_token_id": EOS,
    }
    return MoEForCausalLM(MoEConfig(**{**sizes, **config}))


def pairs(count: int = 24, *, seed: int = 0) -> list[dict[str, Any]]:
    """Separable: what is liked has only low ids, what is not has only high ones."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [rng.randrange(low, high) for _ in range(rng.randrange(2, 7))]

    return [
        {
            "prompt_ids": text(3, 32),
            "chosen_ids": [*text(3, 17), EOS],
            "rejected_ids": [*text(17, 32), EOS],
            "sample_id": i,
        }
        for i in range(count)
    ]


def collate(rows: list[Any]) -> dict[str, Tensor]:
    return PreferenceCollator(pad_id=EOS)(rows)


def reward_trainer(model: nn.Module, folder: Path, **changes: Any) -> RewardTrainer:
    options = changes.pop("options", {})
    chosen = {"max_steps": 10, "batch_size": 8, "lr": 1e-2, "log_steps": 1, **changes}
    return RewardTrainer(
        model,
        TrainSettings(**chosen),
        rows=pairs(),
        collator=PreferenceCollator(pad_id=EOS),
        folder=folder,
        **options,
    )


# --- the scalar model


def test_the_backbone_is_the_language_models_and_its_own() -> None:
    lm = tiny_lm()
    model = scalar_model(lm)
    for name, tensor in lm.model.state_dict().items():
        assert torch.equal(model.model.state_dict()[name], tensor), name
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    assert torch.equal(lm.model.norm.weight, torch.ones(16))
    ids = torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    hidden_BSD = scalar_model(lm).eval().model(input_ids=ids).last_hidden_state
    assert torch.equal(hidden_BSD, lm.eval().model(input_ids=ids).last_hidden_state)


def test_the_head_starts_at_random_with_the_papers_spread_and_no_bias() -> None:
    width = 400
    lm = tiny_lm(hidden_size=width, num_hidden_layers=1, moe_intermediate_size=4)
    torch.manual_seed(0)
    first, second = (scalar_head(scalar_model(lm)) for _ in range(2))
    assert not torch.equal(first.weight, second.weight)
    weights = torch.cat([first.weight, second.weight], dim=1).detach()
    # The standard error of a standard deviation over n draws is 1 / sqrt(2 n): here 2.5 %.
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(width + 1), rel=0.08)
    assert abs(float(weights.mean())) < 3 / math.sqrt((width + 1) * 2 * width)
    assert first.bias.tolist() == [0.0]


def test_one_function_starts_every_head() -> None:
    lm = tiny_lm()
    torch.manual_seed(3)
    model = scalar_model(lm)
    alone = nn.Linear(16, 1)
    torch.manual_seed(3)
    MoEForValue(lm.config)  # a scalar model is made and filled before its head is drawn
    init_scalar_head(alone)
    assert torch.equal(scalar_head(model).weight, alone.weight)
    assert alone.bias.tolist() == [0.0]


def test_a_scalar_model_has_no_dropout_and_leaves_the_language_model_its_own() -> None:
    lm = tiny_lm(attention_dropout=0.5)
    model = scalar_model(lm).train()
    ids = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        assert torch.equal(token_scores(model, ids, mask), token_scores(model, ids, mask))
    assert lm.config.attention_dropout == 0.5


def test_the_head_is_found_under_adapters() -> None:
    model = add_lora(scalar_model(tiny_lm()), LoraSpec(rank=2, alpha=4))
    head = scalar_head(model)
    assert head.weight.requires_grad
    ids = torch.randint(3, 32, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        before = token_scores(model, ids, mask)
        head.bias.add_(3.0)
        torch.testing.assert_close(token_scores(model, ids, mask), before + 3.0)


# --- where a score is read


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_score_is_read_at_the_last_real_token_whatever_the_padding(side: Any) -> None:
    model = scalar_model(tiny_lm()).eval()
    # An EOS that belongs to the text stands in the middle, at the end, or not at all.
    texts = [[5, 6, 7, 8, 9, EOS], [5, EOS, 7], [9, EOS], [4]]
    ids_BS, mask_BS = pad_batch(texts, pad_id=EOS, side=side)
    with torch.no_grad():
        score_B = sequence_scores(model, ids_BS, mask_BS)
        for row, text in enumerate(texts):
            alone = model(input_ids=torch.tensor([text])).logits[0, -1, 0]
            # Attention over padded keys adds in another order: float32 rounding, no more.
            assert float(score_B[row]) == pytest.approx(float(alone), abs=1e-5)


def test_more_padding_and_another_pad_id_change_no_score() -> None:
    model = scalar_model(tiny_lm()).eval()
    texts = [[5, 6, 7, 8], [9, 10]]
    with torch.no_grad():
        ids_BS, mask_BS = pad_batch(texts, pad_id=EOS, side="left")
        expected = sequence_scores(model, ids_BS, mask_BS)
        ids_BS, mask_BS = pad_batch([*texts, [3] * 20], pad_id=31, side="left")
        torch.testing.assert_close(
            sequence_scores(model, ids_BS, mask_BS)[:2], expected, rtol=0, atol=1e-5
        )


def test_a_model_as_a_source_of_rewards_scores_in_pieces_without_gradients() -> None:
    model = scalar_model(tiny_lm()).train()
    ids_BS = torch.randint(3, 32, (5, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    whole, pieces = (ModelReward(model=model, batch_size=n)(ids_BS, mask_BS) for n in (64, 2))
    assert whole.shape == (5,)
    assert not whole.requires_grad
    torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-6)
    assert model.training


@pytest.mark.parametrize("lora", [False, True])
def test_centring_makes_the_mean_zero_and_survives_merging(lora: bool) -> None:
    model: nn.Module = scalar_model(tiny_lm())
    if lora:
        model = add_lora(model, LoraSpec(rank=2, alpha=4))
    source = ModelReward(model=model)
    ids_BS = torch.randint(3, 32, (40, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS)
    before = source(ids_BS, mask_BS)
    assert abs(float(before.mean())) > 1e-3
    shift = center_reward(model, before)
    after = source(ids_BS, mask_BS)
    assert shift == pytest.approx(-float(before.mean()), abs=1e-6)
    assert float(after.mean()) == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(after - after.mean(), before - before.mean(), rtol=0, atol=1e-6)
    plain = ModelReward(model=merged(model))(ids_BS, mask_BS)
    torch.testing.assert_close(plain, after, rtol=0, atol=1e-5)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=EOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [tiny_lm, tiny_llama])
def test_with_pad_equal_to_eos_a_pair_is_scored_at_its_own_eos(make: Any) -> None:
    model = scalar_model(make()).eval()
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, EOS], "rejected_ids": [8, 9, 10, EOS]}
    batch = collate([{**row, "sample_id": 0}])
    assert batch["input_ids"][0].tolist() == [5, 6, 7, EOS, EOS, EOS]
    with torch.no_grad():
        score_B = sequence_scores(model, batch["input_ids"], batch["attention_mask"])
        for score, text in zip(score_B, ([5, 6, 7, EOS], [5, 6, 8, 9, 10, EOS]), strict=True):
            at_eos, before = model(input_ids=torch.tensor([text])).logits[0, [-1, -2], 0]
            torch.testing.assert_close(score, at_eos, rtol=0, atol=1e-5)
            assert abs(float(score - before)) > 1e-3


# --- normalising


@pytest.mark.parametrize("lora", [False, True])
def test_normalising_gives_the_reference_samples_mean_0_and_deviation_1(lora: bool) -> None:
    model: nn.Module = scalar_model(tiny_lm())
    if lora:
        model = add_lora(model, LoraSpec(rank=2, alpha=4))
    source = ModelReward(model=model)
    ids_BS = torch.randint(3, 32, (40, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS)
    with torch.no_grad():
        scalar_head(model).bias.fill_(0.5)  # is scaled like the weight
    before = source(ids_BS, mask_BS)
    done = normalize_reward(model, before, mode="std", source="forty texts")
    assert done.gain == pytest.approx(1 / float(before.std(correction=0)), rel=1e-6)
    assert done.shift == pytest.approx(-done.gain * float(before.mean()), rel=1e-5)
    assert (done.num_scores, done.source) == (40, "forty texts")
    for changed in (model, merged(model)):
        after = ModelReward(model=changed)(ids_BS, mask_BS)
        torch.testing.assert_close(after, done.gain * before + done.shift, rtol=0, atol=1e-5)
        assert float(after.mean()) == pytest.approx(0.0, abs=1e-5)
        assert float(after.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("make", [tiny_lm, tiny_llama])
def test_what_normalising_did_is_in_the_saved_models_configuration(
    make: Any, tmp_path: Path
) -> None:
    model: PreTrainedModel = scalar_model(make())
    ids_BS = torch.randint(3, 32, (8, 6), generator=torch.Generator().manual_seed(0))
    mask_BS = torch.ones_like(ids_BS)
    score_B = ModelReward(model=model)(ids_BS, mask_BS)
    done = normalize_reward(model, score_B, mode="std", source="eight texts")
    model.save_pretrained(tmp_path)
    again = AutoModelForTokenClassification.from_pretrained(tmp_path)
    assert again.config.reward_normalization == {
        "mode": "std",
        "gain": done.gain,
        "shift": done.shift,
        "num_scores": 8,
        "source": "eight texts",
    }
    after = ModelReward(model=again)(ids_BS, mask_BS)
    assert float(after.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_scores_that_cannot_be_normalised_are_refused() -> None:
    model = scalar_model(tiny_lm())
    with pytest.raises(UserError, match="all 3 scores of texts are 2: .*--normalize mean"):
        normalize_reward(model, torch.full((3,), 2.0), mode="std", source="texts")
    assert normalize_reward(model, torch.full((3,), 2.0), mode="mean").shift == -2.0
    with pytest.raises(UserError, match="1 of the 2 of reference samples are finite"):
        normalize_reward(model, torch.tensor([1.0, math.nan]), mode="mean")
    with pytest.raises(UserError, match="0 of the 0 of"):
        normalize_reward(model, torch.zeros(0), mode="mean")


# --- accuracy


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # the textbook pair
        (0, 10, 0.0, 0.2775),  # z^2 / (n + z^2) = 3.8415 / 13.8415
        (10, 10, 0.7225, 1.0),
        (0.5, 1, 0.0546, 0.9454),  # 1/2 -+ z / (2 sqrt(1 + z^2))
    ],
)
def test_the_wilson_interval_by_hand(
    successes: float, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-4)


class Table(nn.Module):
    """The score of a text is the number at its last token."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.arange(32.0))

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        class Outputs:
            logits = self.value[input_ids][..., None]

        return Outputs


def test_accuracy_counts_ties_half_over_all_batches() -> None:
    rows = [
        {"prompt_ids": [1], "chosen_ids": [chosen], "rejected_ids": [rejected], "sample_id": i}
        for i, (chosen, rejected) in enumerate([(9, 5), (7, 6), (4, 4), (3, 8), (10, 3)])
    ]
    model = Table().train()
    found = reward_accuracy(model, [collate(rows[:2]), collate(rows[2:])])
    assert found.accuracy == 3.5 / 5
    assert found.num_pairs == 5
    assert found.margin == pytest.approx((4 + 1 + 0 - 5 + 7) / 5)
    assert (found.low, found.high) == pytest.approx(wilson_interval(3.5, 5))
    assert model.training
    with pytest.raises(ValueError, match="no pairs to measure the accuracy on"):
        reward_accuracy(model, [])


# --- the trainer


def test_a_reward_model_learns_what_can_be_told_apart(tmp_path: Path) -> None:
    model = scalar_model(tiny_lm())
    held_out = [collate(pairs(32, seed=1))]
    before = reward_accuracy(model, held_out)
    trainer = reward_trainer(model, tmp_path, max_steps=25)
    trainer.fit()
    after = reward_accuracy(model, held_out)
    assert before.accuracy < 0.8
    assert after.accuracy > 0.95
    assert after.low > before.accuracy
    history = trainer.state.log_history
    assert history[-1]["train/loss"] < 0.2 < history[0]["train/loss"]
    assert history[-1]["preference/margin"] > history[0]["preference/margin"]
    assert history[-1]["reward/chosen"] > history[-1]["reward/rejected"]


def test_the_routers_of_a_reward_model_are_balanced_and_observed(tmp_path: Path) -> None:
    lm = tiny_lm(load_balancing_coef=0.5, z_loss_coef=0.1)
    gates = []
    for balance in (None, BalancePolicy(scope="off")):
        torch.manual_seed(1)
        model = scalar_model(lm)
        options = {} if balance is None else {"balance": balance}
        trainer = reward_trainer(
            model, tmp_path / str(balance is None), max_steps=3, options=options
        )
        trainer.fit()
        assert trainer.balance.on == (balance is None)
        row = trainer.state.log_history[-1]
        assert "router/load_entropy" in row  # observed either way
        assert ("router/balance_loss" in row) == (balance is None)
        gates.append(model.model.layers[0].mlp.gate.weight.detach())
    assert (gates[0] - gates[1]).abs().max() > 1e-3


def test_splitting_the_pairs_changes_nothing(tmp_path: Path) -> None:
    lm, made = tiny_lm(), []
    balance = BalancePolicy(scope="optimizer_step", load_balancing_coef=0.5, z_loss_coef=0.1)
    for micro in (8, 4, 2):
        torch.manual_seed(1)
        trainer = reward_trainer(
            scalar_model(lm), tmp_path / str(micro), max_steps=3, micro_batch_size=micro,
            adam_eps=1e-3, max_grad_norm=1e9, options={"balance": balance},
        )  # fmt: skip
        trainer.fit()
        made.append(trainer)
    for other in made[1:]:
        for one, two in zip(
            live_tensors(made[0].model).values(), live_tensors(other.model).values(), strict=True
        ):
            # float32 addition order; the eps keeps Adam from magnifying it (see test_trainer).
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_a_margin_in_the_rows_is_asked_of_the_scores(tmp_path: Path) -> None:
    rows = [{**row, "margin": 5.0 * (i % 2)} for i, row in enumerate(pairs(4))]
    trainer = RewardTrainer(
        scalar_model(tiny_lm()), TrainSettings(max_steps=1, batch_size=4, lr=1e-9, log_steps=1),
        rows=rows, collator=PreferenceCollator(pad_id=EOS), folder=tmp_path,
        balance=BalancePolicy(scope="off"),
    )  # fmt: skip
    batch = collate(rows)
    assert batch["margin"].tolist() == [0.0, 5.0, 0.0, 5.0]
    score_B = ModelReward(model=trainer.model)(batch["input_ids"], batch["attention_mask"])
    chosen_B, rejected_B = score_B.chunk(2)
    expected = -nn.functional.logsigmoid(chosen_B - rejected_B - batch["margin"]).mean()
    trainer.fit()
    # Another order of rows adds in another order: float32 rounding.
    assert trainer.state.log_history[-1]["train/loss"] == pytest.approx(float(expected), abs=1e-5)


def test_a_penalty_on_the_scores_size_is_part_of_the_objective(tmp_path: Path) -> None:
    sizes = []
    for coef in (0.0, 10.0):
        torch.manual_seed(1)
        model = scalar_model(tiny_lm())
        with torch.no_grad():
            scalar_head(model).bias.fill_(3.0)
        options = {"loss": BradleyTerryLoss(center_coef=coef)}
        reward_trainer(model, tmp_path / str(coef), max_steps=15, options=options).fit()
        batch = collate(pairs())
        with torch.no_grad():
            score_B = sequence_scores(model.eval(), batch["input_ids"], batch["attention_mask"])
        chosen_B, rejected_B = score_B.chunk(2)
        sizes.append(float((chosen_B + rejected_B).abs().mean()))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("lora", [False, True])
def test_a_resumed_reward_training_is_the_uninterrupted_one_to_the_byte(
    tmp_path: Path, lora: bool
) -> None:
    def build(folder: Path, seed: int) -> RewardTrainer:
        model: nn.Module = scalar_model(tiny_lm(seed))
        if lora:
            model = add_lora(
                model, LoraSpec(rank=2, alpha=4, targets=("attention", "experts", "router"))
            )
        return reward_trainer(
            model, folder, max_steps=4, micro_batch_size=4, save_steps=1, keep_checkpoints=9,
            log_steps=3,
        )  # fmt: skip

    whole = build(tmp_path / "whole", 0)
    whole.fit()
    last = (tmp_path / "whole" / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
    for step in range(1, 4):
        folder = tmp_path / f"from-{step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        again = build(folder, 77)
        again.fit(resume=True)
        assert again.optimizer_steps == 4 - step
        found = (folder / "checkpoint-4" / MANIFEST).read_text(encoding="utf-8")
        assert json.loads(found)["files"] == json.loads(last)["files"]
