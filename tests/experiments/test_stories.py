"""The world stories on a tiny random Llama: upcycled and dense, from the folder to the summary."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from experiments.compare import (
    Config,
    identity,
    main,
    plan,
    world_options,
)
from experiments.lab import judging, stages, tales
from experiments.lab.compare_summary import gather, write_samples
from experiments.lab.compare_terms import STAGES, arms_of
from experiments.lab.evaluation import text_perplexity
from experiments.lab.finish import end_run
from experiments.lab.gold import GoldForbidden, GoldReward
from experiments.lab.presets import STORIES_DEBUG, STORIES_LAPTOP
from experiments.lab.seed import Seed
from experiments.lab.specialisation import domain_use, expert_distance_L
from experiments.lab.world_stories import OWN_TEXTS, StoriesWorld, starts_words_itself
from experiments.lab.worlds import open_world
from moe.errors import UserError
from moe.generation import Rollout
from sft.run import Run
from sft.text import Message, load_tokenizer, train_bpe


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    texts = [example.answer for example in tales.sft_examples(0, 200)]
    tokenizer = train_bpe(texts, vocab_size=320)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def run_here(config: Config, folder: Path) -> dict[str, Any]:
    """The command's work in this process: all jobs in order, then what it makes of them."""
    open_world(world_options(config)).check()
    state = Run.create(folder.parent, "compare", identity(config), out=folder)
    with state:
        for job in plan(config, folder):
            job.function(*job.arguments)
        world = open_world(world_options(config))
        own = identity(config)
        summary = gather(world, folder, seeds=config.seeds, status="done", identity=own)
        write_samples(world, folder, config.seeds)
        state.write_json("summary.json", summary)
        end_run(folder, summary, config=own)
    return summary


def options(folder: Path, **changes: Any) -> Config:
    given: dict[str, Any] = {"world": "stories", "model": folder, "upcycle": "4x2"}
    return Config(**{**given, "seeds": (0,), "scale": "debug", "mirror": "none", **changes})


@pytest.fixture(scope="module")
def upcycled(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("upcycled") / "run"
    return folder, run_here(options(llama), folder)


@pytest.fixture(scope="module")
def dense(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("dense") / "run"
    return folder, run_here(options(llama, upcycle="none", target="negative"), folder)


def stories(model: Path, **changes: Any) -> StoriesWorld:
    given: dict[str, Any] = {
        "scale": STORIES_DEBUG,
        "experts": (4, 2),
        "target": "positive",
        "sft_data": None,
    }
    return StoriesWorld(model=model, **{**given, **changes})


def test_a_run_tells_every_metric_of_every_arm_it_has(
    upcycled: tuple[Path, dict[str, Any]], llama: Path
) -> None:
    folder, summary = upcycled
    assert set(summary["arms"]) == set(arms_of(stories(llama)))
    for values in summary["arms"].values():
        assert {"gold_reward", "original_perplexity", "distinct_2", "ended"} <= set(values)
    assert {c["metric"] for c in summary["comparisons"]} >= {"original_perplexity"}
    assert set(summary["degenerate"]) <= {"dpo", "ppo", "best_of_n"}
    assert summary["world"]["upcycle"] == "4x2" and summary["world"]["target"] == "positive"
    assert (folder / "report.html").is_file()
    assert "few-shot" not in (folder / "table.md").read_text(encoding="utf-8")
    assert json.loads((folder / "sft-s0" / "samples.jsonl").read_text("utf-8").splitlines()[0])


def test_a_stories_run_is_resumed_as_what_it_was(
    upcycled: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(upcycled[0])]) == 0
    assert "nothing to resume" in capsys.readouterr().out
    assert main(["--resume", str(upcycled[0]), "--target", "negative"]) == 2
    assert "target differs" in capsys.readouterr().err


def test_experts_begin_as_copies_and_are_told_apart_stage_by_stage(
    upcycled: tuple[Path, dict[str, Any]],
) -> None:
    routing = upcycled[1]["routing"]
    assert set(routing) == set(STAGES)
    assert routing["base"]["expert_distance"] == [[0.0, 0.0]]
    assert all(value > 0 for value in routing["sft"]["expert_distance"][0])
    for metric in ("domain_jsd", "domain_jsd_by_chance", "domain_p"):
        assert len(routing["sft"][metric][0]) == 2
    told = upcycled[1]["world"]["sentences"]
    assert any(sentence.startswith("Experts after SFT") for sentence in told)
    assert set(told) <= set(upcycled[1]["notes"])


def test_the_base_arm_writes_what_the_given_model_writes(
    upcycled: tuple[Path, dict[str, Any]], dense: tuple[Path, dict[str, Any]]
) -> None:
    """Copies of one FFN are that FFN, so upcycling changes no text and no perplexity."""
    ours, theirs = (summary["arms"]["base"] for _, summary in (upcycled, dense))
    for metric in ("original_perplexity", "base_perplexity", "length", "distinct_2"):
        assert ours[metric] == pytest.approx(theirs[metric], rel=1e-4)
    # The other target is the same score with the other sign.
    assert ours["gold_reward"][0] == pytest.approx(-theirs["gold_reward"][0], abs=1e-6)


def test_a_model_without_experts_has_no_routing_to_tell(
    dense: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = dense
    assert summary["routing"] == {}
    assert not list(folder.glob("*/routing.*"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Routing drift" not in page and "<h2>Experts</h2>" not in page
    assert "no experts" in " ".join(summary["notes"])


def test_sft_loss_and_ends_are_measured_and_told(upcycled: tuple[Path, dict[str, Any]]) -> None:
    told = upcycled[1]["world"]
    falls = zip(told["held_out_sft_loss_before"], told["held_out_sft_loss_after"], strict=True)
    assert all(before > after for before, after in falls)
    assert 0 <= told["sft_ended_share"][0] <= 0.5  # a random model hardly ever ends
    assert told["missing_eos_penalty"] == [0.0]
    assert "PPO pays 0 " in " ".join(told["sentences"])


def test_the_price_for_not_ending_is_on_only_where_sft_mostly_ends(llama: Path) -> None:
    world = stories(llama)
    assert [world.missing_eos_penalty(share) for share in (0.0, 0.5, 0.51, 1.0)] == [0, 0, 1, 1]


def test_a_fall_of_the_loss_under_a_tenth_is_a_note(llama: Path) -> None:
    world = stories(llama)
    enough = world.sentences(before=[2.0], after=[1.5], ended=[0.9])
    little = world.sentences(before=[2.0, 2.0], after=[1.5, 1.95], ended=[0.9, 0.2])
    assert len(little) == len(enough) + 1
    assert "hardly taught" in little[1]
    assert "PPO pays 1, 0 " in little[2]


@pytest.fixture
def lora(llama: Path, tmp_path: Path) -> Iterator[Seed]:
    world = stories(llama)
    seed = Seed(
        seed=3, world=world, folder=tmp_path / "stages", arms=tmp_path, lora_rank=2, mirror=False
    )
    with GoldReward.forbid():
        stages.make_base(seed)
        stages.supervised_finetune(seed)
    stages.collect_pairs(seed)
    yield seed


def test_adapters_train_every_stage_of_stories_without_gold(lora: Seed) -> None:
    with GoldReward.forbid():
        stages.train_reward_model(lora)
        stages.train_dpo(lora, lora.tuned.dpo)
        stages.train_ppo(lora, lora.tuned.ppo)
        best = lora.scale.best_of_n
        for arm in ("base", "sft", "dpo", "ppo", "best_of_n"):
            measured, _ = judging.measure_arm(lora, arm, lora.eval_prompts(4), best=best)
            assert "gold_reward" not in measured.metrics
            assert measured.metrics["original_perplexity"] > 1
        with pytest.raises(GoldForbidden):
            judging.judge_arm(lora, "sft")
    found = judging.routing_of(lora, "dpo")
    assert found is not None and all(value > 0 for value in found["expert_distance"])


def test_adapters_of_a_dense_model_are_on_its_ffn(llama: Path, tmp_path: Path) -> None:
    world = stories(llama, experts=None)
    seed = Seed(seed=0, world=world, folder=tmp_path, arms=tmp_path, lora_rank=2, mirror=False)
    names = [name for name, p in seed.with_lora(seed.fresh_model()).named_parameters()]
    assert any("mlp" in name and "lora_" in name for name in names)


def test_an_answer_begins_with_its_space_where_the_tokenizer_writes_none(llama: Path) -> None:
    assert not starts_words_itself(load_tokenizer(llama))
    examples = stories(llama).sft_examples(0)
    assert all(e.conversation[-1].content.startswith(" ") for e in examples)
    assert all(e.conversation[0].content.endswith(".") for e in examples)


def test_sft_learns_a_given_file_and_keeps_a_part_of_it_back(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"A plain text number {i} about nothing."} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    world = stories(llama, sft_data=path)
    seen, held_out = world.sft_examples(0), world.sft_held_out(0)
    assert len(seen) == STORIES_DEBUG.num_sft and held_out
    texts = {e.conversation[-1].content for e in seen}
    assert not texts & {e.conversation[-1].content for e in held_out}
    assert all(len(e.conversation) == 1 for e in seen)
    assert world.facts()["sft_data_fingerprint"]


def test_preferences_are_no_sft_data(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match="preferences"):
        stories(llama, sft_data=path).sft_examples(0)


def test_the_model_that_was_given_is_told_by_its_fingerprint(llama: Path) -> None:
    facts = stories(llama).facts()
    assert len(facts["model_fingerprint"]) == 16
    assert facts["sft_data"] == "tales" and facts["sft_data_fingerprint"] is None


def test_the_token_that_ends_a_text_is_no_part_of_its_original_perplexity(llama: Path) -> None:
    world = stories(llama)
    text_path = world.text_path(llama)
    words = text_path.encode_completion(" the fox", finished=False)
    prompt_BP = torch.tensor([text_path.encode_prompt((Message("user", "One day"),))])

    def rollout(ids: list[int], end: bool) -> Rollout:
        shape = (1, len(ids))
        return Rollout(
            prompt_BP=prompt_BP,
            prompt_mask_BP=torch.ones_like(prompt_BP, dtype=torch.bool),
            response_BR=torch.tensor([ids]),
            mask_BR=torch.ones(shape, dtype=torch.bool),
            logp_BR=torch.zeros(shape),
            ended_B=torch.tensor([end]),
        )

    original = world.original()
    ended = text_perplexity(original, [rollout([*words, text_path.eos_id], True)], text_path)
    cut = text_perplexity(original, [rollout(words, False)], text_path)
    assert ended == pytest.approx(cut)
    assert text_perplexity(original, [rollout([text_path.eos_id], True)], text_path) == 1.0


def test_answers_end_with_the_stop_token_that_the_given_model_finds_likelier(
    llama: Path, tmp_path: Path
) -> None:
    world = stories(llama)
    (told,) = world.prepare(0, tmp_path)
    text_path = world.text_path(tmp_path)
    chances = {
        int(k): v
        for k, v in json.loads((tmp_path / OWN_TEXTS).read_text("utf-8"))["end_chances"].items()
    }
    assert set(chances) == set(text_path.stop_ids)
    assert text_path.eos_id == max(chances, key=lambda token: chances[token])
    example = world.sft_examples(0)[0]
    assert text_path.encode(example.conversation).input_ids[-1] == text_path.eos_id
    assert text_path.tokenizer.convert_ids_to_tokens(text_path.eos_id) in told


def test_distance_is_zero_between_copies_and_the_root_of_two_between_strangers() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
            super().__init__()
            self.gate_up_proj = torch.nn.Parameter(gate_up)
            self.down_proj = torch.nn.Parameter(down)

    one = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    copies = Experts(one.repeat(3, 1, 1), one[:, :4, :3].repeat(3, 1, 1))
    assert expert_distance_L(copies) == [0.0]
    strangers = Experts(torch.eye(2).view(2, 2, 1), torch.zeros(2, 1, 1))
    assert expert_distance_L(strangers) == [pytest.approx(2**0.5)]
    assert expert_distance_L(torch.nn.Linear(2, 2)) == []


def test_domains_that_share_a_text_do_not_diverge_beyond_chance(
    llama: Path, tmp_path: Path
) -> None:
    """The same texts under two names: whatever is found, shufflings reach it as well."""
    world = stories(llama)
    seed = Seed(seed=0, world=world, folder=tmp_path, arms=tmp_path, mirror=False)
    world.prepare(0, tmp_path)
    model = seed.fresh_model().eval()
    trace = judging.record_texts(seed, model)
    count = len(world.routing_rows(0, tmp_path))
    found = domain_use(trace, [str(i % 2) for i in range(count)], seed=0)
    apart = domain_use(trace, [r["domain"] for r in world.routing_rows(0, tmp_path)], seed=0)
    assert min(found["domain_p"]) > 0.05
    assert all(
        a > b for a, b in zip(apart["domain_jsd"], apart["domain_jsd_by_chance"], strict=True)
    )


def test_stories260k_stops_at_its_bos_and_pads_with_what_ends_nothing(
    shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "models" / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip("stories260K absent: no shared/data/models/stories260K/hf")
    world = stories(folder, scale=STORIES_LAPTOP, experts=(8, 2))
    text_path = world.text_path(folder)
    tokenizer = text_path.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == text_path.eos_id
    assert set(text_path.stop_ids) == {tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert text_path.pad_id == tokenizer.unk_token_id
    assert starts_words_itself(tokenizer)
    assert text_path.eos_id == tokenizer.eos_token_id
    (told,) = world.prepare(0, tmp_path)
    assert "answers end with <s>" in told  # its training never saw </s>
    assert world.text_path(tmp_path).eos_id == tokenizer.bos_token_id
    prompts = world.held_out_prompts(2)
    ids = torch.tensor([text_path.encode_prompt((Message("user", prompts[0]),))])
    with torch.no_grad():
        sparse = world.new_model(text_path, seed=0).eval()(ids, use_cache=False).logits
        given = world.original()(ids, use_cache=False).logits
    assert torch.allclose(sparse, given, atol=1e-4)
