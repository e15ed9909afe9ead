"""`python -m rlhf.train --method rm|dpo|ppo`: reward model, DPO or PPO on a model that sft/ made.

The options are in `rlhf.options`, the work is in `rlhf.methods`: a mistyped flag is answered before
torch is imported.
"""

import sys
from collections.abc import Sequence

from rlhf.options import COMMAND, Config
from sft.command import first_process_speaks, parse_training
from sft.flags import main_guard


@main_guard
@first_process_speaks
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    parsed = parse_training(
        Config,
        argv,
        prog=f"python -m {COMMAND}",
        description="Learn from preferences: a reward model (rm) or a policy (dpo) from pairs, a "
        "policy from answers judged one by one (kto), a policy from a reward model (ppo; "
        "without a critic grpo, gspo, rloo, reinforce_pp, reinforce_pp_baseline). --model is a "
        "model folder or a run of sft.train; the result lies in results/<method>/<run>/.",
    )
    from rlhf.methods import train

    return train(parsed)


if __name__ == "__main__":
    sys.exit(main())
