"""How positive a text is, by VADER's word list and rules: the gold of the world `stories`.

The only file that imports vaderSentiment (Hutto and Gilbert 2014, "VADER: a parsimonious rule-based
model for sentiment analysis of social media text"). Its compound score lies between -1 and 1 and
needs no network. The decision to know: the completion alone is scored, so an opening cannot lend
its words to every answer.
"""

from functools import cache
from typing import Any, Literal

from experiments.lab.gold import GoldReward
from moe.errors import UserError

Target = Literal["positive", "negative"]


@cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(
            "The world stories scores sentiment with the package vaderSentiment, which is not "
            "installed: install it by pip install 'vaderSentiment>=3.3.2,<4', or the extra vader."
        ) from error
    return SentimentIntensityAnalyzer()


def require_vader() -> None:
    """Raises UserError, in one sentence, if the package is absent."""
    _analyzer()


def compound(text: str) -> float:
    """VADER's compound score, -1 (most negative) to 1; 0 for a text without any known word."""
    return float(_analyzer().polarity_scores(text)["compound"])


class SentimentGold:
    """Gold reward of a completion's text: its compound score, or minus it for `negative`.

    Whether the text ended is no part of sentiment and changes nothing. Forbidden inside
    `GoldReward.forbid()` like all gold. `num_calls` counts the texts judged by this instance.
    """

    def __init__(self, target: Target = "positive") -> None:
        if target not in ("positive", "negative"):
            raise UserError(f"target is {target!r}; it must be positive or negative.")
        self.sign = 1.0 if target == "positive" else -1.0
        self.num_calls = 0

    def __call__(self, text: str, *, ended: bool = True) -> float:
        GoldReward.require_allowed()
        self.num_calls += 1
        return self.sign * compound(text)
