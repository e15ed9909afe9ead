"""The checklist of PPO says what is tested where, and goes on being true."""

import re
from pathlib import Path

from rlhf.options import Config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "rlhf" / "CHECKLIST.md").read_text(encoding="utf-8")


def test_every_line_of_the_checklist_is_there_once() -> None:
    found = re.findall(r"^\| (\d+|G-\d+|MoE-\d) \|", TEXT, flags=re.MULTILINE)
    groups, experts = (f"G-{i}" for i in range(1, 11)), (f"MoE-{i}" for i in range(1, 7))
    assert found == [*map(str, range(1, 34)), *groups, *experts]


def test_every_test_that_the_checklist_names_exists() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    written = set(re.findall(r"^def (test_\w+)", "\n".join(sources), flags=re.MULTILINE))
    assert set(re.findall(r"`(test_\w+)`", TEXT)) - written == set()


def test_every_file_and_flag_that_the_checklist_names_exists() -> None:
    for name in re.findall(r"`((?:moe|sft|rlhf)/[\w/]+\.py)`", TEXT):
        assert (ROOT / name).is_file(), name
    flags = {flag.replace("-", "_") for flag in re.findall(r"`--([a-z-]+)", TEXT)}
    assert flags - set(Config.__dataclass_fields__) == set()
