"""The work of `python -m rlhf.train`: what all methods do first; each has a file `method_*`.

Each makes its trainer, measures held-out rows before and after, and leaves a run that the next
command can open: a reward model for PPO, a policy for anything that takes a model folder.
"""

from collections.abc import Callable
from dataclasses import replace

from rlhf.dpo import SelfCheckFailed
from rlhf.job import Job
from rlhf.method_dpo import train_dpo
from rlhf.method_kto import train_kto
from rlhf.method_ppo import train_ppo
from rlhf.method_rm import train_reward_model
from rlhf.options import POLICY_GRADIENT, Config
from sft.data import read_examples, require, split_by_prompt
from sft.flags import Parsed
from sft.models import find_model, tokenizer_of
from sft.session import Stopped, already_finished, join_processes, leave_processes
from sft.text import TextPath, pick_template


def train(parsed: Parsed[Config]) -> int:
    """Run the command; returns its exit code."""
    config = parsed.config
    if already_finished(config):
        return 0
    state = join_processes()
    examples = read_examples(config.data, columns=config.column_names)
    if config.method not in POLICY_GRADIENT:
        judged = config.method == "kto" and examples.kind != "preference"
        require(examples, "unpaired" if judged else "preference")
    found = find_model(config.model)
    tokenizer = tokenizer_of(found, config.tokenizer)
    text_path = TextPath(
        tokenizer,
        pick_template(tokenizer, config.template or found.template),
        max_length=config.max_length,
    )
    train_side, val = split_by_prompt(examples, val_fraction=config.val_set_size, seed=config.seed)
    job = Job(
        parsed=parsed,
        config=replace(config, template=text_path.template.name),
        state=state,
        found=found,
        text_path=text_path,
        train=train_side,
        val=val,
    )
    methods: dict[str, Callable[[Job], None]] = {
        "rm": train_reward_model,
        "dpo": train_dpo,
        "kto": train_kto,
        **dict.fromkeys(POLICY_GRADIENT, train_ppo),
    }
    try:
        methods[config.method](job)
    except SelfCheckFailed as error:
        raise Stopped(str(error)) from error
    leave_processes(state)
    return 0
