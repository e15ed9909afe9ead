"""`make conformance`: Hugging Face's own model tests, run against our classes.

The tests come with the source distribution of the installed transformers, which is fetched from the
package index into a scratch folder; none of its code is in this repository. What it leaves out
stands in `stubs.py`, our side in `modeling_switchyard.py`. A failure, or a skip that `skips.txt`
does not list, ends the command with status 1 and its name.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRATCH = HERE.parent.parent / "build" / "conformance"
# The shared tests need it, we do not: it stays in the scratch folder.
PARAMETERIZED = "parameterized==0.9.0"
# Fewer than this would mean that the tests were not found.
AT_LEAST = 100
# Modules that the distribution leaves out, and the names of `stubs.py` that take their place.
STUBS = {
    "generation/test_utils.py": "GenerationTesterMixin",
    "exporters/test_export.py": "ExportTesterMixin",
    "utils/test_configuration_utils.py": "config_common_kwargs",
    "distributed_testing_utils.py": "run_distributed",
}
OURS = "models/switchyard"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one test ended: "passed", "skipped" or "failed", and why.

    A test with subtests counts as failed when one of them failed, else as skipped when one of them
    was skipped.
    """

    kind: str
    reason: str = ""


def read_outcomes(junit: str) -> dict[str, Outcome]:
    """What pytest's JUnit report says, by "Class.test"."""
    outcomes = {}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        outcome = Outcome(kind="passed")
        for kind, tags in (("failed", ("failure", "error")), ("skipped", ("skipped",))):
            found = [child for child in case if child.tag in tags]
            if found:
                lines = (found[0].get("message") or "").strip().splitlines() or [""]
                outcome = Outcome(kind=kind, reason=lines[0])
                break
        outcomes[name] = outcome
    return outcomes


def read_skips(text: str) -> dict[str, str]:
    """Reason by name, from lines "name: reason"; "test_x" means that test of every class.

    Raises ValueError for a line without a reason and for a name that stands there twice.
    """
    skips: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, reason = line.partition(": ")
        if not reason.strip() or name != name.strip():
            raise ValueError(f"line {number}, {line!r}: write a test's name, ': ' and the reason")
        if name in skips:
            raise ValueError(f"line {number}: {name} stands there twice")
        skips[name] = reason.strip()
    return skips


def is_listed(name: str, skips: Mapping[str, str]) -> bool:
    return name in skips or name.partition(".")[2] in skips


def no_longer_skipped(outcomes: Mapping[str, Outcome], skips: Mapping[str, str]) -> list[str]:
    """Names of the list under which something passed and nothing skipped."""
    kinds: dict[str, set[str]] = {}
    for name, outcome in outcomes.items():
        for known in (name, name.partition(".")[2]):
            kinds.setdefault(known, set()).add(outcome.kind)
    return [
        name
        for name in skips
        if "passed" in (kind := kinds.get(name, set())) and "skipped" not in kind
    ]


def problems(
    outcomes: Mapping[str, Outcome], skips: Mapping[str, str], *, at_least: int
) -> list[str]:
    """What must not be: failures, skips that are not listed, fewer passes than `at_least`."""
    found = []
    for name, outcome in sorted(outcomes.items()):
        if outcome.kind == "failed":
            found.append(f"failed: {name}: {outcome.reason}")
        if outcome.kind == "skipped" and not is_listed(name, skips):
            found.append(f"new skip: {name}: {outcome.reason}")
    passed = sum(outcome.kind == "passed" for outcome in outcomes.values())
    if passed < at_least:
        found.append(f"only {passed} tests passed, at least {at_least} should")
    return found


def summary(outcomes: Mapping[str, Outcome]) -> str:
    kinds = [outcome.kind for outcome in outcomes.values()]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in ("passed", "skipped", "failed"))


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    subprocess.run([*command, "--quiet", "--disable-pip-version-check"], check=True)


def fetch(scratch: Path, version: str) -> Path:
    """The source distribution, downloaded at the first run; likewise what its tests import."""
    scratch.mkdir(parents=True, exist_ok=True)
    archive = scratch / f"transformers-{version}.tar.gz"
    if not archive.is_file():
        options = ("--no-deps", "--no-binary", "transformers", "--dest", str(scratch))
        pip("download", *options, f"transformers=={version}")
    if not (scratch / "site" / "parameterized").is_dir():
        pip("install", "--no-deps", "--target", str(scratch / "site"), PARAMETERIZED)
    return archive


def build_suite(archive: Path, suite: Path, *, checkout: Path | None, parallel: bool) -> None:
    """Lay out anew: the distribution's tests as a package, our stubs and our tests in it."""
    shutil.rmtree(suite, ignore_errors=True)
    tests = suite / "tests"
    tests.mkdir(parents=True)
    with tarfile.open(archive) as held:
        for member in held.getmembers():
            parts = Path(member.name).parts
            if len(parts) == 3 and parts[1] == "tests" and member.isfile():
                content = held.extractfile(member)
                assert content is not None
                (tests / parts[2]).write_bytes(content.read())
    shutil.copy(HERE / "stubs.py", tests / "stubs.py")
    for place, name in STUBS.items():
        (tests / place).parent.mkdir(exist_ok=True)
        (tests / place).write_text(f"from tests.stubs import {name}  # noqa\n", encoding="utf-8")
    if checkout is not None:
        shutil.copy(checkout / "tests" / "generation" / "test_utils.py", tests / "generation")
    (tests / OURS).mkdir(parents=True)
    for what in ("modeling", "parallel") if parallel else ("modeling",):
        shutil.copy(HERE / f"{what}_switchyard.py", tests / OURS / f"test_{what}_switchyard.py")
    for folder in (tests, *(path for path in tests.rglob("*") if path.is_dir())):
        (folder / "__init__.py").touch()
    # A configuration of its own, so that ours above it is not read.
    (suite / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")


def run_suite(suite: Path, site: Path, *, log: Path, only: str | None) -> dict[str, Outcome]:
    """Run pytest there; its words go to the log. Raises SystemExit when it could not run."""
    report = suite / "report.xml"
    command = [sys.executable, "-m", "pytest", f"tests/{OURS}", "-q", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    command += ["-k", only] if only else []
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"WANDB_MODE": "disabled", "PYTHONPATH": str(site)}
    with log.open("w", encoding="utf-8") as words:
        ended = subprocess.run(
            command, cwd=suite, env=os.environ | settings, stdout=words, stderr=words
        )
    if ended.returncode not in (0, 1) or not report.is_file():
        tail = log.read_text(encoding="utf-8").splitlines()[-20:]
        raise SystemExit("\n".join([*tail, f"pytest ended with status {ended.returncode}: {log}"]))
    return read_outcomes(report.read_text(encoding="utf-8"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make conformance", description=__doc__)
    parser.add_argument("--scratch", type=Path, default=SCRATCH, help="where everything is put")
    parser.add_argument("--checkout", type=Path, help="a clone of transformers: tests generation")
    parser.add_argument("--parallel", action="store_true", help="tensor parallelism too; minutes")
    parser.add_argument("-k", dest="only", help="only tests whose name matches, as pytest's -k")
    asked = parser.parse_args(arguments)
    scratch = asked.scratch.resolve()
    version = importlib.metadata.version("transformers")
    archive = fetch(scratch, version)
    build_suite(archive, scratch / "suite", checkout=asked.checkout, parallel=asked.parallel)
    log = scratch / "pytest.log"
    outcomes = run_suite(scratch / "suite", scratch / "site", log=log, only=asked.only)
    skips = read_skips((HERE / "skips.txt").read_text(encoding="utf-8"))
    found = problems(outcomes, skips, at_least=0 if asked.only else AT_LEAST)
    for name in no_longer_skipped(outcomes, skips):
        print(f"no longer skipped, take it off skips.txt: {name}")
    print("\n".join([*found, f"conformance with transformers {version}: {summary(outcomes)}"]))
    if found:
        print(f"The whole output is in {log}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
