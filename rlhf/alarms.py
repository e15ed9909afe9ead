"""What goes wrong in alignment, as alarms: a policy against a reward, and a policy on pairs.

The decision to know: text is judged without a further pass. An answer's perplexity under the
reference is exp(entropy of the policy + KL to the reference per token), because the mean of
-log reference over the policy's own tokens is the sum of the two.

"Committed runs" are the 33 PPO and 38 DPO runs below results/compare; in one of the PPO runs, seed
100 of the positive stories with full updates, the text is lost beyond doubt: "the lost one".
"""

import math
from collections.abc import Callable, Mapping

from sft.alarms import COMMON, ROWS, TOKENS, Alarm, Read, Window

EPISODES = 32  # a window of a mean over answers
PAIRS = 32

Windows = Mapping[str, Window]


def episodes(metric: str) -> Read:
    return Read(metric=metric, units=EPISODES)


def tokens(metric: str) -> Read:
    return Read(metric=metric, units=TOKENS)


def pairs(metric: str) -> Read:
    return Read(metric=metric, units=PAIRS)


def rows(metric: str) -> Read:
    return Read(metric=metric, units=ROWS)


# Statistics: the larger, the worse.


def now(metric: str) -> Callable[[Windows], float | None]:
    return lambda windows: windows[metric].now


def times_more(metric: str) -> Callable[[Windows], float | None]:
    """Now over start."""
    return lambda windows: _over(windows[metric].now, windows[metric].start)


def times_less(metric: str) -> Callable[[Windows], float | None]:
    """Start over now."""
    return lambda windows: _over(windows[metric].start, windows[metric].now)


def _over(large: float, small: float) -> float | None:
    """None unless there is something to compare with; infinite over nothing."""
    if large <= 0:
        return None
    return large / small if small > 0 else math.inf


def _growth(metric: str) -> Callable[[Windows], float | None]:
    """Now over start, of a metric that has to be something at the start."""

    def measure(windows: Windows) -> float | None:
        held = windows[metric]
        return held.now / held.start if held.start > 0 else None

    return measure


def _kl_per_token(windows: Windows) -> float | None:
    return windows["policy/kl_sequence"].now / max(windows["rollout/length"].now, 1.0)


def _minus_kl(windows: Windows) -> float | None:
    return -windows["policy/kl_sequence"].now


def _critic_error(windows: Windows) -> float | None:
    return 1 - windows["value/explained_variance"].now


def reference_nats(windows: Windows, *, at: str) -> float:
    """Nats per token of the policy's answers under the reference, at `start` or `now`."""
    entropy, kl, length = (
        float(getattr(windows[name], at))
        for name in ("policy/entropy", "policy/kl_sequence", "rollout/length")
    )
    return entropy + kl / max(length, 1.0)


def _gains(windows: Windows) -> bool:
    """Whether the score has risen by more than 3 standard errors."""
    score = windows["reward/score"]
    return score.now - score.start > 3 * score.noise


def _stranger(windows: Windows) -> float | None:
    nats = reference_nats(windows, at="now") - reference_nats(windows, at="start")
    return math.exp(min(nats, 700.0)) if _gains(windows) else None


def _fewer(metric: str) -> Callable[[Windows], float | None]:
    """Start over now, while the score rises."""
    less = times_less(metric)
    return lambda windows: less(windows) if _gains(windows) else None


def _displacement(windows: Windows) -> float | None:
    """Of the chosen answers' log-probability, where the margin grows all the same."""
    chosen, good, bad = (
        windows[name] for name in ("logp/chosen", "reward/chosen", "reward/rejected")
    )
    fall = chosen.start - chosen.now
    grows = good.now - bad.now > good.start - bad.start
    if chosen.start >= 0 or not grows or fall < 4 * chosen.noise:
        return None
    return fall / -chosen.start


KL_BLOW_UP = Alarm(
    name="kl_blow_up",
    reads=(episodes("policy/kl_sequence"), episodes("rollout/length")),
    measure=_kl_per_token,
    statistic="policy/kl_sequence per response token, in nats",
    threshold=1.0,
    readings=2,
    source="Huang et al. 2024 (N+): at 50 nats over 53 tokens a 1B policy was preferred in under "
    "a fifth of cases; committed runs: 0.57 at most, the lost one 1.6",
    remedy="Raise --kl-coef or give --kl-target; lower lr; go on from an earlier checkpoint.",
)
KL_NEGATIVE = Alarm(
    name="kl_negative",
    reads=(episodes("policy/kl_sequence"),),
    measure=_minus_kl,
    statistic="minus policy/kl_sequence, in nats",
    threshold=0.5,
    readings=2,
    source="a mean of log-ratios of the policy's own draws is a KL, never below 0 but by noise",
    remedy="What is sampled is not the policy that is measured: look at rollout/logp_mismatch, at "
    "the temperature and at the rollout engine.",
)
ENTROPY_COLLAPSE = Alarm(
    name="entropy_collapse",
    reads=(tokens("policy/entropy"),),
    measure=times_less("policy/entropy"),
    statistic="policy/entropy at the start over now",
    threshold=4.0,
    source="committed runs: 2.5 at most, the lost one 5.9",
    remedy="Raise --kl-coef, add --entropy-coef, lower lr, or make fewer --ppo-epochs.",
)
LENGTH_EXPLOSION = Alarm(
    name="length_explosion",
    reads=(episodes("rollout/length"),),
    measure=_growth("rollout/length"),
    statistic="rollout/length now over the start",
    threshold=2.0,
    readings=2,
    source="twice the length is no longer the task's answer; committed runs: 1.3 at most",
    remedy="Check whether the reward pays for length (accuracy by length in the reward model's "
    "report); use --missing-eos-penalty; raise --kl-coef.",
)
LENGTH_COLLAPSE = Alarm(
    name="length_collapse",
    reads=(episodes("rollout/length"),),
    measure=times_less("rollout/length"),
    statistic="rollout/length at the start over now",
    threshold=3.0,
    readings=2,
    source="committed runs: 1.8 at most, but for one reading of 3.2 and the lost one with 11",
    remedy="Check whether the reward pays for short answers or the KL is dear: --kl-coef is paid "
    "per token; lower lr.",
)
ENDINGS_LOST = Alarm(
    name="endings_lost",
    reads=(episodes("rollout/ended"),),
    measure=times_less("rollout/ended"),
    statistic="rollout/ended at the start over now",
    threshold=2.0,
    readings=2,
    source="half the answers that ended are cut: the length cannot tell beyond --max-new-tokens",
    remedy="Give --missing-eos-penalty or --missing-eos-replace, or more --max-new-tokens.",
)
VALUE_DIVERGENCE = Alarm(
    name="value_divergence",
    reads=(tokens("value/loss"),),
    measure=_growth("value/loss"),
    statistic="value/loss now over the start",
    threshold=5.0,
    source="a critic starts badly and its loss falls (committed runs: always), unless "
    "returns explode",
    remedy="Lower --critic-lr-scale, scale the scores (--score-scaling running, --score-clip), or "
    "give --critic-warmup.",
)
USELESS_CRITIC = Alarm(
    name="useless_critic",
    reads=(rows("value/explained_variance"), episodes("rollout/length")),
    measure=_critic_error,
    statistic="1 - value/explained_variance: the critic's squared error over the variance",
    threshold=2.0,
    readings=8,
    source="1 is a critic that says the mean; committed runs: one was above 2, not for 8 readings",
    remedy="Give --critic-warmup, raise --critic-lr-scale, or leave the critic out (--method "
    "rloo).",
)
REWARD_HACKING = Alarm(
    name="reward_hacking",
    reads=(
        *(episodes("reward/score"), episodes("policy/kl_sequence"), episodes("rollout/length")),
        tokens("policy/entropy"),
    ),
    measure=_stranger,
    statistic="perplexity of the answers under the reference, now over the start, while "
    "reward/score is 3 standard errors up",
    threshold=1.5,
    readings=2,
    source="the limit by which experiments/lab/degenerate.py calls a gain degenerate",
    remedy="Read samples before you believe the score; raise --kl-coef, stop earlier, or train the "
    "reward model on answers of this policy.",
)
REWARD_HACKING_REPETITION = Alarm(
    name="reward_hacking_repetition",
    reads=(episodes("reward/score"), episodes("rollout/distinct_2")),
    measure=_fewer("rollout/distinct_2"),
    statistic="rollout/distinct_2 at the start over now, while reward/score is 3 standard errors "
    "up",
    threshold=1.25,
    readings=2,
    source="the limit by which experiments/lab/degenerate.py calls a gain degenerate (0.8 times); "
    "longer answers lower distinct-2 too",
    remedy="Read samples before you believe the score; raise --kl-coef, add --entropy-coef, or "
    "stop earlier.",
)
REWARD_HACKING_ENDINGS = Alarm(
    name="reward_hacking_endings",
    reads=(episodes("reward/score"), episodes("rollout/ended")),
    measure=_fewer("rollout/ended"),
    statistic="rollout/ended at the start over now, while reward/score is 3 standard errors up",
    threshold=2.0,
    readings=2,
    source="as endings_lost: the score is paid for answers that do not end",
    remedy="Read samples before you believe the score; give --missing-eos-penalty, or a reward "
    "that does not pay for length.",
)
STEP_TOO_LARGE = Alarm(
    name="step_too_large",
    reads=(tokens("policy/approx_kl_k3"),),
    measure=now("policy/approx_kl_k3"),
    statistic="policy/approx_kl_k3, from the policy that drew to the one that learns, in nats",
    threshold=0.2,
    source="ten times 0.02, a usual target of public code; committed runs: 0.16 at most after the "
    "first update",
    remedy="Lower lr, make fewer --ppo-epochs, or give --target-kl.",
)
CLIPPED = Alarm(
    name="clipped",
    reads=(tokens("policy/clip_fraction"),),
    measure=now("policy/clip_fraction"),
    statistic="policy/clip_fraction",
    threshold=0.3,
    source="committed runs: 0.07 at most; GSPO's paper, whose bounds are tight, reports 0.15",
    remedy="Most of what was drawn teaches nothing: lower lr, fewer --ppo-epochs or more "
    "--episodes.",
)
ROLLOUT_MISMATCH = Alarm(
    name="rollout_mismatch",
    reads=(rows("rollout/logp_mismatch"),),
    measure=now("rollout/logp_mismatch"),
    statistic="rollout/logp_mismatch, the largest of a row's tokens, in nats",
    threshold=math.log(2),
    source="a factor of 2, where importance weights are usually cut off; float32 here: 1e-5",
    remedy="Draw in the numerics that train (dtype, attention, batch-invariant routing), or replay "
    "the routing.",
)
ROLLOUT_FLIPS = Alarm(
    name="rollout_flips",
    reads=(rows("router/flip_rate_rollout"),),
    measure=now("router/flip_rate_rollout"),
    statistic="router/flip_rate_rollout",
    threshold=0.05,
    source="Ma et al. 2025 (R3, arxiv.org/abs/2510.11370): runs with a tenth of flips collapsed",
    remedy="Replay the rollout's routing, keep the router in float32, or draw in the numerics that "
    "train.",
)
NO_GROUP_SIGNAL = Alarm(
    name="no_group_signal",
    reads=(episodes("reward/equal_groups"),),
    measure=now("reward/equal_groups"),
    statistic="reward/equal_groups",
    threshold=0.9,
    source="groups with one score teach the KL alone where the reward pays it (at full weight if "
    "a deviation is divided by), and nothing where the loss does",
    remedy="Take prompts of another difficulty, a finer reward, more --group-size or a higher "
    "--temperature.",
)
POLICY = (
    *COMMON,
    *(KL_BLOW_UP, KL_NEGATIVE, ENTROPY_COLLAPSE, LENGTH_EXPLOSION, LENGTH_COLLAPSE, ENDINGS_LOST),
    *(VALUE_DIVERGENCE, USELESS_CRITIC, REWARD_HACKING, REWARD_HACKING_REPETITION),
    *(REWARD_HACKING_ENDINGS, STEP_TOO_LARGE, CLIPPED, ROLLOUT_MISMATCH, ROLLOUT_FLIPS),
    NO_GROUP_SIGNAL,
)

LIKELIHOOD_DISPLACEMENT = Alarm(
    name="likelihood_displacement",
    reads=(pairs("logp/chosen"), pairs("reward/chosen"), pairs("reward/rejected")),
    measure=_displacement,
    statistic="fall of logp/chosen over its size at the start, beyond 4 standard errors, while "
    "reward/chosen - reward/rejected grows",
    threshold=1.0,
    source="Razin et al. 2024 (arxiv.org/abs/2410.08847) name it; 1 is a perplexity squared; "
    "committed runs, which fell and gained all the same: 0.56 at most",
    remedy="Add likelihood of the chosen answers (--loss orpo, or SFT on them), lower lr or "
    "epochs, or leave out pairs that are nearly alike.",
)
PREFERENCE = (*COMMON, LIKELIHOOD_DISPLACEMENT)
