"""The gold of the world stories: VADER's score of a text, and who may ask for it."""

import sys

import pytest

from experiments.lab import sentiment
from experiments.lab.gold import GoldForbidden, GoldReward
from experiments.lab.sentiment import SentimentGold, compound, require_vader
from moe.errors import UserError

GLAD, SAD = "She was happy and they had a lovely day.", "He was sad and hurt, and it was awful."


def test_a_glad_text_scores_above_zero_a_sad_one_below_and_a_plain_one_at_zero() -> None:
    assert 0 < compound(GLAD) <= 1
    assert -1 <= compound(SAD) < 0
    assert compound("The dog sat near the pond.") == 0.0
    assert compound("") == 0.0


def test_negative_gold_is_minus_positive_gold() -> None:
    assert SentimentGold("positive")(GLAD) == compound(GLAD)
    assert SentimentGold("negative")(GLAD) == -compound(GLAD)
    with pytest.raises(UserError, match="positive or negative"):
        SentimentGold("neutral")  # type: ignore[arg-type]


def test_whether_a_text_ended_changes_nothing() -> None:
    gold = SentimentGold()
    assert gold(GLAD, ended=True) == gold(GLAD, ended=False)
    assert gold.num_calls == 2


def test_sentiment_is_gold_and_forbidden_where_gold_is() -> None:
    gold = SentimentGold()
    with GoldReward.forbid(), pytest.raises(GoldForbidden):
        gold(GLAD)
    assert gold.num_calls == 0
    assert gold(GLAD) > 0


def test_without_the_package_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    sentiment._analyzer.cache_clear()
    with pytest.raises(UserError, match="pip install 'vaderSentiment"):
        require_vader()
    monkeypatch.undo()
    require_vader()
