"""The page of an invented run: complete, partial, hostile; and the command that rebuilds it."""

import json
import math
import re
import subprocess
import sys
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import report as command
from experiments.lab.report import write_all, write_report
from experiments.lab.tables import table_markdown
from experiments.lab.verdict import compare

GOLD = {"base": 0.1, "few_shot": 0.4, "sft": 1.0, "dpo": 1.55, "ppo": 1.7, "best_of_n": 1.35}
HIGHER_IS_BETTER = {
    "gold_reward": True,
    "proxy_reward": True,
    "kl_sequence": False,
    "win_rate": True,
    "length": True,
    "distinct_2": True,
    "reference_perplexity": False,
}
TALE = (
    "Once there was a small fox who lived beside the river. Every morning it carried water to the "
    "old oak, and the oak gave it shade. One day the river went dry."
)


def write_run(folder: Path, *, num_seeds: int = 3, num_experts: int = 8, layers: int = 4) -> Path:
    """A run as the grid leaves it, with invented numbers."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = list(range(num_seeds))
    arms: dict[str, dict[str, list[float | None]]] = {}
    for arm, gold in GOLD.items():
        moved = max(0.0, gold - 1.0)
        near = {
            "gold_reward": gold,
            "proxy_reward": 1.2 * gold - 0.3,
            "kl_sequence": 12 * moved,
            "win_rate": min(0.95, 0.5 + moved / 2) if gold >= 1 else 0.2,
            "length": 38 + 9 * moved,
            "distinct_2": 0.62 - 0.2 * moved,
            "reference_perplexity": 5.1 + 3 * moved,
            "base_perplexity": 6.0 + 3 * moved,
            "tokens_generated": 64_000.0,
            "tokens_trained": 0.0 if arm in ("base", "few_shot") else 1_240_000.0,
            "seconds": 60 + 100 * moved,
            "peak_mib": 812.0,
        }
        arms[arm] = {
            name: [float(value * (1 + 0.03 * rng.normal())) for _ in seeds]
            for name, value in near.items()
        }
    comparisons = [
        {
            "arm": arm,
            "against": "sft",
            "metric": metric,
            **asdict(
                compare(
                    arms[arm][metric],
                    arms["sft"][metric],
                    margin=0.05,
                    higher_is_better=higher,
                )
            ),
        }
        for arm in ("base", "few_shot", "dpo", "ppo", "best_of_n")
        for metric, higher in HIGHER_IS_BETTER.items()
    ]
    load_by_seed = [rng.dirichlet(np.full(num_experts, 6.0), size=layers) for _ in seeds]
    routing: dict[str, dict[str, Any]] = {}
    for place, stage in enumerate(("base", "sft", "dpo", "ppo")):
        load = [
            num_experts * (0.85**place * x + (1 - 0.85**place) * rng.dirichlet(x[0], size=layers))
            for x in load_by_seed
        ]
        for x in load:
            x[-1, 2] = 0.0 if stage == "ppo" else x[-1, 2]
        routing[stage] = {
            "load_share": [x.tolist() for x in load],
            "load_entropy": [[float(v) for v in 0.97 - 0.02 * rng.random(layers)] for _ in seeds],
            "max_vio": [[float(v) for v in x.max(axis=-1) - 1] for x in load],
            "max_vio_floor": [[0.06] * layers for _ in seeds],
            "dead_experts": [[int(v) for v in (x < 0.1).sum(axis=-1)] for x in load],
            "dropped_share": [[0.0] * layers for _ in seeds],
        }
        if stage in ("dpo", "ppo"):
            far = 0.05 * place
            routing[stage]["jaccard_from_sft"] = [
                [float(v) for v in 1 - far * np.arange(1, layers + 1) / layers * rng.random()]
                for _ in seeds
            ]
            routing[stage]["jsd_from_sft"] = [
                [float(v) for v in 0.1 * far * rng.random(layers)] for _ in seeds
            ]
    frontier = {
        arm: [
            [
                {
                    "step": step,
                    "kl": speed * step / 100 + 0.1 * rng.random(),
                    "gold": 1 + rise * (step / 100) - fall * (step / 100) ** 2,
                    "proxy": 1 + 0.9 * step / 100 + 0.05 * rng.normal(),
                }
                for step in range(0, 201, 20)
            ]
            for _ in seeds
        ]
        for arm, speed, rise, fall in (
            ("dpo", 4.0, 0.8, 0.25),
            ("ppo", 7.0, 1.2, 0.45),
            ("best_of_n", 1.3, 0.5, 0.08),
        )
    }
    summary = {
        "schema": 1,
        "experiment": "compare",
        "question": "Does preference training raise the held-out gold reward above SFT?",
        "status": "done",
        "config_hash": "9f1c2ab4",
        "commit": "0123456789abcdef",
        "seeds": seeds,
        "arms": arms,
        "comparisons": comparisons,
        "routing": routing,
        "verdict": {
            "word": "REPRODUCED" if num_seeds >= 3 else "INCONCLUSIVE",
            "rule": "DPO above SFT in every seed and by the threshold in the mean",
            "threshold": 0.1,
        },
        "claims": [
            {
                "claim": "DPO raises reward over SFT",
                "published": "win rate 0.61",
                "ours": {"gold_reward": 0.55},
                "verdict": "REPRODUCED",
            }
        ],
        "timings": {
            "seconds": {
                stage: [float(base * (1 + 0.1 * rng.random())) for _ in seeds]
                for stage, base in (
                    ("pretrain", 62),
                    ("sft", 31),
                    ("rm", 20),
                    ("dpo", 44),
                    ("ppo", 190),
                )
            },
            "peak_bytes": {"ppo": [9e8] * num_seeds},
        },
        "frontier": frontier,
        "notes": ["1.4 % of the prompts were cut at 96 tokens."],
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    (folder / "config.yaml").write_text("preset: laptop\nbeta: 0.1\n", encoding="utf-8")
    environment = {
        "python": "3.11.9",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
        "command": ["python", "-m", "experiments.compare", "--seeds", "0", "1", "2"],
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    curves = {
        "sft": (("train/loss", 2.4, 1.3), ("router/max_vio", 0.8, 0.4)),
        "dpo": (("train/loss", 0.69, 0.4), ("preference/accuracy", 0.5, 0.74)),
        "ppo": (
            ("reward/score", 0.9, 1.8),
            ("policy/kl_sequence", 0.0, 7.0),
            ("policy/loss", 0.1, 0.0),
            ("router/max_vio/layer_00", 0.5, 0.5),
        ),
    }
    for arm, names in curves.items():
        for seed in seeds:
            inside = folder / f"{arm}-s{seed}"
            inside.mkdir(exist_ok=True)
            rows = [
                {
                    "step": step,
                    "stage": arm,
                    "split": split,
                    "name": name,
                    "value": last
                    + (first - last) * math.exp(-step / 40)
                    + 0.03 * float(rng.normal()) * (split == "train"),
                    "count": 64,
                }
                for name, first, last in names
                for step in range(0, 121, 2)
                for split in ("train", "val")
                if split == "train" or (step % 20 == 0 and name == "train/loss")
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (inside / "metrics.jsonl").write_text(text, encoding="utf-8")
            samples = [
                {
                    "prompt": f"Tale {i}: the fox and the river\n",
                    "before": TALE,
                    "after": f"{TALE} The fox was kind and glad, and shared its last drop.",
                    "gold_before": 0.9,
                    "gold_after": 1.4 + 0.1 * i,
                }
                for i in range(8)
            ]
            text = "".join(json.dumps(row) + "\n" for row in samples)
            (inside / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder


def edit_summary(folder: Path, **changes: object) -> dict[str, Any]:
    """Replaces top-level keys; None removes one."""
    path = folder / "summary.json"
    summary = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    summary = {key: value for key, value in summary.items() if value is not None}
    path.write_text(json.dumps(summary), encoding="utf-8")
    return summary


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("results") / "20260101-000000-9f1c")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run with a summary and nothing else, and no figure but the bars."""
    folder = tmp_path / "small"
    folder.mkdir()
    arms = {"sft": {"gold_reward": [1.0, 1.1, 0.9]}, "dpo": {"gold_reward": [1.5, 1.7, 1.4]}}
    row = compare(
        arms["dpo"]["gold_reward"],
        arms["sft"]["gold_reward"],
        margin=0.05,
        higher_is_better=True,
    )
    comparisons = [{"arm": "dpo", "against": "sft", "metric": "gold_reward", **asdict(row)}]
    summary = {
        "schema": 1,
        "experiment": "compare",
        "question": "Is DPO better?",
        "status": "done",
        "seeds": [0, 1, 2],
        "arms": arms,
        "comparisons": comparisons,
    }
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


class Outline(HTMLParser):
    """Tags that are left open, headings, ids, and addresses that a page would load."""

    VOID = {"meta", "br", "img", "link", "input", "hr"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.labels: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.addresses.append(value or "")
            if name == "aria-label":
                self.labels.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline(text: str) -> Outline:
    parser = Outline()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_has_every_section_in_order(page: str) -> None:
    assert outline(page).headings == [
        "What was asked",
        "Answer",
        "Learning curves",
        "Reward against KL",
        "Experts",
        "Routing drift",
        "Samples before and after",
        "Minutes per stage",
        "Notes",
        "How to run it again",
        "Limits",
    ]


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    found = outline(page)
    assert not found.tags & {"script", "link", "iframe", "img", "object"}
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in found.addresses)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert "@import" not in page
    assert len(page.encode()) < 1_000_000


def test_every_figure_has_a_label_and_its_numbers(page: str) -> None:
    found = outline(page)
    assert page.count("<svg ") == len(found.labels) == page.count("<figure>") >= 10
    assert all(len(label) > 30 for label in found.labels)
    assert page.count("<summary>The numbers</summary>") == page.count("<figure>")


def test_the_command_rebuilds_page_table_and_figures_to_the_same_bytes(
    run: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(run)
    assert (run / "report.html").read_text(encoding="utf-8") == page
    written = [
        run / "report.html",
        run / "table.md",
        *(run / "figures").iterdir(),
    ]
    before = {path.name: path.read_bytes() for path in written}
    for name in ("metric", "frontier", "experts", "drift", "minutes", "curve-dpo-train-loss"):
        assert {f"{name}.svg", f"{name}.png"} <= set(before)
    assert before["table.md"].startswith(b"- DPO is BETTER than SFT")
    assert command.main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert before == {path.name: path.read_bytes() for path in written}


def test_the_page_says_what_was_run_and_how(page: str) -> None:
    assert "python -m experiments.compare --seeds 0 1 2" in page
    assert "preset: laptop" in page
    assert "Threshold: 0.1<" in page
    assert "torch 2.13.0" in page
    assert "0123456789abcdef" in page
    assert "1.4 % of the prompts were cut" in page


def test_samples_are_the_first_of_the_file_and_say_how_many_there_are(page: str) -> None:
    assert "DPO, seed 0: the first 5 of 8 prompts" in page
    assert "Tale 4" in page and "Tale 5" not in page


def test_limits_count_seeds_and_comparisons(page: str) -> None:
    assert "3 seeds: intervals" in page
    assert "35 comparisons, each at 95 %" in page
    assert "about 1.75 would still exclude zero" in page


def test_a_summary_alone_makes_a_page_without_the_missing_sections(small: Path) -> None:
    found = outline(write_report(small).read_text(encoding="utf-8"))
    assert found.headings == ["What was asked", "Answer", "How to run it again", "Limits"]


def test_a_run_of_claims_alone_shows_them_and_keeps_its_own_table(tmp_path: Path) -> None:
    claim = {"claim": "total", "published": "7.3B", "ours": 7_241_732_096, "verdict": "REPRODUCED"}
    summary = {
        "schema": 1,
        "claims": [claim, {**claim, "ours": [0.5, None]}],
        "verdict": {"word": "REPRODUCED"},
        "timings": {"seconds": 90.0},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    (tmp_path / "table.md").write_text("its own\n", encoding="utf-8")
    write_all(tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "7,241,732,096" in text and "0.50, -" in text and "The models are small" not in text
    assert outline(text).headings[1:3] == ["Answer", "Minutes per stage"]
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == "its own\n"
    assert "| total | 7.3B | 7,241,732,096 | REPRODUCED |" in table_markdown(summary)


def test_limits_name_few_seeds_and_seeds_left_out(tmp_path: Path, small: Path) -> None:
    text = write_report(write_run(tmp_path / "two", num_seeds=2)).read_text(encoding="utf-8")
    assert "2 seeds: no interval and no word below three." in text
    assert "would still exclude zero" not in text  # without intervals nothing excludes anything
    arms = {"sft": {"gold_reward": [1.0, 1.1, 0.9]}, "dpo": {"gold_reward": [1.5, None, 1.4]}}
    edit_summary(small, arms=arms)
    text = write_report(small).read_text(encoding="utf-8")
    assert "DPO has no gold reward for seed 1: left out in pairs" in text


def test_the_notes_tell_which_alarm_rang_first_where(small: Path) -> None:
    head = {"stage": "ppo", "split": "train", "count": 1, "name": "alarm/kl_blow_up"}
    rows = [{**head, "step": step, "value": value} for step, value in ((8, 1.0), (12, 0.0))]
    (small / "dpo-s0").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (small / "dpo-s0" / "metrics.jsonl").write_text(lines, encoding="utf-8")
    text = write_report(small).read_text(encoding="utf-8")
    assert text.count("Alarm kl_blow_up in DPO, seed 0, stage ppo, at step 8.") == 1
    assert "at step 12" not in text


def test_the_notes_tell_what_was_left_out_in_reading(small: Path) -> None:
    inside = small / "dpo-s0"
    inside.mkdir()
    row = {"step": 1, "stage": "dpo", "split": "train", "name": "train/loss", "value": 0.7}
    lines = [json.dumps(row), json.dumps({**row, "step": 2}), '{"step": 3, "na']
    (inside / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = write_report(small).read_text(encoding="utf-8")
    assert "dpo-s0/metrics.jsonl: line 3 breaks off" in text
    assert "Learning curves" in outline(text).headings


def test_what_the_reward_model_is_worth_is_shown_where_it_was_measured(small: Path) -> None:
    measured = {"accuracy": [0.7, 0.8, 0.75], "accuracy_interval95": [[0.6, 0.8]] * 3}
    edit_summary(small, reward_model=measured)
    text = write_report(small).read_text(encoding="utf-8")
    assert "Reward model" in outline(text).headings
    assert "accuracy, 95 % interval" in text and "[0.60, 0.80]" in text


def test_an_empty_summary_still_makes_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"schema": 1}', encoding="utf-8")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing was compared." in text
    outline(text)
    assert table_markdown({"schema": 1}).startswith("- Nothing was compared.")


def test_a_run_that_is_not_done_says_so_at_the_top(small: Path) -> None:
    edit_summary(small, status="failed: out of memory")
    assert "This run is not complete: failed: out of memory." in write_report(small).read_text(
        encoding="utf-8"
    )


def test_no_text_of_a_user_or_model_becomes_markup(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x")
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y> $x_1$ &amp; \ud83d"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    for key in ("arms", "frontier", "routing"):
        summary[key][evil] = next(iter(summary[key].values()))
    edit_summary(
        folder,
        question=evil,
        experiment=evil,
        notes=[evil],
        commit=evil,
        **{key: summary[key] for key in ("arms", "frontier", "routing")},
        timings={evil: [1.0]},
        verdict={"word": evil, "rule": evil, "threshold": evil},
        claims=[{"claim": evil, "published": [evil], "ours": {evil: evil}, "verdict": evil}],
    )
    (folder / "config.yaml").write_text("<script>", encoding="utf-8")
    sample = json.dumps({"prompt": evil, "before": evil, "after": evil, "gold_after": 1})
    (folder / "dpo-s0" / "samples.jsonl").write_text(sample + "\n", encoding="utf-8")
    row = {"step": 1, "stage": evil, "split": evil, "name": evil, "value": 1.0, "count": 1}
    rows = "".join(json.dumps({**row, "step": step}) + "\n" for step in (1, 2))
    (folder / "dpo-s0" / "metrics.jsonl").write_text(rows, encoding="utf-8")
    text = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in text and "<img" not in text
    assert not outline(text).tags & {"script", "img"}
    assert text.count("&lt;script&gt;") > 20


def test_a_large_model_keeps_the_page_below_a_megabyte(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "large", num_experts=128, layers=48)
    assert len(write_report(folder).read_bytes()) < 1_000_000


def test_the_command_answers_a_wrong_folder_with_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([str(tmp_path / "absent")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: No folder ") and error.count("\n") == 1
    assert command.main([str(run.parent)]) == 2
    assert f"give {run.name} in it" in capsys.readouterr().err
    assert command.main([str(tmp_path)]) == 2
    assert "has no summary.json" in capsys.readouterr().err
    assert command.main([str(run / "summary.json")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "runs" in capsys.readouterr().err


def test_one_wrong_folder_stops_the_command_before_it_writes(small: Path, tmp_path: Path) -> None:
    assert command.main([str(small), str(tmp_path / "absent")]) == 2
    assert not (small / "report.html").exists()


def test_a_report_needs_no_torch(small: Path) -> None:
    code = (
        "import sys; from experiments.report import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    root = Path(command.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code, str(small)], cwd=root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
