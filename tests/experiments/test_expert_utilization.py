"""Expert use of saved models on files: the numbers by hand, and what a run leaves and says."""

import csv
import io
import json
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from experiments.expert_utilization import Config, main, model_names, prepare, run, spread
from experiments.lab import plots
from experiments.lab.expert_figures import spread_over
from experiments.lab.expert_summary import against, measures, neighbours
from experiments.lab.expert_terminal import shade, show, sign
from experiments.lab.expert_use import Text, observe, specialised_tokens
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
    top_1 = {"num_experts_per_tok": 1, "norm_topk_prob": False}
    save("top_1", MoEForCausalLM(MoEConfig(vocab_size=len(tokenizer), **OURS | top_1)))
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


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run: its folder, its summary and what it printed."""

    folder: Path
    summary: dict[str, Any]
    printed: str


def done(world: Path, model: str, data: str, **changes: Any) -> Done:
    out = world / f"run-{model}-{data}"
    console = Console(width=140, record=True, file=io.StringIO())
    summary = run(configured(world, model, data, out, **changes))
    show(summary, out / "run", console)
    return Done(folder=out / "run", summary=summary, printed=console.export_text())


@pytest.fixture(scope="module")
def by_layer(world: Path) -> Done:
    return done(world, "ours", "texts.jsonl", batch_size=5, permutations=19)


@pytest.fixture(scope="module")
def by_domain(world: Path) -> Done:
    return done(world, "ours", "domains.jsonl", by="domain", against="moved", batch_size=7)


@pytest.fixture(scope="module")
def of_olmoe(world: Path) -> Done:
    return done(world, "olmoe", "texts.jsonl", permutations=19)


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
    assert spread_over(3, 10) == [0, 1, 2] and spread_over(32, 4) == [0, 10, 21, 31]


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
        observe(decoder, texts, pad_id=0, batch_size=size, per_text=True) for size in (1, 2, 9)
    ]
    for observed in found:
        counts, token_T = observed.text_count_NLE, observed.token_T
        assert counts is not None and observed.pairs is not None
        assert torch.equal(counts.sum(dim=0).double(), observed.stats.count_LE)
        assert counts.sum(dim=(1, 2)).tolist() == [5 * 4, 1 * 4, 5 * 4]  # tokens x L x K
        assert token_T.tolist() == list(range(1, 12))
        assert observed.expert_LTK.shape == (2, 11, 2)
        assert observed.sequence_T.tolist() == [0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4]  # by piece
        assert torch.equal(observed.pairs.usage_LE * 11, observed.stats.count_LE)
        assert torch.equal(counts, found[0].text_count_NLE)  # type: ignore[arg-type]


# --- runs ----------------------------------------------------------------------------------------


def test_a_run_by_layer_leaves_the_routers_own_statistics(world: Path, by_layer: Done) -> None:
    summary, folder = by_layer.summary, by_layer.folder
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

    assert without_timings(json.loads((folder / "summary.json").read_text("utf-8"))) == (
        without_timings(summary)
    )
    rows = table(folder / "experts.csv")
    assert len(rows) == 8 and sum(int(row["count"]) for row in rows) == stats.count_LE.sum()
    assert [row["layer"] for row in table(folder / "layers.csv")] == ["0", "1"]
    for name in ("experts.svg", "experts.png"):
        assert (folder / "figures" / name).stat().st_size > 1000
    assert summary["schema"] == 1 and summary["status"] == "done" and "verdict" not in summary


def test_a_run_counts_pairs_of_experts_and_neighbouring_tokens(by_layer: Done) -> None:
    summary, folder, printed = by_layer.summary, by_layer.folder, by_layer.printed
    pairs, repeated = summary["coactivation"], summary["repeats"]
    for layer, share_EE in enumerate(pairs["conditional"]):
        for row in share_EE:
            assert sum(row) == pytest.approx(2.0, abs=1e-3)  # itself, and one of K - 1 = 1 others
        rows = [r for r in table(folder / "coactivation.csv") if int(r["layer"]) == layer]
        assert len(rows) == 4 * 3
        # Every token has one pair, which stands in the table from both sides.
        assert sum(int(r["tokens"]) for r in rows) == 2 * summary["num_tokens"]
    assert pairs["uniform_null"] == pytest.approx(1 / 3)
    assert all(pair["by_usage"] > 0 for layer in pairs["strongest"] for pair in layer)
    assert repeated["num_pairs"] == summary["num_tokens"] - summary["num_pieces"]
    assert [len(row) for row in repeated["first"]["shuffled"]] == [2] * 19
    for kind in ("first", "first_or_second"):
        found = repeated[kind]
        assert all(0 <= value <= 1 for key in ("rate", "usage_null") for value in found[key])
    rows = table(folder / "repeats.csv")
    assert [(r["choices"], r["layer"]) for r in rows] == [
        (kind, layer) for kind in ("first", "first_or_second") for layer in "01"
    ]
    assert "chosen together" in printed and "same expert for the next token" in printed
    assert summary["answers"][0] in " ".join(printed.split())


def test_a_top_1_router_has_no_pairs_and_one_that_takes_all_has_no_margin(
    world: Path, tmp_path: Path
) -> None:
    one = run(configured(world, "top_1", "texts.jsonl", tmp_path, permutations=19))
    assert "coactivation" not in one and "first_or_second" not in one["repeats"]
    assert not (tmp_path / "run" / "coactivation.csv").exists()
    every = MoEModel(MoEConfig(vocab_size=50, **OURS, num_experts_per_tok=4)).eval()
    text = Text(place="one", domain=None, pieces=((1, 2, 3),))
    found = measures(observe(every, [text], pad_id=0, batch_size=1).stats)
    assert found["margin"] == found["tie_rate"] == [None, None]  # NaN is no JSON


def test_texts_of_one_token_have_no_neighbours() -> None:
    observed = observe(
        MoEModel(MoEConfig(vocab_size=50, **OURS)).eval(),
        [Text(place="one", domain=None, pieces=((1,), (2,)))],
        pad_id=0,
        batch_size=2,
    )
    assert neighbours(observed, permutations=19, seed=0) == {}


def test_long_texts_are_cut_into_pieces_and_no_token_is_lost(world: Path, tmp_path: Path) -> None:
    whole = prepare(configured(world, "ours", "texts.jsonl", tmp_path)).texts
    cut = prepare(configured(world, "ours", "texts.jsonl", tmp_path, max_length=7)).texts
    assert all(len(text.pieces) == 1 for text in whole)
    assert all(len(piece) <= 7 for text in cut for piece in text.pieces)
    assert [[*chain(*text.pieces)] for text in cut] == [[*text.pieces[0]] for text in whole]


def test_a_text_file_is_one_long_text(world: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(LETTERS), encoding="utf-8")
    (text,) = prepare(Config(model=str(world / "ours"), data=tmp_path / "long.txt")).texts
    assert len(text.pieces) > 1


def test_domains_of_different_words_are_told_from_shuffled_ones(by_domain: Done) -> None:
    summary, folder, printed = by_domain.summary, by_domain.folder, by_domain.printed
    domains = summary["domains"]
    assert domains["names"] == ["words", "numbers"] and domains["texts"] == [24, 24]
    assert summary["verdict"]["word"] == "DIFFERENT" and domains["mean_p_value"] == 0.01
    assert domains["mean_jsd_bits"] > 3 * domains["mean_jsd_bits_shuffled"]
    assert domains["joint_jsd_bits"] == pytest.approx(domains["jsd_bits"])  # two are one pair
    rows = table(folder / "domains.csv")
    assert len(rows) == 2 * 2 * 4
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4.0)
    assert {p.name for p in (folder / "figures").glob("*.png")} == {
        "experts.png",
        "coactivation.png",
        "repeats.png",
        "domains.png",
        "divergence.png",
        "drift.png",
    }
    assert "words (24)" in printed and "verdict: DIFFERENT" in printed


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
    words = summary["vocabulary"]
    assert words["p_value"] == [0.01, 0.01]  # these models have hardly more than the token to see
    assert all(0 < x < 2 for x in words["jsd_bits"]) and words["tokens"] <= summary["num_tokens"]
    assert len(table(tmp_path / "run" / "vocabulary.csv")) == 2
    printed = capsys.readouterr().out
    assert "most specialised tokens" in printed and "distinct tokens" in printed


def test_a_model_has_not_drifted_from_itself_but_from_another(
    world: Path, tmp_path: Path, by_domain: Done
) -> None:
    ready = prepare(configured(world, "ours", "texts.jsonl", tmp_path, against="ours"))
    seen = observe(ready.decoder, ready.texts, pad_id=0, batch_size=9, against=ready.against)
    same = against(seen, "ours")
    assert same["jaccard"] == pytest.approx([1.0, 1.0])
    assert same["jsd_bits"] == pytest.approx([0.0, 0.0], abs=1e-9)
    assert same["saturation"] == [1.0, 1.0]
    assert list(by_domain.summary["routing"]) == ["ours", "moved"]
    moved = by_domain.summary["drift"]
    assert all(0 < value < 0.9 for value in moved["jaccard"])
    assert all(value > 0.001 for value in moved["jsd_bits"])
    assert moved["jaccard_by_chance_about"] == pytest.approx(1 / 3)
    assert moved["saturation_uniform_null"] == 0.5
    # |A & B| / K = 2 J / (1 + J) for each token, so the shares lie above the Jaccard.
    for shared, jaccard in zip(moved["saturation"], moved["jaccard"], strict=True):
        assert jaccard < shared < 1
    assert len(table(by_domain.folder / "drift.csv")) == 2


def test_another_family_and_a_head_are_recorded_too(
    world: Path, tmp_path: Path, of_olmoe: Done
) -> None:
    assert of_olmoe.summary["shape"]["experts"] == 16
    for row in of_olmoe.summary["routing"]["olmoe"]["load_share"][0]:
        assert sum(row) == pytest.approx(16)
    ready = prepare(configured(world, "value", "texts.jsonl", tmp_path))
    seen = observe(ready.decoder, ready.texts, pad_id=0, batch_size=9)
    assert seen.stats.count_LE.shape == (2, 4)


@pytest.mark.parametrize("data", ["turns.jsonl", "pairs.jsonl"])
def test_instructions_and_pairs_are_read_as_the_model_would_see_them(
    world: Path, tmp_path: Path, data: str
) -> None:
    config = configured(world, "ours", data, tmp_path, template="alpaca", max_texts=5)
    texts = prepare(config).texts
    assert len(texts) == 5 and all(sum(map(len, text.pieces)) > 20 for text in texts)


def test_a_runs_own_configuration_gives_the_same_summary(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(configured(world, "ours", "mixed.jsonl", tmp_path, by="domain", permutations=19))
    assert first["verdict"]["word"] == "NOT DISTINGUISHED"  # its labels say nothing
    stored = tmp_path / "run" / "config.yaml"
    assert main(["--config", str(stored), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text(encoding="utf-8"))
    assert without_timings(again) == without_timings(first)
    capsys.readouterr()


def test_the_report_can_be_made_from_the_files(tmp_path: Path, by_domain: Done) -> None:
    folder = shutil.copytree(by_domain.folder, tmp_path / "run")
    files = [folder / "report.html", folder / "table.md", *sorted(folder.glob("figures/*"))]
    made = {path: path.read_bytes() for path in files}
    for path in files:
        path.unlink()
    report = write_all(folder)[0].read_text(encoding="utf-8")
    assert {path: path.read_bytes() for path in files} == made
    for words in (
        "Load of each expert over its fair share",
        "Of the tokens that chose the row",
        "Share of neighbouring tokens",
        "labels shuffled over whole texts",
        "ours against moved on the same tokens",
    ):
        assert words in report


def test_many_experts_are_shown_by_signs_on_a_narrow_terminal(of_olmoe: Done) -> None:
    narrow = Console(width=60, record=True, force_terminal=False)
    show(of_olmoe.summary, of_olmoe.folder, narrow)
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
