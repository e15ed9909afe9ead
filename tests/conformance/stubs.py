"""What Hugging Face's shared tests import and its source distribution leaves out.

`run.py` copies this file into the scratch folder and lets the missing modules import from it. The
two mixins are empty: generation is tested by theirs only with `--checkout`, exporting not at all.

Not collected by `make test`.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

# Settings that every configuration takes, each with a value that is not its default.
config_common_kwargs: dict[str, Any] = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "architectures": ["MoEForCausalLM"],
    "id2label": {0: "only"},
    "label2id": {"only": 0},
    "problem_type": "regression",
}


class GenerationTesterMixin:
    """Stands in for the tests of `generate`."""


class ExportTesterMixin:
    """Stands in for the tests of exported programs."""


def run_distributed(*, world_size: int) -> Callable[..., Callable[..., None]]:
    """A decorator: the function runs once per rank, rank first, in a gloo group on this machine."""

    def on_every_rank(function: Callable[..., None]) -> Callable[..., None]:
        def start(*arguments: Any) -> None:
            port = 20000 + os.getpid() % 20000
            processes.spawn(_one_rank, (world_size, port, function, arguments), nprocs=world_size)

        return start

    return on_every_rank


def _one_rank(
    rank: int, world_size: int, port: int, function: Callable[..., None], arguments: Any
) -> None:
    torch.set_num_threads(1)
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", world_size)):
        os.environ[name] = str(value)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    try:
        function(rank, *arguments)
    finally:
        dist.destroy_process_group()
