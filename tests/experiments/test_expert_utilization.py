"""Expert use of saved models on files: the numbers by hand, and what a run leaves and says."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from experiments.expert_utilization import Config, main, model_names, run, spread
from experiments.lab import plots
from experiments.lab.expert_terminal import shade, show, sign
from experiments.lab.expert_use import (
    Text,
    domain_divergence,
    observe,
    p_value,
    shuffled_divergence,
    specialised_tokens,
)
from experiments.lab.report import write_all
from moe import MoEConfig, MoEForCausalLM, MoEForValue, MoEModel
from moe.errors import UserError
from moe.record import record_routing
from moe.stats import RouterStats
from sft.text import train_bpe

LETTERS = [f"{a} {b} {c} cat sat on the mat." for a in "abcd" for b in "efg" for c in "hi"]
DIGITS = [f"{a}{b} + {c} = {a}{c}{b} ; 12345" for a in "1234" for b in "567" for c in "89"]
SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
OURS: dict[str, Any] = SHAPE | {"moe_intermediate_size": 8, "num_experts": 4}
EXTRA = SHAPE | {"intermediate_size": 8, "pad_token_id": None, "eos_token_id": None}


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several kinds with one tokenizer, another tokenizer, and files of texts."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer = train_bpe([*LETTERS, *DIGITS], vocab_size=300)

    def save(name: str, model: Any, its: Any = tokenizer) -> None:
        model.save_pretrained(folder / name)
        its.save_pretrained(folder / name)

    torch.manual_seed(0)
    ours = MoEConfig(vocab_size=len(tokenizer), **OURS)
    save("ours", MoEForCausalLM(ours))
    save("value", MoEForValue(ours))
    save("moved", MoEForCausalLM(ours))
    save("six", MoEForCausalLM(MoEConfig(vocab_size=len(tokenizer), **OURS | {"num_experts": 6})))
    save("other_words", MoEForCausalLM(ours), train_bpe(LETTERS, vocab_size=270))
    size = {"vocab_size": len(tokenizer)}
    save("llama", LlamaForCausalLM(LlamaConfig(**size, **EXTRA)))
    olmoe = OlmoeConfig(**size, **EXTRA, num_experts=16, num_experts_per_tok=4)
    save("olmoe", OlmoeForCausalLM(olmoe))

    labelled = [{"text": t, "domain": "words"} for t in LETTERS]
    labelled += [{"text": t, "domain": "numbers"} for t in DIGITS]
    write_rows(folder / "domains.jsonl", labelled)
    # The same texts under labels that say nothing about them.
    mixed = [row | {"domain": "ab"[i % 2]} for i, row in enumerate(labelled)]
    write_rows(folder / "mixed.jsonl", mixed)
    write_rows(folder / "texts.jsonl", [{"text": t} for t in LETTERS])
    turns = [{"instruction": "Say [b]it[/c].", "output": t} for t in DIGITS]
    write_rows(folder / "turns.jsonl", turns)
    pairs = [{"prompt": "Say", "chosen": t, "rejected": "no"} for t in DIGITS]
    write_rows(folder / "pairs.jsonl", pairs)
    return folder


def configured(world: Path, model: str, data: str, out: Path, **changes: Any) -> Config:
    if "against" in changes:
        changes["against"] = str(world / changes["against"])
    return Config(model=str(world / model), data=world / data, out=out / "run", **changes)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_timings(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "timings"}


# --- by hand -------------------------------------------------------------------------------------


def test_texts_are_taken_evenly_over_the_file() -> None:
    assert spread(3, 10) == [0, 1, 2] and spread(10, 4) == [0, 2, 5, 7]


def test_disjoint_domains_diverge_by_one_bit_and_equal_ones_not_at_all() -> None:
    apart = torch.tensor([[[4.0, 0.0]], [[2.0, 0.0]], [[0.0, 3.0]], [[0.0, 9.0]]])
    labels_N = torch.tensor([0, 0, 1, 1])
    assert domain_divergence(apart, labels_N, num_domains=2).tolist() == pytest.approx([1.0])
    alike = torch.ones(4, 3, 5)
    assert domain_divergence(alike, labels_N, num_domains=2).tolist() == pytest.approx([0.0] * 3)


def test_the_divergence_is_the_mean_over_pairs_of_domains() -> None:
    counts = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]])
    labels_N = torch.tensor([0, 1, 2])
    # One pair is equal, two pairs are disjoint.
    assert domain_divergence(counts, labels_N, num_domains=3).item() == pytest.approx(2 / 3)


def test_shufflings_keep_the_texts_whole_and_come_back_with_their_seed() -> None:
    counts = torch.tensor([[[4.0, 0.0]], [[4.0, 0.0]], [[0.0, 4.0]], [[0.0, 4.0]]])
    labels_N = torch.tensor([0, 0, 1, 1])
    options = {"num_domains": 2, "permutations": 60}
    first, again, other = (
        shuffled_divergence(counts, labels_N, **options, seed=seed) for seed in (0, 0, 1)
    )
    assert first.shape == (60, 1) and torch.equal(first, again) and not torch.equal(first, other)
    # Two texts against two: a third of the labelings is the true split, the rest mixes evenly.
    assert {round(value, 6) for value in first.flatten().tolist()} == {0.0, 1.0}
    assert 0.15 < (first > 0.5).double().mean() < 0.55


def test_the_p_value_counts_the_observation_itself() -> None:
    assert p_value(5.0, [1.0] * 99) == 0.01
    assert p_value(5.0, [5.0, 9.0, 1.0]) == 0.75
    assert p_value(0.0, [0.0] * 9) == 1.0


def test_the_most_specialised_tokens_by_hand() -> None:
    # Token 7 goes to expert 0 three times of four, token 8 always to expert 1; 9 is too rare.
    token_T = torch.tensor([7, 7, 7, 7, 8, 8, 8, 9])
    expert_LTK = torch.tensor([[[0], [0], [0], [1], [1], [1], [1], [0]]], dtype=torch.int16)
    rows = specialised_tokens(
        token_T,
        expert_LTK,
        load_LE=torch.tensor([[0.5, 0.5]]),
        min_count=3,
        top=2,
        decode=lambda index: f"<{index}>",
    )
    assert [(r.expert, r.text, r.count, r.share) for r in rows] == [
        (0, "<7>", 4, 0.75),
        (1, "<8>", 3, 1.0),
        (1, "<7>", 4, 0.25),
    ]


def test_equally_special_tokens_stand_in_order_of_count_then_id() -> None:
    token_T = torch.tensor([5, 5, 3, 3, 3, 4, 4])
    expert_LTK = torch.zeros(1, 7, 1, dtype=torch.int16)
    rows = specialised_tokens(
        token_T,
        expert_LTK,
        load_LE=torch.tensor([[1.0, 0.0]]),
        min_count=2,
        top=9,
        decode=str,
    )
    assert [row.token for row in rows] == [3, 4, 5]


def test_a_load_has_a_sign_and_the_figures_colours() -> None:
    assert [sign(v) for v in (0.0, 0.3, 1.0, 3.0, 9.0)] == ["x", "-", "=", "+", "#"]
    assert shade(1.0).endswith("#ffffff") and shade(0.05).endswith(plots.DEAD)
    assert shade(8.0).endswith(plots.VERMILLION.lower()) and shade(0.2).endswith(plots.BLUE.lower())


def test_two_models_never_share_a_name(tmp_path: Path) -> None:
    def named(model: Path, against: Path) -> tuple[str, str]:
        return model_names(Config(model=str(model), data=tmp_path, against=str(against)))

    assert named(tmp_path / "a", tmp_path / "b") == ("a", "b")
    assert named(tmp_path / "a" / "m", tmp_path / "b" / "m") == ("a/m", "b/m")
    assert named(tmp_path / "a", tmp_path / "a") == ("model", "against")


def test_counts_per_text_add_up_to_the_whole_whatever_the_batch() -> None:
    torch.manual_seed(0)
    decoder = MoEModel(MoEConfig(vocab_size=50, **OURS)).eval()
    texts = [
        Text(place="one", domain=None, pieces=((1, 2, 3), (4, 5))),
        Text(place="two", domain=None, pieces=((6,),)),
        Text(place="three", domain=None, pieces=((7, 8, 9, 10), (11,))),
    ]
    found = [
        observe(decoder, texts, pad_id=0, batch_size=size, per_text=True, per_token=True)
        for size in (1, 2, 9)
    ]
    for observed in found:
        counts, token_T = observed.text_count_NLE, observed.token_T
        assert counts is not None and token_T is not None and observed.expert_LTK is not None
        assert torch.equal(counts.sum(dim=0).double(), observed.stats.count_LE)
        assert counts.sum(dim=(1, 2)).tolist() == [5 * 4, 1 * 4, 5 * 4]  # tokens x L x K
        assert token_T.tolist() == list(range(1, 12))
        assert observed.expert_LTK.shape == (2, 11, 2)
        assert torch.equal(counts, found[0].text_count_NLE)  # type: ignore[arg-type]


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_by_layer_leaves_the_routers_own_statistics(world: Path, tmp_path: Path) -> None:
    summary = run(configured(world, "ours", "texts.jsonl", tmp_path, batch_size=5))
    tokenizer = train_bpe([*LETTERS, *DIGITS], vocab_size=300)
    model = MoEForCausalLM.from_pretrained(world / "ours")
    with torch.no_grad(), record_routing(model) as trace:
        for text in LETTERS:
            ids = [1, *tokenizer(text, add_special_tokens=False)["input_ids"], 2]
            model(input_ids=torch.tensor([ids]))
    stats = RouterStats.from_trace(trace)
    found = summary["routing"]["ours"]
    assert found["max_vio"][0] == pytest.approx(stats.max_vio_L.tolist())
    assert found["max_vio_floor"][0] == pytest.approx(stats.max_vio_floor_L.tolist())
    assert found["load_share"][0] == [pytest.approx(r) for r in stats.relative_load_LE.tolist()]
    assert summary["num_tokens"] == int(stats.tokens_L[0]) and summary["num_texts"] == 24
    assert summary["shape"] == {"layers": 2, "experts": 4, "top_k": 2}

    folder = tmp_path / "run"
    assert without_timings(json.loads((folder / "summary.json").read_text("utf-8"))) == (
        without_timings(summary)
    )
    rows = table(folder / "experts.csv")
    assert len(rows) == 8 and sum(int(row["count"]) for row in rows) == stats.count_LE.sum()
    assert [row["layer"] for row in table(folder / "layers.csv")] == ["0", "1"]
    for name in ("experts.svg", "experts.png"):
        assert (folder / "figures" / name).stat().st_size > 1000
    assert summary["schema"] == 1 and summary["status"] == "done" and "verdict" not in summary


def test_long_texts_are_cut_into_pieces_and_no_token_is_lost(world: Path, tmp_path: Path) -> None:
    whole = run(configured(world, "ours", "texts.jsonl", tmp_path / "whole"))
    cut = run(configured(world, "ours", "texts.jsonl", tmp_path / "cut", max_length=7))
    assert whole["num_pieces"] == 24 < cut["num_pieces"]
    assert whole["num_tokens"] == cut["num_tokens"]


def test_a_text_file_is_one_long_text(world: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(LETTERS), encoding="utf-8")
    summary = run(
        Config(model=str(world / "ours"), data=tmp_path / "long.txt", out=tmp_path / "run")
    )
    assert summary["num_texts"] == 1 and summary["num_pieces"] > 1


def test_domains_of_different_words_are_told_from_shuffled_ones(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(configured(world, "ours", "domains.jsonl", tmp_path, by="domain"))
    domains = summary["domains"]
    assert domains["names"] == ["words", "numbers"] and domains["texts"] == [24, 24]
    assert summary["verdict"]["word"] == "DIFFERENT" and domains["mean_p_value"] == 0.01
    assert domains["mean_jsd_bits"] > 3 * domains["mean_jsd_bits_shuffled"]
    rows = table(tmp_path / "run" / "domains.csv")
    assert len(rows) == 2 * 2 * 4
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4.0)
    assert {p.name for p in (tmp_path / "run" / "figures").glob("*.png")} == {
        "experts.png",
        "domains.png",
        "divergence.png",
    }
    printed = capsys.readouterr().out
    assert "words (24)" in printed and "verdict: DIFFERENT" in printed


def test_labels_that_say_nothing_are_not_distinguished(world: Path, tmp_path: Path) -> None:
    summary = run(configured(world, "ours", "mixed.jsonl", tmp_path, by="domain"))
    assert summary["verdict"]["word"] == "NOT DISTINGUISHED"


def test_by_token_names_tokens_and_their_experts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = run(
        configured(world, "ours", "domains.jsonl", tmp_path, by="token", top_tokens=3, min_count=4)
    )
    rows = table(tmp_path / "run" / "tokens.csv")
    assert len(rows) == len(summary["tokens"]) <= 2 * 4 * 3
    # BOS stands first in every text, so it always goes to the same two experts of a layer.
    bos = [row for row in summary["tokens"] if row["text"] == "<|bos|>" and row["layer"] == 0]
    assert [row["share"] for row in bos[:2]] == [1.0, 1.0] and bos[0]["count"] == 48
    assert all(row["count"] >= 4 for row in summary["tokens"])
    assert "most specialised tokens" in capsys.readouterr().out


def test_a_model_has_not_drifted_from_itself_but_from_another(world: Path, tmp_path: Path) -> None:
    same = run(configured(world, "ours", "texts.jsonl", tmp_path / "s", against="ours"))
    assert same["drift"]["jaccard"] == pytest.approx([1.0, 1.0])
    assert same["drift"]["jsd_bits"] == pytest.approx([0.0, 0.0], abs=1e-9)
    moved = run(
        configured(world, "ours", "texts.jsonl", tmp_path / "m", against="moved", batch_size=7)
    )
    assert list(moved["routing"]) == ["ours", "moved"]
    assert all(0 < value < 0.9 for value in moved["drift"]["jaccard"])
    assert all(value > 0.001 for value in moved["drift"]["jsd_bits"])
    assert moved["drift"]["jaccard_by_chance_about"] == pytest.approx(1 / 3)
    assert len(table(tmp_path / "m" / "run" / "drift.csv")) == 2
    assert (tmp_path / "m" / "run" / "figures" / "drift.png").is_file()


@pytest.mark.parametrize("model", ["olmoe", "value"])
def test_other_families_and_heads_are_recorded_too(world: Path, tmp_path: Path, model: str) -> None:
    summary = run(configured(world, model, "texts.jsonl", tmp_path))
    experts = 16 if model == "olmoe" else 4
    assert summary["shape"]["experts"] == experts
    for row in summary["routing"][model]["load_share"][0]:
        assert sum(row) == pytest.approx(experts)


@pytest.mark.parametrize("data", ["turns.jsonl", "pairs.jsonl"])
def test_instructions_and_pairs_are_read_as_the_model_would_see_them(
    world: Path, tmp_path: Path, data: str
) -> None:
    summary = run(configured(world, "ours", data, tmp_path, template="alpaca", max_texts=5))
    assert summary["num_texts"] == 5 and summary["num_tokens"] > 5 * 20


def test_a_runs_own_configuration_gives_the_same_summary(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(configured(world, "ours", "mixed.jsonl", tmp_path, by="domain", permutations=19))
    stored = tmp_path / "run" / "config.yaml"
    assert main(["--config", str(stored), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))
    assert without_timings(again) == without_timings(first)
    capsys.readouterr()


def test_the_report_can_be_made_from_the_files(world: Path, tmp_path: Path) -> None:
    run(configured(world, "ours", "texts.jsonl", tmp_path))
    report = write_all(tmp_path / "run")[0].read_text(encoding="utf-8")
    assert "Load of each expert over its fair share" in report


def test_many_experts_are_shown_by_signs_on_a_narrow_terminal(world: Path, tmp_path: Path) -> None:
    summary = run(configured(world, "olmoe", "texts.jsonl", tmp_path))
    narrow = Console(width=60, record=True, force_terminal=False)
    show(summary, tmp_path / "run", narrow)
    text = narrow.export_text()
    line = next(line for line in text.splitlines() if line.startswith("layer 0 "))
    assert len(line.split(maxsplit=2)[2]) == 16 and set(line[8:]) <= set("x-=+#")
    assert "x below 1/10" in text


# --- mistakes ------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line on stderr of a command that ends with code 2."""
    assert main(list(words)) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert told[-1].startswith("error: ")
    return told[-1]


def test_mistakes_are_told_in_one_sentence(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, texts, out = str(world / "ours"), str(world / "texts.jsonl"), str(tmp_path / "x")
    base = [ours, "--data", texts, "--out", out]
    told = refused(capsys, *base, "--by", "domain")
    assert "24 of 24 texts" in told and "--columns domain=NAME" in told and "`domain`" in told
    assert "--min-count has no effect with --by layer" in refused(capsys, *base, "--min-count", "3")
    assert "--permutations 5 must be at least 19" in refused(
        capsys, *base, "--by", "domain", "--permutations", "5"
    )
    assert "64 positions" in refused(capsys, *base, "--max-length", "65")
    told = refused(capsys, *base, "--against", str(world / "other_words"))
    assert "with other ids" in told and "same tokenizer" in told
    told = refused(capsys, *base, "--against", str(world / "six"))
    assert "4 and 6 experts" in told
    told = refused(capsys, str(world / "llama"), "--data", texts, "--out", out + "2")
    assert "LlamaForCausalLM without a router" in told and "mixtral" in told
    assert "no token occurs 999 times" in refused(
        capsys, ours, "--data", texts, "--by", "token", "--min-count", "999", "--out", out + "3"
    )
    assert "write our=theirs" in refused(capsys, *base, "--columns", "text")


def test_a_domain_with_a_single_text_is_refused_with_the_counts(
    world: Path, tmp_path: Path
) -> None:
    rows = [{"text": t, "domain": "a"} for t in LETTERS] + [{"text": "x", "domain": "b"}]
    data = write_rows(tmp_path / "few.jsonl", rows)
    with pytest.raises(UserError, match="two texts or more each, got a 24, b 1"):
        run(Config(model=str(world / "ours"), data=data, by="domain", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
