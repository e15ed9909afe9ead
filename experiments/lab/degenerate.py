"""Which methods gained by writing worse text: a rule over values per seed, fixed before the run.

A method is DEGENERATE if, in a seed in which it gained gold over SFT, its text's perplexity under
the original model is above 1.5 times that of SFT's text, or its distinct-2 is under 0.8 times
SFT's. One such seed is enough: a gain that collapses now and then is not a gain to rely on.
"""

from collections.abc import Mapping, Sequence

MAX_PERPLEXITY_RATIO = 1.5
MIN_DISTINCT_RATIO = 0.8
RULE = (
    "DEGENERATE: in a seed with more gold reward than SFT, perplexity under the original model "
    f"above {MAX_PERPLEXITY_RATIO} times SFT's, or distinct-2 under {MIN_DISTINCT_RATIO} times "
    "SFT's (which longer answers lower too)"
)

Values = Mapping[str, Sequence[float]]


def degenerate(
    arms: Mapping[str, Values], methods: Sequence[str], *, seeds: Sequence[int]
) -> dict[str, str]:
    """Arm -> why, for the methods that are. Values stand in the order of `seeds`."""
    found = {arm: _reason(arms[arm], arms["sft"], seeds) for arm in methods}
    return {arm: reason for arm, reason in found.items() if reason}


def _reason(arm: Values, sft: Values, seeds: Sequence[int]) -> str:
    gained = [i for i in range(len(seeds)) if arm["gold_reward"][i] > sft["gold_reward"][i]]
    perplexity = _ratios(arm, sft, "original_perplexity", gained)
    distinct = _ratios(arm, sft, "distinct_2", gained)
    high = {i: ratio for i, ratio in perplexity.items() if ratio > MAX_PERPLEXITY_RATIO}
    low = {i: ratio for i, ratio in distinct.items() if ratio < MIN_DISTINCT_RATIO}
    reasons = []
    if high:
        reasons.append(f"perplexity under the original model is {_told(high, seeds)} times SFT's")
    if low:
        reasons.append(f"distinct-2 is {_told(low, seeds)} times SFT's")
    return " and ".join(reasons)


def _ratios(arm: Values, sft: Values, metric: str, places: Sequence[int]) -> dict[int, float]:
    return {i: arm[metric][i] / sft[metric][i] for i in places if sft[metric][i] > 0}


def _told(ratios: Mapping[int, float], seeds: Sequence[int]) -> str:
    return ", ".join(f"{ratio:.2f} (seed {seeds[i]})" for i, ratio in ratios.items())
