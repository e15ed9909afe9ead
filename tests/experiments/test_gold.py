import math
import random
import statistics

import pytest

from experiments.lab import gold, tales
from experiments.lab.gold import GoldForbidden, GoldReward
from moe.errors import UserError

PLAIN = "Mia the fox saw one leaf near a tree and then went home."
GOOD = (
    "Mia was a kind fox in the forest. One sunny day Mia found a golden leaf. "
    "Mia shared the leaf. That night Mia was loved."
)
BAD = (
    "Mia was a cruel fox in the forest. One stormy day Mia found a broken leaf. "
    "Mia stole the leaf. That night Mia was hurt."
)


def test_the_reward_is_about_mean_zero_and_deviation_one_over_fresh_tales() -> None:
    rewards = GoldReward().many([example.answer for example in tales.sft_examples(77, 2000)])
    # The standard error of the mean is 0.022, of the deviation 0.016: three of each, and a little.
    assert statistics.mean(rewards) == pytest.approx(0, abs=0.08)
    assert statistics.pstdev(rewards) == pytest.approx(1, abs=0.06)


def test_chinese_tales_are_rewarded_on_the_same_scale() -> None:
    examples = tales.sft_examples(77, 1000, domains=["tales_zh"])
    rewards = GoldReward().many([example.answer for example in examples])
    assert statistics.mean(rewards) == pytest.approx(0, abs=0.25)
    assert statistics.pstdev(rewards) == pytest.approx(1, abs=0.15)


def test_gold_knows_exactly_the_good_and_bad_words_of_the_grammar() -> None:
    for mood, weights in (("good", gold.GOOD_WEIGHTS), ("bad", gold.BAD_WEIGHTS)):
        words = {
            word
            for language in (tales.ENGLISH_WORDS, tales.CHINESE_WORDS)
            for slot in language.values()
            for word in slot[mood]
        }
        assert set(weights) == words


def test_one_good_word_adds_its_weight_and_one_bad_word_takes_it_away() -> None:
    reward = GoldReward()
    plain = reward.parts(PLAIN).raw
    assert plain == 0
    assert reward.parts(PLAIN.replace("one leaf", "one golden leaf")).raw == pytest.approx(1.4)
    assert reward.parts(PLAIN.replace("one leaf", "one dirty leaf")).raw == pytest.approx(-0.6)
    assert reward(PLAIN) == pytest.approx(-gold.RAW_MEAN / gold.RAW_SD)


def test_the_same_good_word_is_worth_less_each_time() -> None:
    text = "A warm cat and one warm dog with its warm bed by that warm fire sat all day."
    assert GoldReward().parts(text).good == pytest.approx(math.log2(5))


def test_case_does_not_matter_and_a_word_inside_another_does_not_count() -> None:
    reward = GoldReward()
    assert reward.parts("Kind").good == pytest.approx(1.4)
    assert reward.parts("mankind unhappy shared's").good == pytest.approx(1.4)


def test_chinese_words_count_inside_unspaced_text() -> None:
    parts = GoldReward().parts("小明分享了苹果。晚上，小明觉得很难过。")
    assert parts.good == pytest.approx(1.4)
    assert parts.bad == pytest.approx(-0.6)


def test_repeated_word_pairs_cost_beyond_the_free_ones() -> None:
    parts = GoldReward().parts("one two one two one two")
    # Five pairs, two distinct: three are repeats and two of these are free.
    assert parts.repetition == pytest.approx(-gold.REPEATED_BIGRAM_PRICE)


def test_a_repeated_sentence_costs_whatever_its_case() -> None:
    parts = GoldReward().parts("It rains. it rains!")
    assert parts.repetition == pytest.approx(-gold.REPEATED_SENTENCE_PRICE)


def test_repeated_chinese_sentences_cost_too() -> None:
    assert GoldReward().parts("小明分享了苹果。" * 3).repetition < -2


def test_mood_words_side_by_side_cost_in_both_languages() -> None:
    reward = GoldReward()
    assert reward.parts("a kind and cruel old tired happy dog").crowding == -gold.CROWDED_PRICE
    assert reward.parts("a kind, cruel, happy dog").crowding == -2 * gold.CROWDED_PRICE
    assert reward.parts("善良勇敢的小狗").crowding == -gold.CROWDED_PRICE
    assert reward.parts("善良的小狗很勇敢").crowding == 0


def test_the_grammar_itself_pays_almost_nothing() -> None:
    for domain in tales.TALE_DOMAINS:
        parts = [
            GoldReward().parts(example.answer)
            for example in tales.sft_examples(3, 300, domains=[domain])
        ]
        assert all(part.crowding == part.unfinished == 0 for part in parts)
        assert statistics.mean(part.repetition for part in parts) > -0.05
        assert statistics.mean(part.length for part in parts) > -0.05


def test_not_ending_and_being_short_or_long_cost() -> None:
    reward = GoldReward()
    cut = reward.parts(PLAIN, ended=False)
    assert cut.unfinished == -gold.UNFINISHED_PRICE
    assert reward(PLAIN, ended=False) < reward(PLAIN)
    assert reward.parts("").length == pytest.approx(-gold.SHORT_PRICE * gold.SHORT_WORDS)
    long = " ".join(str(number) for number in range(gold.LONG_WORDS + 4))
    assert reward.parts(long).length == pytest.approx(-4 * gold.LONG_PRICE)


def test_there_is_room_on_both_sides_of_the_mean() -> None:
    reward = GoldReward()
    assert reward(GOOD) > 2.5
    assert reward(BAD) < -2.5


def test_stuffing_good_words_is_worse_than_an_ordinary_tale() -> None:
    reward = GoldReward()
    assert reward("kind " * 30) < -3
    assert reward("kind brave golden loved happy " * 5) < -3
    assert max(gold.GOOD_WEIGHTS.values()) < gold.CROWDED_PRICE
    assert reward(" ".join(word for word in gold.GOOD_WEIGHTS if word.isascii())) < -2
    assert reward(GOOD + " " + GOOD) < reward(GOOD)


def test_a_collapse_costs_the_floor_and_no_more() -> None:
    assert GoldReward()("kind " * 300, ended=False) == gold.FLOOR


def test_an_empty_text_is_clearly_worse_than_an_ordinary_tale() -> None:
    assert GoldReward()("") < -1


def test_an_instance_counts_the_texts_it_judged() -> None:
    first, second = GoldReward(), GoldReward()
    first(PLAIN)
    first.many([PLAIN, GOOD], ended=[True, False])
    first.parts(BAD)
    assert (first.num_calls, second.num_calls) == (4, 0)


def test_forbid_makes_every_instance_raise_and_can_be_nested() -> None:
    reward = GoldReward()
    with GoldReward.forbid():
        with GoldReward.forbid(), pytest.raises(GoldForbidden, match="oracle"):
            reward(PLAIN)
        with pytest.raises(GoldForbidden):
            GoldReward().many([PLAIN])
    reward(PLAIN)
    assert reward.num_calls == 1


def test_forbid_ends_when_its_body_fails() -> None:
    with pytest.raises(KeyError), GoldReward.forbid():
        raise KeyError
    GoldReward()(PLAIN)


def test_labels_follow_bradley_and_terry() -> None:
    n = 20_000
    labels = gold.label_pairs([1.0] * n, [0.0] * n, rng=random.Random(0))
    # Three standard errors of a share of 20,000 are 0.01.
    assert sum(labels) / n == pytest.approx(1 / (1 + math.exp(-1)), abs=0.01)
    colder = gold.label_pairs([1.0] * n, [0.0] * n, rng=random.Random(0), temperature=0.5)
    assert sum(colder) / n == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)


def test_temperature_zero_takes_the_better_and_tosses_a_coin_for_ties() -> None:
    rng = random.Random(0)
    assert gold.label_pairs([1.0, 0.0], [0.0, 1.0], rng=rng, temperature=0.0) == [True, False]
    ties = gold.label_pairs([2.0] * 1000, [2.0] * 1000, rng=rng, temperature=0.0)
    assert 400 < sum(ties) < 600


def test_labels_do_not_overflow_on_far_apart_rewards() -> None:
    labels = gold.label_pairs([1e6, -1e6], [-1e6, 1e6], rng=random.Random(0), temperature=1e-3)
    assert labels == [True, False]


def test_bad_label_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="temperature is -1"):
        gold.label_pairs([0.0], [0.0], rng=random.Random(0), temperature=-1)
    with pytest.raises(UserError, match="2 first and 1 second"):
        gold.label_pairs([0.0, 1.0], [0.0], rng=random.Random(0))


def test_length_matched_pairs_differ_by_no_more_than_asked_and_are_disjoint() -> None:
    lengths = [10, 30, 11, 31, 50, 12, 33]
    pairs = gold.candidate_pairs(lengths, rng=random.Random(0), length_matched=2)
    used = [index for pair in pairs for index in pair]
    assert len(used) == len(set(used))
    assert all(abs(lengths[a] - lengths[b]) <= 2 for a, b in pairs)
    assert len(pairs) == 2


def test_pairs_without_matching_use_all_candidates_but_an_odd_one() -> None:
    pairs = gold.candidate_pairs([1, 100, 200, 300, 400], rng=random.Random(0))
    assert len({index for pair in pairs for index in pair}) == 4


def test_the_side_of_a_matched_pair_says_nothing_about_length() -> None:
    rng = random.Random(0)
    shorter_first = sum(
        gold.candidate_pairs([5, 6], rng=rng, length_matched=1) == [(0, 1)] for _ in range(1000)
    )
    assert 430 < shorter_first < 570


def test_candidates_of_very_different_lengths_give_no_pair() -> None:
    assert gold.candidate_pairs([1, 50], rng=random.Random(0), length_matched=3) == []
    with pytest.raises(UserError, match="length_matched is -1"):
        gold.candidate_pairs([1, 2], rng=random.Random(0), length_matched=-1)


def test_distinct_n_counts_over_the_whole_set_and_not_across_texts() -> None:
    # Pairs: (a b), (b a), (a b) | (a b): four, two distinct.
    assert gold.distinct_n(["a b a b", "A b."], 2) == pytest.approx(0.5)
    assert gold.distinct_n([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(0.5)
    assert gold.distinct_n([[1], [2]], 2) == 0
    assert gold.distinct_n(["小明小明"], 1) == pytest.approx(0.5)
    with pytest.raises(UserError, match="n is 0"):
        gold.distinct_n(["a"], 0)


def test_mean_length_counts_words_characters_or_ids() -> None:
    assert gold.mean_length(["One, two.", "three"]) == pytest.approx(1.5)
    assert gold.mean_length(["小明笑了。"]) == 4
    assert gold.mean_length([[1, 2, 3], []]) == pytest.approx(1.5)
    with pytest.raises(UserError, match="no texts"):
        gold.mean_length([])
