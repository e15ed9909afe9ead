"""A metric key is defined once, in the README's table; what is logged and what is defined agree."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("sft/trainer.py", "sft/loss.py", "moe/stats.py", "rlhf", "sft/supervised.py")
AREAS = "eval|train|lm|router|preference|reward|logp|policy|value|rollout"
# Not logged: sums behind `value/explained_variance` and `policy/ratio_variance`.
PIECES = {
    *("value/error", "value/error_squared", "value/return", "value/return_squared"),
    *("policy/ratio_deviation", "policy/ratio_deviation_squared"),
}


def defined() -> set[str]:
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is logged")[1]
    table = table.split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {
        key.partition("[")[0] for row in rows for key in re.findall(r"`([a-z0-9_/\[\]N]+)`", row)
    }


def logged() -> set[str]:
    keys: set[str] = set()
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else path.rglob("*.py"):
            text = file.read_text(encoding="utf-8")
            keys |= set(re.findall(rf'"((?:{AREAS})/[a-z0-9_]+)"', text))
    # RouterStats names its measures in one dictionary.
    stats = (ROOT / "moe" / "stats.py").read_text(encoding="utf-8")
    measures = stats.split("measures = {")[1].split("}")[0]
    keys |= {f"router/{name}" for name in re.findall(r'"([a-z_]+)":', measures)}
    methods = (ROOT / "rlhf" / "method_ppo.py").read_text(encoding="utf-8")
    (names,) = re.findall(r"names = (\([^)]*\))\n.*?eval/\{n\}", methods, flags=re.DOTALL)
    keys |= {f"eval/{name}" for name in re.findall(r'"([a-z_]+)"', names)}
    return keys - PIECES


def test_every_logged_metric_is_defined_in_the_readme() -> None:
    assert logged() - defined() == set()


def test_every_defined_metric_is_logged() -> None:
    assert defined() - logged() == set()
