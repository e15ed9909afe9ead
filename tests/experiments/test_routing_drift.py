"""The stages' routing against their starts: measures by hand, the grid at debug scale, words."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import routing_drift
from experiments.lab.drift_measures import change_L, preferred_use, token_kl
from experiments.lab.drift_summary import REDRAWN, STAGES, compare_all, verdict_word
from experiments.lab.question import MirroredOptions, summarised
from experiments.lab.tables import console_table, main_table, metrics_table
from experiments.routing_drift import QUESTION, main, plan
from moe import MoEConfig, MoEForCausalLM
from moe.record import RecordedForward, RoutingTrace
from moe.routing import RouterSpec, route
from sft.run import Run


def trace(logits: list[list[float]]) -> RoutingTrace:
    routing = route(torch.tensor(logits), RouterSpec(num_experts=4, top_k=2))
    forward = RecordedForward(
        sample_ids=torch.tensor([0]),
        mask_BS=torch.ones(1, len(logits), dtype=torch.bool),
        routings=(routing,),
    )
    return RoutingTrace(forwards=[forward])


def test_change_counts_the_experts_that_were_replaced() -> None:
    before = trace([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    one_replaced = trace([[3.0, 1.0, 2.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    all_replaced = trace([[0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    assert change_L(before, before) == [0.0]
    # One of two experts in one of two tokens.
    assert change_L(before, one_replaced) == pytest.approx([1 / 4])
    assert change_L(before, all_replaced) == [1.0]


def tiny(seed: int) -> MoEForCausalLM:
    torch.manual_seed(seed)
    config = MoEConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe_intermediate_size=8,
        num_experts=4,
        initializer_range=0.5,
    )
    return MoEForCausalLM(config)


def test_token_kl_is_zero_to_itself_and_a_mean_over_tokens_to_another_model() -> None:
    first, second = tiny(0), tiny(1)
    rows: Any = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "sample_id": 0},
        {"input_ids": [4, 5], "labels": [4, 5], "sample_id": 1},
    ]
    assert token_kl(first, first, rows, pad_id=0) == 0.0
    by_hand = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        p, q = (torch.softmax(m.eval()(input_ids=ids).logits[0], dim=-1) for m in (first, second))
        by_hand += (p * (p / q).log()).sum(dim=-1).tolist()
    found = token_kl(first, second, rows, pad_id=0)
    assert found == pytest.approx(sum(by_hand) / 5, rel=1e-4) and found > 0


def test_preferred_use_finds_an_expert_that_serves_chosen_answers_and_no_other() -> None:
    even = torch.full((40, 1, 4), 5.0, dtype=torch.float64)
    more = even.clone()
    more[:, :, 0] += 5
    found = preferred_use(more, even, seed=0)
    assert found["chosen_rejected_p"] == [1 / 200]
    (share_E,) = found["chosen_minus_rejected"]
    assert share_E[0] == pytest.approx(0.4 - 0.25) and sum(share_E) == pytest.approx(0, abs=1e-9)
    same = preferred_use(even, even, seed=0)
    assert same["chosen_rejected_jsd"] == [0.0] and same["chosen_rejected_p"] == [1.0]


def arms(changes: dict[str, list[float]], between: float) -> dict[str, dict[str, list[float]]]:
    found = {stage: {"routing_change": values} for stage, values in changes.items()}
    return found | {f"{s}_reseeded": {"routing_change": [between] * 3} for s in changes}


def test_the_verdict_follows_from_each_stage_against_its_second_training() -> None:
    far = {stage: [0.5, 0.51, 0.52] for stage in STAGES}
    assert verdict_word(compare_all(arms(far, 0.1))) == "MOVED"
    assert verdict_word(compare_all(arms(far, 0.9))) == "NOT DISTINGUISHED"
    partly = {**far, "ppo": [0.1, 0.0, 0.2]}
    assert verdict_word(compare_all(arms(partly, 0.1))) == "PARTLY"


def test_a_stage_that_is_not_surely_further_than_its_null_is_not_distinguished() -> None:
    nearer = {stage: [0.5, 0.51, 0.52] for stage in STAGES}
    assert {row["word"] for row in compare_all(arms(nearer, 0.9))} == {"NOT DISTINGUISHED"}
    two = arms({stage: [0.5, 0.51] for stage in STAGES}, 0.1)
    two |= {f"{stage}_reseeded": {"routing_change": [0.1, 0.1]} for stage in STAGES}
    assert {row["word"] for row in compare_all(two)} == {"NOT DISTINGUISHED"}  # no interval


def test_every_stage_stands_above_its_own_null_and_the_null_says_what_it_redraws() -> None:
    changes = {stage: [0.5, 0.51, 0.52] for stage in STAGES}
    found = arms(changes, 0.1)
    for stage in STAGES:
        found[stage]["token_kl"] = [1.0, 1.0, 1.0]
    summary = {"seeds": [0, 1, 2], "arms": found, "comparisons": compare_all(found)}
    rows = main_table(summary).rows
    assert [row[0] for row in rows[:4]] == ["SFT", "SFT twice", "RM", "RM twice"]
    assert [row[1] for row in rows] == [x for stage in STAGES for x in ("", REDRAWN[stage])]
    assert {row[-1] for row in rows} == {"MOVED", ""}
    assert not {"-", "not compared", "baseline"} & {cell for row in rows for cell in row}
    assert metrics_table(summary).header == ("metric", "SFT", "RM", "DPO", "PPO")
    assert console_table(summary).row_count == 8


def test_the_whole_grid_runs_resumes_and_ends_in_the_same_summary(tmp_path: Path) -> None:
    config = MirroredOptions(seeds=(3,), scale="debug", mirror="none")
    summaries = []
    for name in ("first", "second"):
        folder = tmp_path / name
        with Run.create(tmp_path, "routing_drift", config.identity, out=folder):
            for job in plan(config, folder):
                job.function(*job.arguments)
            if name == "second":  # a second start finds all done and changes nothing
                for job in plan(config, folder):
                    job.function(*job.arguments)
        summaries.append(summarised(QUESTION, config, folder=folder))
    for summary in summaries:
        del summary["timings"]
    assert json.dumps(summaries[0]) == json.dumps(summaries[1])
    found = summaries[0]
    assert found["verdict"]["word"] in ("MOVED", "PARTLY", "NOT DISTINGUISHED")
    assert all(0 <= found["arms"][s]["routing_change"][0] <= 1 for s in STAGES)
    assert found["arms"]["rm"]["token_kl"] == [None]
    assert found["arms"]["ppo"]["token_kl"][0] > 0
    again = json.loads((tmp_path / "first/ppo-s3/measured.json").read_text(encoding="utf-8"))
    assert again["change_between_seeds"] > 0  # the second training is another one


def test_a_command_without_seeds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "1"]) == 2
    assert "give each seed once" in capsys.readouterr().err
    assert routing_drift.__doc__ is not None
