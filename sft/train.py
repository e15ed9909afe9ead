"""`python -m sft.train`: pretraining or supervised fine-tuning of a model folder on a data file.

The options are in `sft.options`, the work is in `sft.supervised`: a mistyped flag is answered
before torch is imported.
"""

import sys
from collections.abc import Sequence

from sft.command import first_process_speaks, parse_training
from sft.flags import main_guard
from sft.options import COMMAND, Config


@main_guard
@first_process_speaks
def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    parsed = parse_training(
        Config,
        argv,
        prog=f"python -m {COMMAND}",
        description="Fine-tune a model folder on a file of answers, or train it on plain text. "
        "--model new makes a small mixture-of-experts model and its tokenizer. The result lies "
        "in results/sft/<run>/, as model/ or, with --lora-rank, as adapter/.",
    )
    from sft.supervised import train

    return train(parsed)


if __name__ == "__main__":
    sys.exit(main())
