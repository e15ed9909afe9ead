import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.lab import tales
from moe.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_there_are_at_least_four_thousand_distinct_prompts() -> None:
    every = [
        text
        for split in tales.SPLITS
        for text in tales.prompts(
            0, sum(4 * len(tales.combos(split, d)) for d in tales.ENGLISH_DOMAINS), split=split
        )
    ]
    assert len(every) == len(set(every)) >= 4000


def test_train_and_held_out_prompts_share_no_name_animal_and_place() -> None:
    train = {tales.parse_prompt(text) for text in tales.prompts(0, 2000)}
    held_out = {tales.parse_prompt(text) for text in tales.prompts(0, 400, split="held_out")}
    assert not train & held_out
    assert {combo.split for combo in train} == {"train"}
    assert {combo.split for combo in held_out} == {"held_out"}


def test_about_one_combo_in_eight_is_held_out() -> None:
    for domain in tales.TALE_DOMAINS:
        train, held_out = (len(tales.combos(split, domain)) for split in tales.SPLITS)
        assert 0.08 < held_out / (train + held_out) < 0.18


def test_a_shorter_list_of_prompts_is_the_beginning_of_a_longer_one() -> None:
    assert tales.prompts(3, 20) == tales.prompts(3, 50)[:20]
    assert tales.prompts(3, 20) != tales.prompts(4, 20)


@pytest.mark.parametrize("domain", tales.TALE_DOMAINS)
def test_a_tale_names_the_hero_the_animal_and_the_place_of_its_prompt(domain: str) -> None:
    for example in tales.sft_examples(1, 200, domains=[domain]):
        assert tales.parse_prompt(example.prompt).mentioned_in(example.answer)


def test_a_tale_of_another_hero_is_seen_to_leave_its_prompt() -> None:
    first, second = tales.combos("train", "tales_sea")[:2]
    assert not first.mentioned_in(tales.tale(second, random.Random(0)))


def test_a_tale_from_a_prompt_is_the_tale_from_its_combo() -> None:
    combo = tales.combos("train", "tales_town")[5]
    text = tales.ask(combo, 1)
    assert tales.tale(text, random.Random(7)) == tales.tale(combo, random.Random(7))


def test_english_tales_have_three_or_four_short_sentences_of_a_compact_vocabulary() -> None:
    answers = [example.answer for example in tales.sft_examples(0, 1000)]
    assert {answer.count(".") for answer in answers} == {3, 4}
    assert all(len(answer.split()) <= 36 for answer in answers)
    words = {word for answer in answers for word in re.findall(r"[a-z]+", answer.lower())}
    assert 120 <= len(words) <= 250


def test_an_goes_before_a_vowel_and_a_before_the_rest() -> None:
    texts = [text for d in tales.ENGLISH_DOMAINS for text in tales.documents(0, 300, domain=d)]
    joined = " ".join(texts + tales.prompts(0, 2000))
    assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", joined)
    assert " an o" in joined


def test_moods_keep_their_shares_and_cling_weakly_within_a_tale() -> None:
    moods = {
        word: mood
        for slot in tales.ENGLISH_WORDS.values()
        for mood, words in slot.items()
        for word in words
    }
    drawn = [
        [moods[word] for word in re.findall(r"[a-z]+", example.answer.lower()) if word in moods]
        for example in tales.sft_examples(0, 2000)
    ]
    flat = [mood for tale in drawn for mood in tale]
    for mood, share in tales.MOOD_SHARES.items():
        # 2,000 tales of about 4.5 slots: two standard errors are about 0.012.
        assert flat.count(mood) / len(flat) == pytest.approx(share, abs=0.02)
    agree = sum(tale[0] == tale[1] for tale in drawn) / len(drawn)
    by_chance = sum(share**2 for share in tales.MOOD_SHARES.values())
    assert by_chance + 0.03 < agree < by_chance + 0.16


def test_no_mood_word_has_two_moods_or_hides_in_another() -> None:
    for language in (tales.ENGLISH_WORDS, tales.CHINESE_WORDS):
        words = [w for slot in language.values() for mood in slot.values() for w in mood]
        assert len(words) == len(set(words))
    chinese = [w for slot in tales.CHINESE_WORDS.values() for mood in slot.values() for w in mood]
    assert not [(a, b) for a in chinese for b in chinese if a != b and a in b]


def test_plain_tales_are_told_in_sentences_that_no_answer_has() -> None:
    combo = tales.combos("train", "tales_forest")[0]
    plain = {tales.plain_tale(combo, random.Random(seed)).split(".")[0] for seed in range(50)}
    answers = {tales.tale(combo, random.Random(seed)).split(".")[0] for seed in range(50)}
    assert not plain & answers


def test_a_stated_share_of_tale_documents_shows_prompts_with_their_tales() -> None:
    texts = tales.documents(0, 1000, domain="tales_sea")
    share = sum(text.startswith("Prompt: ") for text in texts) / len(texts)
    assert share == pytest.approx(tales.PAIR_DOCUMENT_SHARE, abs=0.05)


@pytest.mark.parametrize("domain", [*tales.TALE_DOMAINS, "arithmetic", "lists"])
def test_documents_of_the_two_sides_are_disjoint_and_prefix_stable(domain: str) -> None:
    train = tales.documents(0, 400, domain=domain)
    held_out = tales.documents(0, 100, domain=domain, split="held_out")
    assert not set(train) & set(held_out)
    assert tales.documents(0, 30, domain=domain) == train[:30]


@pytest.mark.parametrize("domain", ["arithmetic", "lists"])
def test_no_held_out_sum_or_list_line_is_ever_in_training(domain: str) -> None:
    train = {line for text in tales.documents(0, 400, domain=domain) for line in text.split("\n")}
    held_out = tales.documents(0, 100, domain=domain, split="held_out")
    assert not train & {line for text in held_out for line in text.split("\n")}


def test_arithmetic_is_right() -> None:
    lines = "\n".join(tales.documents(2, 100, domain="arithmetic")).split("\n")
    for line in lines:
        match = re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)\.", line)
        assert match is not None
        first, second, result = int(match[1]), int(match[3]), int(match[4])
        assert result == (first + second if match[2] == "+" else first - second)


def test_lists_count_spell_and_sort() -> None:
    for line in "\n".join(tales.documents(2, 200, domain="lists")).split("\n"):
        kind, _, rest = line.rstrip(".").partition(": ")
        if kind == "Letters":
            letters = rest.split()
            assert [ord(b) - ord(a) for a, b in zip(letters, letters[1:], strict=False)] == [1] * (
                len(letters) - 1
            )
        elif kind == "Sort":
            given, _, ordered = rest.partition(" = ")
            assert ordered.split() == sorted(given.split())
        else:
            step = int(kind.removeprefix("Count by "))
            numbers = [int(number) for number in rest.split(", ")]
            assert numbers == list(range(numbers[0], numbers[0] + step * len(numbers), step))


def test_a_few_shot_prompt_shows_k_train_examples_of_other_heroes_and_ends_before_the_tale() -> (
    None
):
    prompt = tales.prompts(0, 1, split="held_out")[0]
    text = tales.few_shot_prompt(prompt, 3, rng=random.Random(0))
    lines = text.split("\n")
    assert len(lines) == 8
    assert lines[-2:] == [f"Prompt: {prompt}", "Tale:"]
    shown = [tales.parse_prompt(line.removeprefix("Prompt: ")) for line in lines[:-2:2]]
    assert {combo.split for combo in shown} == {"train"}
    assert tales.parse_prompt(prompt) not in shown
    assert all(combo.mentioned_in(line) for combo, line in zip(shown, lines[1:-2:2], strict=True))


def test_a_few_shot_prompt_of_no_examples_is_the_bare_frame() -> None:
    prompt = tales.prompts(0, 1)[0]
    text = tales.few_shot_prompt(prompt, 0, rng=random.Random(0))
    assert text == f"Prompt: {prompt}\nTale:"


def test_examples_repeat_a_prompt_only_after_all_others_had_a_turn() -> None:
    side = 2 * len(tales.combos("held_out", "tales_zh"))
    examples = tales.sft_examples(0, side + 5, split="held_out", domains=["tales_zh"])
    assert len({example.prompt for example in examples[:side]}) == side


def test_the_world_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = (
        "from experiments.lab import tales\n"
        "print(ascii((tales.prompts(5, 3), tales.sft_examples(5, 3),"
        " tales.documents(5, 3, domain='tales_zh'), tales.documents(5, 3, domain='lists'))))"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert printed[0] == printed[1]


def test_too_many_prompts_are_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"9999 prompts .* held_out side .* which has \d+"):
        tales.prompts(0, 9999, split="held_out")


def test_a_foreign_prompt_an_unknown_domain_and_an_unknown_split_are_refused() -> None:
    with pytest.raises(UserError, match="not a prompt of the world tales: 'Hello'"):
        tales.parse_prompt("Hello")
    with pytest.raises(UserError, match="no tale domain is called 'tales_moon'"):
        tales.documents(0, 1, domain="tales_moon")
    with pytest.raises(UserError, match="split is 'test'"):
        tales.documents(0, 1, domain="lists", split="test")  # type: ignore[arg-type]
