"""What a router does, as data: every router of the field is a few fields of one spec.

The decision to know: a spec declares what it couples. `causal`, `batch_invariant` and `decodable`
follow from its fields, hold in eval, and are held to by tests on the whole model; `noisy` says that
training draws random numbers on top.

E experts, K experts per token, N real tokens.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from moe.errors import UserError

Kind = Literal["top_k", "expert_choice", "hash"]
Scoring = Literal["softmax", "softmax_chosen", "sigmoid"]
GroupScore = Literal["top2_sum", "max"]
Scope = Literal["batch", "sequence"]
Rounding = Literal["ceil", "floor"]
DropOrder = Literal["gshard", "position", "score"]

CHOICES: dict[str, tuple[str, ...]] = {
    "kind": ("top_k", "expert_choice", "hash"),
    "scoring": ("softmax", "softmax_chosen", "sigmoid"),
    "group_score": ("top2_sum", "max"),
    "capacity_scope": ("batch", "sequence"),
    "capacity_rounding": ("ceil", "floor"),
    "drop_order": ("gshard", "position", "score"),
}


@dataclass(frozen=True, kw_only=True, repr=False)
class RouterSpec:
    """Who chooses whom, by which score, with which weight, and how many find a place.

    num_experts, top_k: E and K, 1 <= K <= E.
    kind: `top_k`, each token takes the K experts with the best scores. `expert_choice`, each expert
        takes the tokens that score best for it, as many as its capacity, so that a token has K
        experts on average and the load is equal (Zhou et al. 2022). `hash`, the token's id decides
        and nothing is learned (Roller et al. 2021); the score of the hashed expert still weighs.
    scoring: `softmax` over all experts (Shazeer et al. 2017). `softmax_chosen`, the logits choose
        and the weights are a softmax over the chosen ones (gpt-oss; Megatron-LM's default).
        `sigmoid` of each logit by itself (DeepSeek-V3, GLM-4-MoE).
    normalize_weights: divide the K chosen scores by their sum (Mixtral; DeepSeek-V3 adds 1e-20 to
        it). False keeps the raw score as the gate (Switch Transformer for K = 1, OLMoE; expert
        choice always). Refused for K = 1, where the weight would be the constant 1 and the router
        would get no gradient; a hash does not need one, and there it is the published layer.
    routed_scaling_factor: multiplies the weights at the end (DeepSeek-V2 and V3).
    selection_bias: a bias per expert is added to the scores for the choice alone, the unbiased
        score weighs (auxiliary-loss-free balancing, Wang et al. 2024). `route` takes it as bias_E.
    n_group, topk_group: experts lie in n_group equal groups in a row, and a token chooses within
        its topk_group best (DeepSeek-V2 and V3). group_score: a group's value is the sum of its two
        best scores (`top2_sum`, V3, biased where there is a bias) or the best (`max`, V2).
    capacity_factor: None is dropless. Otherwise each expert takes at most
        capacity_factor * K * N / E assignments, rounded as `capacity_rounding` says; what is
        dropped contributes nothing, the token keeps its residual. Of `expert_choice` it is a factor
        on K (None: 1).
    capacity_scope: N counts, and places are shared by, the real tokens of the `batch`, or of each
        `sequence` apart.
    capacity_rounding: `ceil`, or `floor` as the Switch Transformer's published code has it; Hugging
        Face's is given the rounded number itself (`expert_capacity`), which is that of one length.
    drop_order: who gets a place first. `gshard`: all first choices in token order, then all second
        ones (Lepikhin et al. 2020; for K = 1 Switch, Fedus et al. 2022, eq. 3). `position`: all
        choices of a token before those of the next. `score`: the highest weights, ties as `gshard`.
    hash_seed: another seed, another hash.
    jitter_noise: in training the router's input is multiplied by U(1 - x, 1 + x) (Fedus et al.
        2022, "input jitter"); the experts' is not.
    logit_noise: in training N(0, x^2) is added to the logits (V-MoE, Riquelme et al. 2021).
    """

    num_experts: int
    top_k: int
    kind: Kind = "top_k"
    scoring: Scoring = "softmax"
    normalize_weights: bool = True
    routed_scaling_factor: float = 1.0
    selection_bias: bool = False
    n_group: int | None = None
    topk_group: int | None = None
    group_score: GroupScore = "top2_sum"
    capacity_factor: float | None = None
    capacity_scope: Scope = "batch"
    capacity_rounding: Rounding = "ceil"
    drop_order: DropOrder = "gshard"
    hash_seed: int = 0
    jitter_noise: float = 0.0
    logit_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is unknown: give one of {', '.join(allowed)}."
                )
        self._check_sizes()
        self._check_weights()
        self._check_choice()
        self._check_capacity()

    def __repr__(self) -> str:
        """The sizes and every field that is not at its default: what goes into results."""
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.name in ("num_experts", "top_k") or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def has_capacity(self) -> bool:
        """Whether places are limited, so that assignments can be dropped or tokens left out."""
        return self.capacity_factor is not None or self.kind == "expert_choice"

    @property
    def causal(self) -> bool:
        """Whether a token's output is the same whatever follows it, and if nothing does.

        Places are not: even where those in front are served first, their number grows with the
        text that is still to come.
        """
        return not self.has_capacity

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's output is free of the other rows of its batch."""
        return not self.has_capacity or self.capacity_scope == "sequence"

    @property
    def decodable(self) -> bool:
        """Whether decoding token by token with a cache gives what one pass over all gives."""
        return self.causal

    @property
    def noisy(self) -> bool:
        """Whether training draws random numbers, so that two passes differ."""
        return self.jitter_noise > 0 or self.logit_noise > 0

    @property
    def chooses_by_score(self) -> bool:
        """Whether tokens choose by what the router learns, which a balance loss could change."""
        return self.kind == "top_k"

    @property
    def coupling(self) -> str:
        """The option that couples tokens, with its value, and empty if none does."""
        if self.kind == "expert_choice":
            return f"router kind {self.kind!r}"
        return "" if self.capacity_factor is None else f"capacity_factor {self.capacity_factor}"

    def _check_sizes(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(
                f"top_k {self.top_k} must be between 1 and num_experts {self.num_experts}."
            )
        for name, least, ask in (
            ("routed_scaling_factor", 0.0, "above 0"),
            ("capacity_factor", 0.0, "above 0, or None for dropless"),
        ):
            value = getattr(self, name)
            if value is not None and not (value > least and math.isfinite(value)):
                raise UserError(f"{name} {value} must be {ask}.")
        if not 0 <= self.jitter_noise < 1:
            raise UserError(f"jitter_noise {self.jitter_noise} must be at least 0 and below 1.")
        if not 0 <= self.logit_noise < math.inf:
            raise UserError(f"logit_noise {self.logit_noise} must be finite and at least 0.")

    def _check_weights(self) -> None:
        if self.kind == "expert_choice":
            if self.normalize_weights or self.scoring == "softmax_chosen":
                raise UserError(
                    f"kind 'expert_choice' with scoring {self.scoring!r} and normalised weights "
                    f"{self.normalize_weights}: a token has no K choices to normalise over, set "
                    "norm_topk_prob to False and scoring to softmax or sigmoid."
                )
            return
        if self.scoring == "softmax_chosen" and not self.normalize_weights:
            raise UserError(
                "scoring 'softmax_chosen' always sums to 1 over the chosen, so norm_topk_prob "
                "False has no effect: set it to True, or scoring to softmax."
            )
        if self.top_k == 1 and self.normalize_weights and self.kind != "hash":
            raise UserError(
                "top_k 1 with normalised weights gives every token the weight 1, so the router "
                "gets no gradient: set norm_topk_prob to False (Switch keeps the probability as "
                "the gate)."
            )

    def _check_choice(self) -> None:
        grouped = self.n_group is not None or self.topk_group is not None
        if self.kind != "top_k":
            for name, given in (("selection_bias", self.selection_bias), ("n_group", grouped)):
                if given:
                    raise UserError(
                        f"{name} {getattr(self, name)} has no effect with kind {self.kind!r}, "
                        "where tokens do not choose by score: leave it out."
                    )
        if self.selection_bias and self.top_k == self.num_experts:
            raise UserError(
                f"selection_bias True has no effect with top_k {self.top_k} of num_experts "
                f"{self.num_experts}: every token takes every expert, leave it out."
            )
        if self.selection_bias and self.scoring == "softmax_chosen":
            raise UserError(
                "selection_bias True goes with scores between 0 and 1, and scoring "
                "'softmax_chosen' chooses by logits: set scoring to softmax or sigmoid."
            )
        if self.hash_seed and self.kind != "hash":
            raise UserError(
                f"hash_seed {self.hash_seed} has no effect with kind {self.kind!r}: leave it 0."
            )
        if grouped:
            self._check_groups()
        elif self.group_score != "top2_sum":
            raise UserError(
                f"group_score {self.group_score!r} has no effect without n_group and topk_group: "
                "give them or leave it out."
            )

    def _check_groups(self) -> None:
        groups, kept = self.n_group, self.topk_group
        if groups is None or kept is None:
            raise UserError(f"n_group {groups} and topk_group {kept} go together: give both.")
        if groups < 2 or self.num_experts % groups:
            raise UserError(
                f"n_group {groups} must be at least 2 and divide num_experts {self.num_experts}, "
                "or None for no groups."
            )
        if not 1 <= kept < groups:
            raise UserError(
                f"topk_group {kept} must be at least 1 and below n_group {groups}: keeping every "
                "group has no effect, give None to both."
            )
        size = self.num_experts // groups
        if self.top_k > kept * size:
            raise UserError(
                f"top_k {self.top_k} is more than the {kept * size} experts of topk_group {kept} "
                f"groups of {size}: keep more groups or choose fewer experts."
            )
        if self.group_score == "top2_sum" and size < 2:
            raise UserError(
                f"n_group {groups} of num_experts {self.num_experts} leaves groups of {size}, "
                "which have no two best scores: set group_score to max."
            )

    def _check_capacity(self) -> None:
        for name, needed in (
            ("capacity_scope", self.has_capacity),
            ("capacity_rounding", self.has_capacity),
            ("drop_order", self.has_capacity and self.kind != "expert_choice"),
        ):
            default = CHOICES[name][0]
            if not needed and getattr(self, name) != default:
                why = "without capacity_factor" if not self.has_capacity else "with expert choice"
                raise UserError(
                    f"{name} {getattr(self, name)!r} has no effect {why}: leave it {default!r}."
                )


def refuse_undecodable(spec: RouterSpec) -> None:
    """Raises `UserError` for a router that cannot generate, with the reason."""
    if spec.decodable:
        return
    raise UserError(
        f"{spec.coupling} cannot generate: how many places an expert has depends on all tokens of "
        "the text, so what is drawn token by token comes from another distribution than a pass "
        "over the whole text has; generate with a dropless router of kind top_k or hash, or draw "
        "no samples."
    )
