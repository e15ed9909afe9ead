"""The rules of the house that a reader of one file cannot see, read from the syntax trees."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("moe", "sft", "rlhf", "experiments")
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

DOORS = {
    "wandb": "sft/tracking.py",
    "peft": "sft/adapt.py",
    "trl": "sft/trl_data.py",
    "vaderSentiment": "experiments/lab/sentiment.py",
}
# Text in another language than English is content here, and only here.
CHINESE = {"experiments/lab/tales.py", "experiments/lab/gold.py"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.save",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
}
FORBIDDEN_FLAGS = {"shell": True, "trust_remote_code": True, "allow_pickle": True}
ROOMS_WITHOUT_A_NAME = {"utils", "util", "common", "helpers", "misc"}
LIGHT = (
    *("moe", "moe.errors", "sft", "sft.flags", "sft.run", "sft.data", "sft.rows", "sft.train"),
    *("rlhf", "rlhf.train", "rlhf.label", "experiments"),
)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported anywhere: in functions and guards too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def import_problems(path: str, source: str) -> list[str]:
    """What the import rules say against a file at this place with this text."""
    place = ROOT / path
    floor = path.split("/")[0]
    problems = []
    for line, name in imports(ast.parse(source), package_of(place)):
        top = name.split(".")[0]
        if top in FLOORS and FLOORS.index(top) > FLOORS.index(floor):
            problems.append(f"{path}:{line} imports {name}: imports run down only")
        if top == "tests":
            problems.append(f"{path}:{line} imports {name}: the code does not know its tests")
        if top in DOORS and path != DOORS[top]:
            problems.append(f"{path}:{line} imports {name}: only {DOORS[top]} does")
        if top in FORBIDDEN_MODULES:
            problems.append(f"{path}:{line} imports {name}: only safetensors and JSON are written")
        if top == "experiments" and is_another_experiment(path, name):
            problems.append(f"{path}:{line} imports {name}: an experiment imports no other")
    return problems


def is_another_experiment(path: str, name: str) -> bool:
    """Whether a file of experiments/ reaches for a module beside lab; the lab knows none at all."""
    target = name.split(".")[1:2]
    if not target or target == ["lab"]:
        return False
    return (
        (ROOT / "experiments" / f"{target[0]}.py").is_file()
        or (ROOT / "experiments" / target[0]).is_dir()
        and package_of(ROOT / path) != f"experiments.{target[0]}"
    )


def import_circle(sources: Mapping[str, str]) -> list[str]:
    """Modules of these files (place -> text) that import each other in a ring, or nothing."""
    modules = {
        path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in sources
    }
    arrows: dict[str, set[str]] = {}
    for path, source in sources.items():
        names = {name for _, name in imports(ast.parse(source), package_of(ROOT / path))}
        # `from sft.data import require` names a module and a thing in it: the module counts.
        whole = names | {name.rpartition(".")[0] for name in names - set(modules.values())}
        arrows[modules[path]] = whole & set(modules.values()) - {modules[path]}
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as found:
        return list(found.args[1])
    return []


def call_problems(path: str, source: str) -> list[str]:
    """What the rules on calls say: nothing that runs text, nothing without an encoding."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        flags = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in FORBIDDEN_CALLS:
            problems.append(f"{path}:{node.lineno} calls {name}")
        for flag, value in FORBIDDEN_FLAGS.items():
            given = flags.get(flag)
            if isinstance(given, ast.Constant) and given.value is value:
                problems.append(f"{path}:{node.lineno} passes {flag}={value}")
        if opens_text(node, name) and "encoding" not in flags:
            problems.append(f"{path}:{node.lineno} opens text without an encoding")
    return problems


def opens_text(node: ast.Call, name: str) -> bool:
    method = name.rpartition(".")[2] or getattr(node.func, "attr", "")
    if method in ("read_text", "write_text"):
        # read_text(encoding, errors) and write_text(text, encoding, errors) by position
        return len(node.args) < (1 if method == "read_text" else 2)
    if name in ("os.open", "Image.open", "webbrowser.open", "tarfile.open", "zipfile.open"):
        return False
    if method != "open":
        return False
    at = 1 if name in ("open", "io.open", "gzip.open") else 0
    modes = [*node.args[at : at + 1], *(k.value for k in node.keywords if k.arg == "mode")]
    mode = modes[0].value if modes and isinstance(modes[0], ast.Constant) else "r"
    if name == "gzip.open" and "t" not in str(mode):
        return False
    # Methods of ours that are called open: of a class (Run.open), or with other keywords.
    owner = name.rpartition(".")[0].rpartition(".")[2]
    foreign = {k.arg for k in node.keywords} - {
        "mode",
        "buffering",
        "errors",
        "newline",
        "encoding",
    }
    return "b" not in str(mode) and not owner[:1].isupper() and not foreign


def all_problems(check: object) -> list[str]:
    found: list[str] = []
    for path in FILES:
        found += check(name_of(path), path.read_text(encoding="utf-8"))  # type: ignore[operator]
    return found


# --- the rules, on the code as it is -------------------------------------------------------------


def test_imports_run_down_and_third_parties_have_one_door_each() -> None:
    assert FILES and not all_problems(import_problems)


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert not import_circle({name_of(path): path.read_text(encoding="utf-8") for path in FILES})


def test_nothing_runs_text_unpickles_or_opens_text_without_an_encoding() -> None:
    assert not all_problems(call_problems)


def test_no_room_is_without_a_name() -> None:
    names = [*FILES, *(folder for path in FILES for folder in path.relative_to(ROOT).parents)]
    assert not [str(path) for path in names if path.stem in ROOMS_WITHOUT_A_NAME]


def test_code_is_ascii_except_where_chinese_is_content() -> None:
    foreign = {name_of(path) for path in FILES if not path.read_bytes().isascii()}
    assert foreign <= CHINESE


def test_every_file_says_what_it_is_for() -> None:
    assert not [name_of(path) for path in FILES if not ast.get_docstring(tree_of(path))]


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in TESTS]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_does_not_bring_in_torch(module: str) -> None:
    heavy = ("torch", "transformers", "matplotlib", "wandb", "peft", "trl")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"


# --- the rules themselves: a rule that catches nothing guards nothing ---------------------------


@pytest.mark.parametrize(
    ("path", "source", "told"),
    [
        ("moe/model.py", "import sft.data", "imports run down only"),
        ("moe/model.py", "def f():\n    from rlhf import kl", "imports run down only"),
        (
            "sft/data.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlhf.kl",
            "imports run down only",
        ),
        ("rlhf/kl.py", "from ..experiments import lab", "imports run down only"),
        ("sft/text.py", "import importlib\nimportlib.import_module('rlhf.kl')", "run down"),
        ("sft/trainer.py", "import wandb", "only sft/tracking.py does"),
        ("rlhf/dpo.py", "from peft import LoraConfig", "only sft/adapt.py does"),
        ("sft/data.py", "import trl.data_utils", "only sft/trl_data.py does"),
        ("sft/tracking.py", "import wandb", ""),
        ("rlhf/dpo.py", "from moe import MoEConfig\nfrom sft import data", ""),
        ("experiments/report.py", "from experiments import param_audit", "imports no other"),
        ("experiments/report.py", "import experiments.param_audit", "imports no other"),
        ("experiments/lab/plots.py", "from experiments.param_audit import run", "imports no other"),
        ("experiments/report.py", "from experiments.lab import plots", ""),
        ("moe/model.py", "import pickle", "only safetensors and JSON"),
    ],
)
def test_the_import_rule_catches_what_it_should(path: str, source: str, told: str) -> None:
    problems = import_problems(path, source)
    assert bool(problems) == bool(told)
    assert all(told in problem for problem in problems)


@pytest.mark.parametrize(
    ("sources", "ring"),
    [
        ({"sft/a.py": "import sft.b", "sft/b.py": "import sft.a"}, {"sft.a", "sft.b"}),
        ({"sft/a.py": "from sft.b import x", "sft/b.py": "from sft import a"}, {"sft.a", "sft.b"}),
        (
            {"sft/a.py": "from .b import x", "sft/b.py": "def f():\n    import sft.a"},
            {"sft.a", "sft.b"},
        ),
        (
            {"moe/__init__.py": "from moe.a import x", "moe/a.py": "from moe import y"},
            {"moe", "moe.a"},
        ),
        ({"sft/a.py": "import sft.b", "sft/b.py": "import sft.c", "sft/c.py": "import moe"}, set()),
        (
            {
                "moe/__init__.py": "from moe.a import x",
                "moe/a.py": "from moe import b",
                "moe/b.py": "",
            },
            set(),
        ),
    ],
)
def test_the_circle_rule_catches_what_it_should(sources: dict[str, str], ring: set[str]) -> None:
    assert set(import_circle(sources)) == ring


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("eval('1')", True),
        ("model.eval()", False),
        ("exec('x = 1')", True),
        ("torch.load('x')", True),
        ("yaml.load(text)", True),
        ("yaml.safe_load(text)", False),
        ("subprocess.run('ls', shell=True)", True),
        ("subprocess.run(['ls'], shell=False)", False),
        ("load(path, trust_remote_code=True)", True),
        ("load(path, trust_remote_code=False)", False),
        ("open('x')", True),
        ("open('x', 'rb')", False),
        ("open('x', mode='wb')", False),
        ("open('x', encoding='utf-8')", False),
        ("path.open('w')", True),
        ("path.open('a', encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("(a / b).read_text()", True),
        ("path.write_text('x')", True),
        ("path.write_text('x', encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'rt')", True),
        ("Run.open(folder)", False),
        ("mirror.open(name='x', config={})", False),
    ],
)
def test_the_call_rule_catches_what_it_should(source: str, caught: bool) -> None:
    assert bool(call_problems("moe/x.py", source)) == caught
