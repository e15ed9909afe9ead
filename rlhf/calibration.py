"""What a reward model is worth on held-out pairs: right, calibrated, and better than cheap rules.

The decision to know: the first answer of a pair is always the chosen one, so calibration is of the
answer that the model prefers: its probability max(p, 1 - p), p = sigma(margin), against how often
that answer is the chosen one. Measure before `normalize_reward` with a gain: after it a difference
of scores is no longer a log-odds. Nor is it after training with margins, which asks for more.

Shapes: B pairs, S sequence, T completion tokens, N (pair, token) that differ, V vocabulary.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from rlhf.losses import wins
from rlhf.reward import RewardAccuracy, accuracy_of, pair_gaps

NUM_BINS = 10  # of the calibration, with equally many pairs each
BARS_A_SIDE = 10  # of the margins' histogram


@dataclass(frozen=True, kw_only=True)
class CalibrationBin:
    """Pairs of similar confidence: the mean probability given to the preferred answer, and the
    share of them in which it was the chosen one (ties half). lowest, highest: the probabilities.
    """

    lowest: float
    highest: float
    predicted: float
    observed: float
    num_pairs: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Whether sigma(margin) is a probability.

    bins: at most 10 with equally many pairs each; equal probabilities share a bin. expected_error:
    |observed - predicted| averaged over pairs (ECE; Guo et al. 2017, eq. 3). chance_error: what a
    perfectly calibrated model would show on so few pairs, by the normal approximation. brier: mean
    (1 - p)^2 and log_loss: mean -ln p of the chosen answer's p; a coin has 0.25 and ln 2.
    """

    bins: tuple[CalibrationBin, ...]
    expected_error: float
    chance_error: float
    brier: float
    log_loss: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """counts[i] lie in [edges[i], edges[i + 1]), the last one closed; symmetric about 0."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A rule without a reward model on the same pairs, and the reward model against it.

    difference: the reward model's accuracy minus the rule's. better, worse: pairs on which the
    reward model does better and worse. p_value: exact two-sided sign test on those (McNemar).
    """

    accuracy: RewardAccuracy
    difference: float
    better: int
    worse: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class RewardReport:
    """A reward model on held-out pairs.

    by_length: accuracy where the chosen or the rejected answer is longer (in tokens), or neither,
    as far as they occur: a model that counts words is good at the first and bad at the second.
    baselines: "coin"; "longer" (the longer answer wins); "bag_of_words" where there were training
    pairs. A baseline's `margin` is in its own unit (tokens, log-odds).
    """

    accuracy: RewardAccuracy
    calibration: Calibration
    margins: Histogram
    by_length: Mapping[str, RewardAccuracy]
    baselines: Mapping[str, Baseline]

    def lines(self) -> list[str]:
        """What to print: calibration, lengths and each baseline in a line."""
        found = self.calibration
        lengths = ", ".join(
            f"{name.replace('_', ' ')} {part.accuracy:.3f} of {part.num_pairs}"
            for name, part in self.by_length.items()
        )
        return [
            f"calibration error {found.expected_error:.3f} (a calibrated model: about "
            f"{found.chance_error:.3f}), log loss {found.log_loss:.3f} (a coin: 0.693), Brier "
            f"{found.brier:.3f} (0.25)",
            f"accuracy by length: {lengths}",
            *(
                f"against {name.replace('_', ' ')} {told(baseline.accuracy)}: "
                f"{baseline.difference:+.3f}, better on {baseline.better} and worse on "
                f"{baseline.worse} pairs, p = {baseline.p_value:.2g}"
                for name, baseline in self.baselines.items()
            ),
        ]


def told(accuracy: RewardAccuracy) -> str:
    """`0.812 [0.744, 0.866]`."""
    return f"{accuracy.accuracy:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}]"


def measure_reward(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    train_batches: Iterable[Mapping[str, Tensor]] | None = None,
) -> RewardReport:
    """The report over held-out batches of the preference collator.

    train_batches: the pairs it was trained on, for the bag-of-words baseline. Raises ValueError
    without held-out pairs.
    """
    gap_B = pair_gaps(model, batches).cpu()
    held_out = PairTokens.of_batches(batches)
    rules = {"coin": torch.zeros_like(gap_B), "longer": held_out.longer_B}
    if train_batches is not None:
        weight_V = fit_bag_of_words(PairTokens.of_batches(train_batches))
        rules["bag_of_words"] = held_out.bag_of_words(weight_V)
    return RewardReport(
        accuracy=accuracy_of(gap_B),
        calibration=calibration_of(gap_B),
        margins=histogram_of(gap_B),
        by_length={
            name: accuracy_of(gap_B[mask_B])
            for name, mask_B in {
                "chosen_longer": held_out.longer_B > 0,
                "rejected_longer": held_out.longer_B < 0,
                "same_length": held_out.longer_B == 0,
            }.items()
            if mask_B.any()
        },
        baselines={name: compare(gap_B, rule_B) for name, rule_B in rules.items()},
    )


def calibration_of(gap_B: Tensor, *, num_bins: int = NUM_BINS) -> Calibration:
    """gap_B (B,), B > 0: log-odds that the chosen answer is preferred."""
    gap_B = gap_B.double()
    preferred_B, right_B = gap_B.abs().sigmoid(), wins(gap_B)
    # By the rank of the first equal one: then the order of the rows plays no part.
    rank_B = torch.searchsorted(preferred_B.sort().values, preferred_B)
    bin_B = rank_B * min(num_bins, len(gap_B)) // len(gap_B)
    bins, error, chance = [], 0.0, 0.0
    for index in bin_B.unique():
        p_n, right_n = preferred_B[bin_B == index], right_B[bin_B == index]
        bins.append(
            CalibrationBin(
                lowest=float(p_n.min()),
                highest=float(p_n.max()),
                predicted=float(p_n.mean()),
                observed=float(right_n.mean()),
                num_pairs=len(p_n),
            )
        )
        error += abs(float(right_n.sum() - p_n.sum())) / len(gap_B)
        # The mean distance of a normal from its mean is sqrt(2 / pi) standard deviations.
        spread = float((p_n * (1 - p_n)).sum()) ** 0.5
        chance += math.sqrt(2 / math.pi) * spread / len(gap_B)
    return Calibration(
        bins=tuple(bins),
        expected_error=error,
        chance_error=chance,
        brier=float((1 - gap_B.sigmoid()).square().mean()),
        log_loss=float(softplus(-gap_B).mean()),
    )


def histogram_of(gap_B: Tensor, *, bars_a_side: int = BARS_A_SIDE) -> Histogram:
    """Counts of margins in equally wide bars from -max |margin| to max |margin|; ties above 0."""
    gap_B = gap_B.double()
    widest = float(gap_B.abs().max()) or 1.0
    edges = torch.arange(-bars_a_side, bars_a_side + 1, dtype=torch.float64) / bars_a_side * widest
    bar_B = (torch.bucketize(gap_B, edges, right=True) - 1).clamp(0, 2 * bars_a_side - 1)
    counts = torch.bincount(bar_B, minlength=2 * bars_a_side)
    return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


def compare(gap_B: Tensor, rule_gap_B: Tensor) -> Baseline:
    """The reward model's gaps against a rule's on the same pairs."""
    model_B, rule_B = wins(gap_B.double()), wins(rule_gap_B.double())
    better, worse = int((model_B > rule_B).sum()), int((model_B < rule_B).sum())
    return Baseline(
        accuracy=accuracy_of(rule_gap_B),
        difference=float((model_B - rule_B).mean()),
        better=better,
        worse=worse,
        p_value=sign_test(better, worse),
    )


def sign_test(better: int, worse: int) -> float:
    """Two-sided probability of a split at least this uneven when both sides are equally likely.

    Exact: 2 P(X >= max) for X ~ Binomial(better + worse, 1/2), at most 1.
    """
    trials, most = better + worse, max(better, worse)
    ways, tail = 1, 0  # ways to choose k of the trials, from k = trials down to `most`
    for k in range(trials, most - 1, -1):
        tail += ways
        ways = ways * k // (trials - k + 1)
    return min(1.0, 2 * tail / 2**trials)


# Bag of words: what the tokens alone tell, without their order.


@dataclass(frozen=True, kw_only=True)
class PairTokens:
    """What the completions of B pairs differ in, as a sparse matrix.

    pair_N, token_N: where; more_N: how often the token is in the chosen completion minus how often
    it is in the rejected one, float64, never 0.
    """

    pair_N: Tensor
    token_N: Tensor
    more_N: Tensor
    num_pairs: int

    @classmethod
    def of_batches(cls, batches: Iterable[Mapping[str, Tensor]]) -> "PairTokens":
        places, signs, count = [], [], 0
        for batch in batches:
            mask_BS = batch["completion_mask"].cpu().bool()
            size = len(mask_BS) // 2
            row_T = mask_BS.nonzero()[:, 0]
            places.append(torch.stack([count + row_T % size, batch["input_ids"].cpu()[mask_BS]]))
            signs.append(torch.where(row_T < size, 1.0, -1.0).double())
            count += size
        if not count:
            raise ValueError("no pairs to learn or to measure a bag of words on")
        sums = torch.sparse_coo_tensor(
            torch.cat(places, dim=1), torch.cat(signs), check_invariants=True
        ).coalesce()
        differs = sums.values() != 0
        pair_N, token_N = sums.indices()[:, differs]
        return cls(pair_N=pair_N, token_N=token_N, more_N=sums.values()[differs], num_pairs=count)

    @property
    def longer_B(self) -> Tensor:
        """Tokens of the chosen minus tokens of the rejected completion, (B,) float64."""
        return torch.zeros(self.num_pairs).double().index_add(0, self.pair_N, self.more_N)

    def bag_of_words(self, weight_V: Tensor) -> Tensor:
        """The log-odds (B,) float64; a token that the weights do not know counts 0."""
        is_known_N = self.token_N < len(weight_V)
        # index_select, because the order of its backward's sums is fixed.
        weight_N = weight_V.index_select(0, self.token_N * is_known_N)
        value_N = self.more_N * is_known_N * weight_N
        return torch.zeros(self.num_pairs).double().index_add(0, self.pair_N, value_N)


def fit_bag_of_words(pairs: PairTokens) -> Tensor:
    """Weights (V,) float64 of a logistic regression on differences of token counts.

    Minimises sum_B -ln sigma(w x) + |w|^2 / 2, x = counts in chosen - counts in rejected: no
    intercept (swapping the answers swaps the sign), and the penalty that libraries call C = 1. It
    is convex, so L-BFGS from 0 finds the one minimum (to a largest gradient of 1e-5).
    """
    size = int(pairs.token_N.max()) + 1 if len(pairs.token_N) else 1
    weight_V = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight_V],
        max_iter=200,
        tolerance_grad=1e-5,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = softplus(-pairs.bag_of_words(weight_V)).sum() + 0.5 * weight_V.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(objective)
    return weight_V.detach()
