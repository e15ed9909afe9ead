"""What a reward model has to beat on the same pairs: a coin, the length, the words.

The decision to know: the rules read the whole answers as text, not the tokens that a length limit
leaves, so they are no weaker than the file allows. "Longer wins" is the usual suspicion, but some
files prefer the shorter answer; `length_rule` takes the direction that the training pairs show.

Shapes: B pairs.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.calibration import PairTokens, fit_bag_of_words
from rlhf.reward import RewardAccuracy, accuracy_of
from sft.data import rows_of_type
from sft.examples import Examples, Preference
from sft.rows import PreferenceCollator, PreferenceRow

# A run of letters and digits, a sign, or one Chinese character.
WORD = re.compile("[\u3400-\u9fff]|[^\\W\u3400-\u9fff]+|[^\\w\\s]")
LEAST_COUNT = 2  # training answers that a word is in; a rarer one says nothing about others


def baselines(train: Examples, held_out: Examples) -> dict[str, RewardAccuracy]:
    """Accuracy of each rule on the held-out pairs; what is learned is learned from `train`."""
    known, asked = (rows_of_type(Preference, side) for side in (train, held_out))
    longer_B = length_gaps(asked)
    direction = 1.0 if accuracy_of(length_gaps(known)).accuracy >= 0.5 else -1.0
    return {
        "longer_wins": accuracy_of(longer_B),
        "length_rule": accuracy_of(direction * longer_B),
        "bag_of_words": accuracy_of(word_gaps(known, asked)),
    }


def length_gaps(pairs: Sequence[Preference]) -> Tensor:
    """Characters of the chosen minus characters of the rejected answer, (B,) float64."""
    gaps = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    return torch.tensor(gaps, dtype=torch.float64)


def words_of(text: str) -> list[str]:
    return WORD.findall(text.lower())


def word_gaps(train: Sequence[Preference], held_out: Sequence[Preference]) -> Tensor:
    """Log-odds (B,) of a logistic regression on differences of word counts.

    Words are those of at least two training answers; the others count 0.
    """
    texts = [text for pair in train for text in (pair.chosen, pair.rejected)]
    seen = Counter(word for text in texts for word in set(words_of(text)))
    vocabulary = {
        word: i for i, word in enumerate(w for w in sorted(seen) if seen[w] >= LEAST_COUNT)
    }
    if not vocabulary:
        return torch.zeros(len(held_out), dtype=torch.float64)
    learned, asked = (
        PairTokens.of_batches([_counted(pairs, vocabulary)]) for pairs in (train, held_out)
    )
    return asked.bag_of_words(fit_bag_of_words(learned))


def _counted(pairs: Sequence[Preference], vocabulary: Mapping[str, int]) -> dict[str, Tensor]:
    """Pairs as a batch of the preference collator whose tokens are the known words."""

    def known(text: str) -> list[int]:
        return [vocabulary[word] for word in words_of(text) if word in vocabulary]

    rows: list[PreferenceRow] = [
        {
            "prompt_ids": [],
            "chosen_ids": known(pair.chosen),
            "rejected_ids": known(pair.rejected),
            "sample_id": i,
        }
        for i, pair in enumerate(pairs)
    ]
    return PreferenceCollator(pad_id=0)(rows)
