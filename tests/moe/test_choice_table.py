"""Choices are kept by sample and token, each once, and come back from their file as they were."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.choice_table import FORMAT, HEADER, ChoiceTable
from moe.errors import UserError
from moe.trace import RoutingTrace

# Two layers, top_k 2, four experts.
CHOICES = {
    9: torch.tensor([[[0, 1], [2, 3], [1, 0]], [[3, 2], [0, 3], [2, 1]]]),
    4: torch.tensor([[[1, 2]], [[0, 2]]]),
}


def table() -> ChoiceTable:
    return ChoiceTable.from_samples(CHOICES, num_experts=4)


def test_samples_lie_one_after_another_in_ascending_order() -> None:
    found = table()
    assert (found.num_layers, found.num_experts, found.top_k) == (2, 4, 2)
    assert found.sample_N.tolist() == [4, 9] and found.length_N.tolist() == [1, 3]
    assert found.start_N.tolist() == [0, 1]
    assert found.expert_TLK.dtype == torch.int16
    assert found.expert_TLK[:, 0].tolist() == [[1, 2], [0, 1], [2, 3], [1, 0]]
    assert {name: c.tolist() for name, c in found.samples()} == {
        name: c.tolist() for name, c in CHOICES.items()
    }


def test_tokens_may_come_in_any_order() -> None:
    found = ChoiceTable.from_tokens(
        torch.tensor([9, 4, 9, 9]),
        torch.tensor([2, 0, 0, 1]),
        expert_TLK=torch.stack(
            [CHOICES[name][:, t] for name, t in [(9, 2), (4, 0), (9, 0), (9, 1)]]
        ),
        num_experts=4,
    )
    assert torch.equal(found.expert_TLK, table().expert_TLK)


def test_more_experts_than_16_bits_hold_are_kept_whole() -> None:
    choice = torch.tensor([[[40000, 1]]])
    found = ChoiceTable.from_samples({0: choice}, num_experts=50000)
    assert found.expert_TLK.tolist() == [[[40000, 1]]]


def refused(told: str, choices: Any, *, num_experts: int = 4) -> None:
    with pytest.raises(UserError, match=told):
        RoutingTrace.from_choices(choices, num_experts=num_experts)


def test_choices_that_no_router_makes_are_refused() -> None:
    refused("no routing choices: give", {})
    refused(r"sample 3 are torch.float32 of shape \(1, 1, 1\): give", {3: torch.ones(1, 1, 1)})
    refused(r"sample 3 are torch.int64 of shape \(2, 2\): give", {3: torch.ones(2, 2).long()})
    refused(r"of shape \(2, 0, 2\): give integers", {3: torch.ones(2, 0, 2).long()})
    odd = {**CHOICES, 5: torch.tensor([[[1, 2]]])}
    refused("sample 5 has 1 layers and top_k 2, another 2 and 2: one trace is of one model", odd)
    refused(
        r"token 0 of sample 9 has experts \[3, 2\] in MoE layer 1: each must be one of 0 to 2 and",
        CHOICES,
        num_experts=3,
    )
    unknown = {0: torch.tensor([[[0, 1], [-1, -1]]])}
    refused(r"token 1 of sample 0 has experts \[-1, -1\] in MoE layer 0", unknown)
    refused(r"token 0 of sample 0 has experts \[1, 1\] in MoE", {0: torch.tensor([[[1, 1]]])})


def test_a_token_that_is_missing_or_comes_twice_is_refused_by_name() -> None:
    def of(*token: int) -> ChoiceTable:
        return ChoiceTable.from_tokens(
            torch.full((len(token),), 6),
            torch.tensor(token),
            expert_TLK=torch.zeros(len(token), 1, 1).long(),
            num_experts=2,
        )

    assert of(1, 0).length_N.tolist() == [2]
    with pytest.raises(UserError, match="token 1 of sample 6 was recorded twice"):
        of(0, 1, 1, 2)
    with pytest.raises(UserError, match="token 0 of sample 6 was not recorded, token 1 was"):
        of(1, 2)
    with pytest.raises(UserError, match="token 2 of sample 6 was not recorded, token 3 was"):
        of(0, 1, 3)


# --- files


def test_a_saved_trace_comes_back_with_its_choices(tmp_path: Path) -> None:
    trace = RoutingTrace.from_choices(CHOICES, num_experts=4)
    trace.save(tmp_path / "routing.safetensors")
    again = RoutingTrace.load(tmp_path / "routing.safetensors")
    assert (again.num_layers, again.num_experts, again.top_k) == (2, 4, 2)
    assert {n: c.tolist() for n, c in again.choices().samples()} == {
        n: c.tolist() for n, c in CHOICES.items()
    }
    table().save(tmp_path / "table.safetensors")
    files = [tmp_path / "routing.safetensors", tmp_path / "table.safetensors"]
    assert files[0].read_bytes() == files[1].read_bytes()


def tampered(path: Path, *, header: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    kept = {
        "sample": torch.tensor([4, 9]),
        "length": torch.tensor([1, 3]),
        "expert": table().expert_TLK,
    }
    said = {"format": FORMAT, "num_layers": 2, "num_experts": 4, "top_k": 2} | (header or {})
    save_file(kept | tensors, str(path), metadata={HEADER: json.dumps(said)})
    return path


def test_a_file_whose_header_and_tensors_disagree_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "routing.safetensors"
    assert ChoiceTable.load(tampered(path)).length_N.tolist() == [1, 3]
    for changes in (
        {"header": {"num_layers": 3}},
        {"header": {"top_k": 1}},
        {"length": torch.tensor([1, 2])},
        {"length": torch.tensor([4, 0])},
        {"sample": torch.tensor([4])},
        {"expert": table().expert_TLK[0]},
    ):
        with pytest.raises(UserError, match="says .* layers, .* experts and top_k .*, but holds"):
            ChoiceTable.load(tampered(path, **changes))
    with pytest.raises(UserError, match=r"token 0 of sample 9 has experts \[3, 2\] in MoE layer 1"):
        ChoiceTable.load(tampered(path, header={"num_experts": 3}))
    with pytest.raises(UserError, match="token 0 of sample 4 was recorded twice"):
        ChoiceTable.load(tampered(path, sample=torch.tensor([4, 4]), length=torch.tensor([2, 2])))


def test_another_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent is no file: give a routing trace"):
        RoutingTrace.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors", encoding="utf-8")
    with pytest.raises(UserError, match="text is no whole safetensors file"):
        RoutingTrace.load(tmp_path / "text")
    save_file({"weight": torch.ones(1)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="model.safetensors holds no routing trace"):
        RoutingTrace.load(tmp_path / "model.safetensors")
    for changes in (
        {"header": {"format": "another"}},
        {"header": {"top_k": "2"}},
        {"header": {"num_experts": None}},
        {"expert": table().expert_TLK.float()},
        {"weight": torch.ones(1)},
    ):
        with pytest.raises(UserError, match="other holds no routing trace: its header does not"):
            RoutingTrace.load(tampered(tmp_path / "other", **changes))
