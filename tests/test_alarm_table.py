"""The README's table of alarms is what the code says; run as a program, this file prints it."""

from pathlib import Path

from rlhf.alarms import POLICY, PREFERENCE
from sft.alarms import SUPERVISED, Alarm

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| alarm | statistic | rings from | remedy |\n|---|---|---|---|"


def alarms() -> list[Alarm]:
    return list(dict.fromkeys((*SUPERVISED, *POLICY, *PREFERENCE)))


def row(alarm: Alarm) -> str:
    times = f", {alarm.readings} readings" if alarm.readings > 1 else ""
    limit = f"{alarm.threshold:.3g}{times}: {alarm.source}"
    return f"| `{alarm.name}` | {alarm.statistic} | {limit} | {alarm.remedy} |"


def table() -> str:
    return "\n".join([HEAD, *map(row, alarms())])


def test_the_readme_has_the_table_of_the_code() -> None:
    assert table() in (ROOT / "README.md").read_text(encoding="utf-8")


def test_an_alarm_has_one_name_and_all_its_words() -> None:
    names = [alarm.name for alarm in alarms()]
    assert len(set(names)) == len(names)
    for alarm in alarms():
        assert alarm.statistic and alarm.source and alarm.remedy.endswith(".")
        assert bool(alarm.reads) == (alarm.measure is not None)
        assert "|" not in row(alarm).replace(" | ", "")[1:-1]


def test_alarms_read_metrics_that_the_readme_defines() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    metrics = readme.split("## What is logged")[1].split("\n## ")[0]
    read = {read.metric for alarm in alarms() for read in alarm.reads}
    unknown = {name for name in read if f"`{name}`" not in metrics and f"`{name}[" not in metrics}
    assert unknown == set()
    assert "`alarm/NAME`" in metrics


if __name__ == "__main__":
    print(table())
