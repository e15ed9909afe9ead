"""Which routers give log-probabilities that preference and RL stages can rest on.

A ratio or a margin compares two log-probabilities of one text. Where a router lets a token's output
depend on the rest of the batch, on later tokens or on noise, the difference is not the policy's
alone; such a router is refused unless the caller asks for it by name.
"""

from torch import nn

from moe.errors import UserError
from moe.generation import router_specs
from moe.router_spec import RouterSpec

FLAG = "allow_batch_dependent_routing"


def routing_problem(spec: RouterSpec) -> str:
    """Why log-probabilities under this router are not the policy's alone; empty if they are."""
    if spec.capacity_factor is not None and spec.kind != "expert_choice":
        remedy = "set capacity_factor to None (dropless) for preference and RL stages"
    else:
        remedy = "take a dropless router of kind top_k or hash for preference and RL stages"
    if not spec.batch_invariant:
        depends = "its batch neighbours"
    elif not spec.causal:
        depends = "the tokens after it"
    elif spec.noisy:
        drawn = {"jitter_noise": spec.jitter_noise, "logit_noise": spec.logit_noise}
        noise = " and ".join(f"{name} {width}" for name, width in drawn.items() if width)
        return (
            f"{noise} makes log-probabilities in training random, so ratios and margins would not "
            f"be the policy's: set it to 0 for preference and RL stages, or give {FLAG}."
        )
    else:
        return ""
    return (
        f"{spec.coupling} makes a token's log-probability depend on {depends}, so ratios and "
        f"margins would not be the policy's: {remedy}, or give {FLAG}."
    )


def refuse_batch_coupling(*models: nn.Module, allowed: bool = False) -> None:
    """Raises `UserError` for routers that `routing_problem` names, and for an idle `allowed`."""
    specs = [spec for model in models for spec in router_specs(model)]
    problems = [problem for spec in specs if (problem := routing_problem(spec))]
    if problems and not allowed:
        raise UserError(problems[0])
    if allowed and not problems:
        raise UserError(
            f"{FLAG} has no effect: no router here lets log-probabilities depend on the batch, on "
            "later tokens or on noise; leave it out."
        )


def has_noisy_router(model: nn.Module) -> bool:
    """Whether two passes in training differ, so that self-checks on equality have nothing to say.

    Such a router is there only where it was asked for.
    """
    return any(spec.noisy for spec in router_specs(model))
