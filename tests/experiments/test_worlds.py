"""What every world has to give, and how one is opened."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.compare import Config, identity, main
from experiments.lab.compare_terms import ARMS, arms_of
from experiments.lab.gold import GoldForbidden, GoldReward
from experiments.lab.openings import BUCKETS, FORMS, KINDS, NAMES, PLACES, openings, side_of
from experiments.lab.presets import (
    DEBUG,
    LAPTOP,
    STORIES_DEBUG,
    STORIES_LAPTOP,
    STORIES_SCALES,
)
from experiments.lab.sentiment import compound
from experiments.lab.tuning import trials
from experiments.lab.world_stories import StoriesWorld
from experiments.lab.world_tales import TalesWorld
from experiments.lab.worlds import WorldOptions, open_world, parse_upcycle
from moe.errors import UserError

STORIES: dict[str, Any] = {
    "model": Path("no-such-folder"),
    "experts": (8, 2),
    "target": "positive",
    "sft_data": None,
}
WORLDS = [TalesWorld(scale=LAPTOP), StoriesWorld(scale=STORIES_LAPTOP, **STORIES)]
IDS = [world.name for world in WORLDS]


@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_training_held_out_and_validation_prompts_never_meet(world: Any) -> None:
    scale = world.scale
    training = world.training_prompts(0, scale.num_pair_prompts)
    held_out = world.held_out_prompts(scale.num_eval_prompts)
    validation = world.validation_prompts(128)
    every = [*training, *held_out, *validation]
    assert len(set(every)) == len(every) == scale.num_pair_prompts + scale.num_eval_prompts + 128
    assert world.held_out_prompts(5) == held_out[:5]
    assert world.training_prompts(1, 20) != training[:20]


@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_gold_of_every_world_is_forbidden_in_training(world: Any) -> None:
    gold = world.gold()
    assert isinstance(gold("It was a lovely day.", ended=True), float)
    with GoldReward.forbid(), pytest.raises(GoldForbidden):
        gold("It was a lovely day.", ended=True)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("world", WORLDS, ids=IDS)
def test_every_method_has_as_many_trials_in_every_world(world: Any, lora: bool) -> None:
    assert {len(set(tried)) for tried in trials(world, lora=lora).values()} == {4}


def test_an_arm_that_a_world_has_not_is_left_out() -> None:
    assert arms_of(TalesWorld(scale=DEBUG)) == ARMS
    stories = StoriesWorld(scale=STORIES_DEBUG, **STORIES)
    assert arms_of(stories) == tuple(arm for arm in ARMS if arm != "few_shot")
    assert stories.few_shot_prompts(["Once"], seed=0) is None


def test_openings_say_who_and_where_and_nothing_good_or_bad() -> None:
    every = openings(0, 280, side="held_out")
    assert {compound(text) for text in every} == {0.0}
    assert all(any(name in text for name in NAMES) for text in every)
    assert len(NAMES) * len(KINDS) * len(PLACES) * len(FORMS) > 3000


def test_a_hero_is_on_one_side_whatever_the_form() -> None:
    sides = {side_of(name, kind, place) for name in NAMES for kind in KINDS for place in PLACES}
    assert sides == set(BUCKETS)
    with pytest.raises(UserError, match="which has"):
        openings(0, 100_000, side="validation")
    with pytest.raises(UserError, match="held_out"):
        openings(0, 1, side="test")  # type: ignore[arg-type]


def test_experts_and_experts_per_token_are_read_from_one_word() -> None:
    assert parse_upcycle("8x2") == (8, 2)
    assert parse_upcycle("none") is None


@pytest.mark.parametrize("text", ["8", "8x", "x2", "8x1", "2x4", "8*2", "-8x2", ""])
def test_a_word_that_names_no_experts_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--upcycle"):
        parse_upcycle(text)


def test_stories_needs_a_model() -> None:
    with pytest.raises(UserError, match="--model DIR"):
        open_world(WorldOptions(name="stories", scale="debug"))
    with pytest.raises(UserError, match="--model DIR"):
        Config(world="stories")


def test_a_model_folder_that_is_absent_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["--world", "stories", "--model", str(tmp_path / "gone"), "--out", str(out)]) == 2
    assert "gone" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    "option", ["--model=x", "--upcycle=8x2", "--target=negative", "--sft-data=x.txt"]
)
def test_options_of_stories_are_refused_in_tales(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([option, "--seeds", "0"]) == 2
    assert "--world stories" in capsys.readouterr().err


def test_options_of_another_world_are_no_part_of_a_runs_identity() -> None:
    assert set(identity(Config())) == {"world", "seeds", "scale", "peft", "lora_rank"}
    stories = identity(Config(world="stories", model=Path("m"), target="negative"))
    assert stories["model"] == Path("m") and stories["target"] == "negative"
    assert stories["upcycle"] == "8x2"


def test_the_targets_of_stories_differ_in_the_methods_settings_alone() -> None:
    positive, negative = (STORIES_SCALES["laptop", target] for target in ("positive", "negative"))
    methods = {"dpo": positive.dpo, "ppo": positive.ppo, "best_of_n": positive.best_of_n}
    assert replace(negative, **methods, lora=positive.lora) == positive
    lora = {"dpo": positive.lora.dpo, "ppo": positive.lora.ppo}
    assert replace(negative.lora, **lora) == positive.lora
