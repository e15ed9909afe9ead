"""Flags, YAML and presets say one thing; a typo gets one sentence; help fits a screen."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from moe.errors import UserError
from sft.flags import Parsed, main_guard, parse
from sft.yaml_layer import no_such_file


def field(default: Any, text: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    model: str = field("moe-tiny", "a folder, or the name of a model")
    data: Path | None = field(None, "a file of conversations")
    out: Path | None = None
    lora_rank: int = field(8, "0 trains every weight")
    lora_targets: tuple[str, ...] = ("q_proj",)
    lr: float = 1e-4
    beta: float | None = None
    steps: int = 100
    seeds: tuple[int, ...] = (0, 1, 2)
    window: tuple[int, int] | None = None
    balance: Literal["off", "micro_batch", "sequence"] = field("sequence", "scope of the loss")
    packing: bool = True
    group_by_length: bool = False


PRESETS = {"smoke": {"steps": 5, "seeds": (0,)}, "paper": {"steps": 10_000}}


def read(*argv: str, of: type = Config, **more: Any) -> Parsed:
    return parse(of, list(argv), prog="python -m sft.train", description="Fine-tune.", **more)


def error_of(*argv: str, of: type = Config, **more: Any) -> str:
    with pytest.raises(UserError) as error:
        read(*argv, of=of, **more)
    return str(error.value)


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# --- Flags ---


def test_no_flags_give_the_built_in_values() -> None:
    parsed = read()
    assert parsed.config == Config()
    assert set(parsed.origins.values()) == {"built-in"} and len(parsed.origins) == 13


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--lora-rank", "4"], "lora_rank", 4),
        (["--lora_rank", "4"], "lora_rank", 4),
        (["--lora-rank=4"], "lora_rank", 4),
        (["--steps", "1e4"], "steps", 10_000),
        (["--lr", "3e-4"], "lr", 3e-4),
        (["--lr", "-1"], "lr", -1.0),
        (["--beta", "none"], "beta", None),
        (["--beta", "0.5"], "beta", 0.5),
        (["--seeds", "3", "4"], "seeds", (3, 4)),
        (["--seeds=3", "4"], "seeds", (3, 4)),
        (["--seeds", "[]"], "seeds", ()),
        (["--window", "4", "8"], "window", (4, 8)),
        (["--window", "none"], "window", None),
        (["--lora-targets", "[q_proj,v_proj]"], "lora_targets", ("q_proj", "v_proj")),
        (["--lora-targets", "['q_proj',", "v_proj]"], "lora_targets", ("q_proj", "v_proj")),
        (["--lora-targets", "q_proj", "v_proj"], "lora_targets", ("q_proj", "v_proj")),
        (["--balance", "off"], "balance", "off"),
        (["--data", "a/b.json"], "data", Path("a/b.json")),
        (["--no-packing"], "packing", False),
        (["--no_packing"], "packing", False),
        (["--packing"], "packing", True),
        (["--group_by_length", "True"], "group_by_length", True),
        (["--packing=false"], "packing", False),
        (["--model", ""], "model", ""),
    ],
)
def test_a_flag_is_read_by_the_type_of_its_field(argv: list[str], name: str, value: Any) -> None:
    parsed = read(*argv)
    found = getattr(parsed.config, name)
    assert found == value and type(found) is type(value)
    assert parsed.origins[name] == "flag"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora-rnk", "4"], "Unknown option --lora-rnk. Did you mean --lora-rank?"),
        (["--lora_rnk=4"], "Unknown option --lora_rnk. Did you mean --lora-rank?"),
        (["--no-paking"], "Unknown option --no-paking. Did you mean --no-packing?"),
        (["--no-lr"], "--no-lr is no option, because --lr takes a value."),
        (["--learning-rat", "1"], "Unknown option --learning-rat. Did you mean --learning-rate?"),
        (["--zzz"], "Unknown option --zzz. See python -m sft.train --help."),
        (["-x"], "Unknown option -x. See python -m sft.train --help."),
        (["--steps", "five"], "--steps: 'five' is not an integer."),
        (["--steps", "1.5"], "--steps: '1.5' is not an integer."),
        (["--seeds", "0", "one"], "--seeds: 'one' is not an integer."),
        (["--lr", "nan"], "--lr: 'nan' is not a number."),
        (["--packing=maybe"], "--packing: 'maybe' is not true or false."),
        (["--window", "1"], "--window: '1' is not of the form INT INT."),
        (
            ["--balance", "sequense"],
            "--balance: 'sequense' is not one of off, micro_batch, sequence. "
            "Did you mean sequence?",
        ),
        (["--lr"], "--lr needs a value."),
        (["--lr", "--steps", "5"], "--lr needs a value."),
        (["--seeds"], "--seeds needs at least one value; an empty list is '[]'."),
        (["--steps", "5", "--steps", "6"], "--steps is given twice; give it once."),
        (["--lora-r", "5", "--lora-rank", "6"], "--lora-rank is given twice; give it once."),
        (
            ["--lr", "1", "2"],
            "Unexpected value '2': an option's name begins with --, and only a list takes more "
            "than one value.",
        ),
        (["--no-packing=1"], "--no-packing takes no value; write --no-packing or --packing."),
        (["--preset", "smoke"], "Unknown option --preset. See python -m sft.train --help."),
    ],
)
def test_a_mistake_gets_one_sentence(argv: list[str], message: str) -> None:
    assert error_of(*argv) == message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "-x"], "--model needs a value."),
        (["--lr", "--", "5"], "--lr needs a value."),
        (["--seeds", "--", "5"], "--seeds needs at least one value; an empty list is '[]'."),
        (["--3"], "Unknown option --3. See python -m sft.train --help."),
        (["-H"], "Unknown option -H. See python -m sft.train --help."),
        (
            ["--tyro-print-completion", "bash"],
            "Unknown option --tyro-print-completion. See python -m sft.train --help.",
        ),
    ],
)
def test_what_tyro_would_answer_in_a_box_gets_our_sentence_alone(
    argv: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert error_of(*argv) == message
    assert capfd.readouterr() == ("", "")


def test_a_value_that_begins_with_a_dash_follows_an_equals_sign() -> None:
    assert read("--model=-x").config.model == "-x"


# --- Aliases ---


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--base-model", "x"], "model", "x"),
        (["--base_model", "x"], "model", "x"),
        (["--data-path", "x.json"], "data", Path("x.json")),
        (["--lora-r", "4"], "lora_rank", 4),
        (["--learning-rate", "1e-3"], "lr", 1e-3),
        (["--pref-beta", "0.2"], "beta", 0.2),
        (["--output-dir", "o"], "out", Path("o")),
        (["--lora-target-modules", "[q_proj,v_proj]"], "lora_targets", ("q_proj", "v_proj")),
    ],
)
def test_names_known_from_elsewhere_are_understood(
    argv: list[str], name: str, value: object
) -> None:
    assert getattr(read(*argv).config, name) == value


def test_an_alias_holds_only_where_its_field_exists() -> None:
    assert error_of("--num-epochs", "3").startswith("Unknown option --num-epochs.")
    assert error_of("--cutoff-len", "3").startswith("Unknown option --cutoff-len.")


# --- YAML ---


def test_the_file_is_read_by_the_types_of_the_fields(tmp_path: Path) -> None:
    path = yaml_file(
        tmp_path,
        "# a comment\nlr: 3e-4\nsteps: 1_000\nseeds: [4, 5]\nlora-targets:\n  - q_proj\n  - up\n"
        "balance: off\npacking: no\nbeta: ~\nwindow: [4, 8]\nlora_r: 2\nmodel: 2024\n",
    )
    parsed = read("--config", path)
    expected = Config(
        lr=3e-4,
        steps=1000,
        seeds=(4, 5),
        lora_targets=("q_proj", "up"),
        balance="off",
        packing=False,
        window=(4, 8),
        lora_rank=2,
        model="2024",
    )
    assert parsed.config == expected
    assert parsed.origins["lr"] == f"{path}:2" and parsed.origins["out"] == "built-in"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lr: 1\nsteps: 2\nlora_rnk: 4\n",
            "my.yaml line 3: unknown key 'lora_rnk'. Did you mean 'lora_rank'?",
        ),
        ("zzz: 4\n", "my.yaml line 1: unknown key 'zzz'."),
        ("steps: five\n", "my.yaml: 'steps: five' is not an integer."),
        ("seeds: [0, one]\n", "my.yaml: 'seeds: one' is not an integer."),
        ("steps:\n", "my.yaml: 'steps: null' is not a value that this option takes."),
        ("lr: [1, 2]\n", "my.yaml: 'lr: 1 2' is not a single value."),
        ("packing: 1\n", "my.yaml: 'packing: 1' is not true or false."),
        ("lr: 1\nlearning_rate: 2\n", "my.yaml line 2: 'lr' is already set in line 1."),
        (
            "lr:\n  max: 2\n",
            "my.yaml line 1: 'lr' holds keys or lists of its own; options are flat, "
            "one 'name: value' a line.",
        ),
        ("- 1\n", "my.yaml: expected lines of 'name: value' and found something else."),
    ],
)
def test_a_mistake_in_the_file_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    yaml_file(tmp_path, text)
    monkeypatch.chdir(tmp_path)
    assert error_of("--config", "my.yaml") == message


def test_a_file_that_is_not_yaml_says_the_line_and_one_that_is_not_utf8_says_so(
    tmp_path: Path,
) -> None:
    message = error_of("--config", yaml_file(tmp_path, "lr: 1\nsteps: 5: 6\n"))
    assert "my.yaml line 2, column 9: not valid YAML" in message
    path = tmp_path / "gbk.yaml"
    path.write_bytes("model: \u4e2d\u6587".encode("gbk"))
    assert error_of("--config", str(path)).endswith("is not UTF-8; save it as UTF-8.")


def test_an_empty_file_and_a_byte_order_mark_are_no_mistake(tmp_path: Path) -> None:
    assert read("--config", yaml_file(tmp_path, "# nothing\n")).config == Config()
    assert read("--config", yaml_file(tmp_path, "\ufeffsteps: 5\n")).config.steps == 5


def test_a_missing_file_names_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.yaml", "b.yml", "c.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert error_of("--config", "x.yaml") == (
        f"No file x.yaml (looked from {tmp_path}). In this folder: a.yaml, b.yml."
    )
    assert error_of("--config", "no/x.yaml").endswith("There is no folder no.")
    assert str(no_such_file(Path("x.json"), suffixes=[".json"])).endswith(
        "In this folder: no .json file."
    )


# --- Precedence ---


def test_flags_win_over_the_file_over_the_preset_over_the_built_in(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "seeds: [7]\nlr: 0.5\n")
    parsed = read("--preset", "smoke", "--config", path, "--lr", "0.25", presets=PRESETS)
    assert parsed.config == Config(steps=5, seeds=(7,), lr=0.25)
    assert [parsed.origins[n] for n in ("model", "steps", "seeds", "lr")] == [
        *["built-in", "preset smoke", f"{path}:1", "flag"]
    ]


def test_the_file_may_name_the_preset_and_the_flag_overrules_it(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "preset: paper\n")
    assert read("--config", path, presets=PRESETS).config.steps == 10_000
    assert read("--config", path, "--preset", "smoke", presets=PRESETS).config.steps == 5


def test_a_field_preset_holds_the_preset_and_its_default_is_used_unasked() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithPreset:
        preset: str = "smoke"
        steps: int = 1

    parsed = read(of=WithPreset, presets={"smoke": {"steps": 2}, "paper": {"steps": 3}})
    assert parsed.config == WithPreset(preset="smoke", steps=2)
    parsed = read("--preset", "paper", of=WithPreset, presets={"smoke": {}, "paper": {"steps": 3}})
    assert parsed.config == WithPreset(preset="paper", steps=3)
    assert parsed.origins == {"preset": "flag", "steps": "preset paper"}


def test_an_unknown_preset_and_a_preset_of_unknown_fields_are_errors() -> None:
    assert error_of("--preset", "smok", presets=PRESETS) == (
        "No preset 'smok': choose smoke, paper. Did you mean smoke?"
    )
    with pytest.raises(ValueError, match="preset bad sets nothing_such"):
        read("--preset", "bad", presets={"bad": {"nothing_such": 1}})


def test_a_class_that_takes_the_layers_own_names_is_refused() -> None:
    bad = dataclasses.make_dataclass("Bad", [("config", str, "x")], frozen=True, kw_only=True)
    with pytest.raises(ValueError, match="Bad.config: the flags layer owns this name"):
        read(of=bad)


def test_a_field_of_two_types_is_refused() -> None:
    bad = dataclasses.make_dataclass("Bad", [("x", int | str, 1)], frozen=True, kw_only=True)
    with pytest.raises(TypeError, match=r"x is int \| str: a field of a command has one type"):
        read(of=bad)


# --- Required and positional ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    first: Path = dataclasses.field(metadata={"positional": True, "help": "what to read"})
    more: tuple[str, ...] = dataclasses.field(default=(), metadata={"positional": True})
    json: bool = False

    def __post_init__(self) -> None:
        if str(self.first) == "bad":
            raise ValueError("first must not be 'bad'.")


def test_positional_values_fill_their_fields_in_order() -> None:
    assert read("a", "--json", "b", "c", of=Files).config == Files(
        first=Path("a"), more=("b", "c"), json=True
    )
    assert read("--first", "a", of=Files).config.first == Path("a")


def test_what_is_missing_or_refused_by_the_class_is_the_users_mistake() -> None:
    assert error_of(of=Files) == "Missing --first. See python -m sft.train --help."
    assert error_of("bad", of=Files) == "first must not be 'bad'."


# --- What is printed ---


def printed(capsys: pytest.CaptureFixture[str], *argv: str, **more: Any) -> str:
    with pytest.raises(SystemExit) as end:
        read(*argv, **more)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_each_value_its_origin_and_can_be_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yaml_file(tmp_path, "\nlr: 3e-4\n")
    argv = ["--config", path, "--preset", "smoke", "--seeds", "4", "5", "--data", "x y.json"]
    text = printed(capsys, *argv, "--print-config", presets=PRESETS)
    rows = {line.split(":")[0]: line.split() for line in text.splitlines()}
    assert rows["lr"] == ["lr:", "0.0003", "#", f"{path}:2"]
    assert rows["steps"] == ["steps:", "5", "#", "preset", "smoke"]
    assert rows["seeds"] == ["seeds:", "[4,", "5]", "#", "flag"]
    assert rows["beta"] == ["beta:", "null", "#", "built-in"]
    again = tmp_path / "again.yaml"
    again.write_text(text, encoding="utf-8")
    assert read("--config", str(again)).config == read(*argv, presets=PRESETS).config


def wide(count: int) -> type:
    text = "what this option does, told in so many words that no line can hold them all at once"
    fields = [
        (f"option_number_{i:02d}", int, dataclasses.field(default=i, metadata={"help": text}))
        for i in range(count)
    ]
    return dataclasses.make_dataclass("Wide", fields, frozen=True, kw_only=True)


@pytest.mark.parametrize("count", [1, 30, 33, 60, 200])
def test_help_fits_one_screen(
    count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, "--help", "--nonsense", of=wide(count), presets=PRESETS)
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    if count <= 60:
        assert all(f"--option-number-{i:02d}" in text for i in range(count))


def test_help_shows_name_default_choices_and_text(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = printed(capsys, "-h")
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["--lora-rank"] == ["--lora-rank", "8", "0", "trains", "every", "weight"]
    assert rows["--[no-]packing"][1] == "on" and rows["--data"][1] == "none"
    assert rows["--balance"][1:3] == ["sequence", "(off|micro_batch|sequence)"]
    full = printed(capsys, "--help-all")
    assert "--lora-r INT, --lora-rank INT" in full and "(default: 8)" in full


# --- The guard ---


def test_the_guard_turns_a_users_mistake_into_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @main_guard
    def main(argv: list[str]) -> int | None:
        read(*argv)
        return None

    assert main(["--steps", "5"]) == 0
    assert main(["--lora-rnk", "4"]) == 2
    told = capsys.readouterr()
    assert told.err == "error: Unknown option --lora-rnk. Did you mean --lora-rank?\n"
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(3), 3), (SystemExit("no"), 1)]
)
def test_the_guard_gives_the_exit_code_of_other_endings(error: BaseException, code: int) -> None:
    @main_guard
    def main() -> int:
        raise error

    assert main() == code


def test_a_reader_who_stops_reading_is_no_error() -> None:
    code = (
        "import sys; from sft.flags import main_guard\n"
        "@main_guard\n"
        "def main():\n"
        "    for _ in range(100_000): print('a line')\n"
        "sys.exit(main())\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_the_guard_leaves_a_bug_its_traceback() -> None:
    @main_guard
    def main() -> int:
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        main()


def test_importing_the_layer_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "wandb", "rich")
    code = f"import sys, sft.flags; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout.strip() == "[]"
