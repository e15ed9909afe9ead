"""Checkpoints: whole or absent, verified before they are trusted, strict when they are loaded."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moe.errors import UserError
from sft.checkpoint import (
    MANIFEST,
    checkpoints,
    fingerprint_tensors,
    live_tensors,
    load_strictly,
    newest_checkpoint,
    read_checkpoint,
    rotate,
    write_checkpoint,
)

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, *, value: float = 0.0) -> Path:
    write_checkpoint(
        folder,
        tensors={
            "model": {"a": torch.full((2, 3), value), "b": torch.arange(4)},
            "rng": {"torch.0": torch.zeros(5, dtype=torch.uint8)},
        },
        documents={"state": {"step": value, "exact": 0.1}, "list": [1, None, "x"]},
        facts={"step": 7, "stage": "sft"},
    )
    return folder


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


# --- writing and reading


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    held = read_checkpoint(write(tmp_path / "checkpoint-1", value=2.5))
    assert set(held.tensors) == {"model", "rng"}
    assert torch.equal(held.tensors["model"]["a"], torch.full((2, 3), 2.5))
    assert held.tensors["model"]["b"].dtype == torch.int64
    assert held.tensors["rng"]["torch.0"].dtype == torch.uint8
    assert held.documents == {"state": {"step": 2.5, "exact": 0.1}, "list": [1, None, "x"]}
    assert (held.manifest["step"], held.manifest["stage"]) == (7, "sft")
    assert set(held.manifest["files"]) == {  # type: ignore[call-overload]
        "model.safetensors", "rng.safetensors", "state.json", "list.json",
    }  # fmt: skip


def test_a_checkpoint_is_safetensors_and_json_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint-1")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert list(tmp_path.iterdir()) == [folder]


def test_views_and_transposed_tensors_are_written_by_value(tmp_path: Path) -> None:
    row, turned = (torch.arange(12.0).view(3, 4) for _ in range(2))
    write_checkpoint(
        tmp_path / "c",
        tensors={"m": {"view": row.requires_grad_(True)[1], "turned": turned.t()}},
        documents={},
        facts={},
    )
    held = read_checkpoint(tmp_path / "c").tensors["m"]
    assert held["view"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert torch.equal(held["turned"], torch.arange(12.0).view(3, 4).t())


def test_writing_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1", value=1.0)
    write(tmp_path / "checkpoint-1", value=2.0)
    assert read_checkpoint(tmp_path / "checkpoint-1").tensors["model"]["a"][0, 0] == 2.0
    assert len(list(tmp_path.iterdir())) == 1


def test_equal_contents_give_equal_bytes(tmp_path: Path) -> None:
    one, other = (write(tmp_path / name / "checkpoint-1") for name in "ab")
    assert (one / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()


# --- damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x10
    path.write_bytes(bytes(content))


def flip_json(folder: Path) -> None:
    path = folder / "state.json"
    path.write_text(path.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")


def traverse(folder: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["files"]["../stolen.json"] = {"bytes": 2, "sha256": "0"}

    (folder.parent / "stolen.json").write_text("{}", encoding="utf-8")
    change_manifest(folder, change)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (cut, "/model.safetensors is missing or cut short: the checkpoint is damaged."),
    "flipped": (flip, "/model.safetensors differs from its checksum: the checkpoint is damaged."),
    "changed": (flip_json, "/state.json differs from its checksum: the checkpoint is damaged."),
    "missing": (
        lambda folder: (folder / "rng.safetensors").unlink(),
        "/rng.safetensors is missing or cut short: the checkpoint is damaged.",
    ),
    "no manifest": (
        lambda folder: (folder / MANIFEST).unlink(),
        f" has no {MANIFEST}: it was not written to its end.",
    ),
    "traversal": (
        traverse,
        f"/{MANIFEST} names '../stolen.json', outside its folder: not trusted.",
    ),
    "absolute": (
        lambda folder: change_manifest(
            folder, lambda m: m["files"].update({"/etc/hostname": {"bytes": 1, "sha256": "0"}})
        ),
        f"/{MANIFEST} names '/etc/hostname', outside its folder: not trusted.",
    ),
    "itself": (
        lambda folder: change_manifest(
            folder, lambda m: m["files"].update({"..": {"bytes": 4096, "sha256": "0"}})
        ),
        "/.. is missing or cut short: the checkpoint is damaged.",
    ),
    "no json": (
        lambda folder: (folder / MANIFEST).write_text("{", encoding="utf-8"),
        f"/{MANIFEST} cannot be read (Expecting property name",
    ),
    "no text": (
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        f"/{MANIFEST} cannot be read (",
    ),
    "a list": (
        lambda folder: (folder / MANIFEST).write_text("[]", encoding="utf-8"),
        f"/{MANIFEST} cannot be read (",
    ),
    "no facts": (
        lambda folder: change_manifest(folder, lambda m: m["files"].update({"list.json": {}})),
        f"/{MANIFEST} cannot be read ('bytes'): the checkpoint is damaged.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_is_passed_over_with_a_sentence(tmp_path: Path, damage: str) -> None:
    good, bad = write(tmp_path / "checkpoint-9"), write(tmp_path / "checkpoint-10")
    do, sentence = DAMAGES[damage]
    do(bad)
    with pytest.raises(UserError) as caught:
        read_checkpoint(bad)
    assert str(caught.value).startswith(f"{bad}{sentence}")
    newest, notes = newest_checkpoint(tmp_path)
    assert newest == good
    assert notes == [f"{caught.value} Passing it over for the one before."]


def test_the_newest_is_the_last_by_number_and_other_folders_do_not_count(tmp_path: Path) -> None:
    for name in (
        "checkpoint-2",
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-x",
        ".tmp-checkpoint-11-1",
    ):
        write(tmp_path / name)
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "checkpoint-2", "checkpoint-9", "checkpoint-10",
    ]  # fmt: skip
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", [])
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])


def test_without_a_whole_one_there_is_no_newest_and_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        cut(write(tmp_path / f"checkpoint-{step}"))
    newest, notes = newest_checkpoint(tmp_path)
    assert newest is None
    assert ["checkpoint-2" in notes[0], "checkpoint-1" in notes[1], len(notes)] == [True, True, 2]


@pytest.mark.parametrize("moment", ["rename", "fsync", "manifest"])
def test_a_process_killed_while_writing_leaves_the_old_checkpoint(
    tmp_path: Path, moment: str
) -> None:
    """The process kills itself at the given moment of its second write, as a power cut would."""
    write(tmp_path / "checkpoint-1", value=1.0)
    program = f"""
import os, signal, sys
from pathlib import Path
import torch
import sft.checkpoint as checkpoint

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if {moment!r} == "rename":
    Path.rename = die
elif {moment!r} == "fsync":
    os.fsync = die
else:
    checkpoint._sha256 = die
checkpoint.write_checkpoint(
    Path(sys.argv[1]) / "checkpoint-2",
    tensors={{"model": {{"a": torch.ones(2, 3)}}}}, documents={{}}, facts={{}},
)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -9, done.stderr
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not (tmp_path / "checkpoint-2").exists()
    (left,) = [path for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]
    assert (left / MANIFEST).exists() == (moment != "manifest")
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-1", [])
    # The next save of that step is not in the way of what was left, and rotation sweeps it up.
    write(tmp_path / "checkpoint-2", value=2.0)
    rotate(tmp_path, keep=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-2"]


@pytest.mark.parametrize("call", ["fsync", "rename", "save_file"])
def test_a_full_disk_is_told_in_one_sentence_and_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "checkpoint-1", value=1.0)
    place = {"fsync": os, "rename": Path, "save_file": sys.modules["sft.checkpoint"]}[call]
    with monkeypatch.context() as patch:
        patch.setattr(place, call, refuse)
        with pytest.raises(UserError) as caught:
            write(tmp_path / "checkpoint-2")
    assert str(caught.value).startswith(
        f"{tmp_path}/checkpoint-2 could not be written: No space left on device ("
    )
    assert str(caught.value).endswith(
        " MiB are free there). The checkpoints before it are untouched: mend that, then go on by "
        "--resume."
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint-1"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-1", [])


# --- rotation


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    for step in (2, 9, 10, 11):
        write(tmp_path / f"checkpoint-{step}")
    rotate(tmp_path, keep=5)
    assert len(checkpoints(tmp_path)) == 4
    rotate(tmp_path, keep=2)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]


def test_rotation_sweeps_up_what_was_left_half_done_also_when_none_is_too_old(
    tmp_path: Path,
) -> None:
    write(tmp_path / "checkpoint-1")
    write(tmp_path / ".tmp-checkpoint-2-77")
    (tmp_path / "notes").mkdir()
    rotate(tmp_path, keep=5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "notes"]


def test_a_checkpoint_has_lost_its_name_before_a_file_of_it_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}")
    named: list[list[str]] = []

    def deleting(path: Path) -> None:
        named.append([folder.name for folder in checkpoints(tmp_path)])

    monkeypatch.setattr(shutil, "rmtree", deleting)
    rotate(tmp_path, keep=1)
    assert named == [["checkpoint-2"]]


def test_rotation_never_counts_on_a_checkpoint_that_does_not_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in range(1, 5):
        write(tmp_path / f"checkpoint-{step}")
    flip(tmp_path / "checkpoint-4")
    rotate(tmp_path, keep=2)
    # Two from the newest good one; the damaged one above stays for a later save to replace.
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "checkpoint-2", "checkpoint-3", "checkpoint-4",
    ]  # fmt: skip
    assert "checkpoint-4/model.safetensors differs from its checksum" in capsys.readouterr().out


def test_rotation_deletes_nothing_when_nothing_verifies(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        cut(write(tmp_path / f"checkpoint-{step}"))
    rotate(tmp_path, keep=1)
    assert len(checkpoints(tmp_path)) == 3


# --- loading into a model


class Tied(nn.Module):
    kept: Tensor

    def __init__(self, *, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, width)
        self.head = nn.Linear(width, 4, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("kept", torch.zeros(2))
        self.register_buffer("derived", torch.zeros(2), persistent=False)


def test_tied_weights_and_derived_buffers_are_not_saved_twice() -> None:
    assert list(live_tensors(Tied())) == ["kept", "embed.weight"]


def test_loading_copies_every_tensor_and_keeps_the_tie() -> None:
    source, target = Tied(), Tied()
    source.kept.fill_(5.0)
    saved = {name: tensor.detach().clone() for name, tensor in live_tensors(source).items()}
    load_strictly(target, saved, source="there")
    assert torch.equal(target.embed.weight, source.embed.weight)
    assert target.head.weight is target.embed.weight
    assert torch.equal(target.kept, torch.full((2,), 5.0))


def test_a_fingerprint_is_of_names_types_shapes_and_values() -> None:
    model = Tied()
    first = fingerprint_tensors(model)
    assert len(first) == 16 and fingerprint_tensors(model) == first
    model.derived.fill_(3.0)  # no tensor of a checkpoint
    assert fingerprint_tensors(model) == first
    with torch.no_grad():
        model.embed.weight[1, 2] += 1e-6
    changed = fingerprint_tensors(model)
    renamed, turned = nn.Module(), nn.Module()
    renamed.other = nn.Parameter(torch.zeros(2, 3))
    turned.other = nn.Parameter(torch.zeros(3, 2))
    prints = [first, changed, fingerprint_tensors(renamed), fingerprint_tensors(turned)]
    assert fingerprint_tensors(turned.bfloat16()) not in prints
    assert len(set(prints)) == 4


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda saved: saved.pop("embed.weight"),
            "1 tensors are missing from there, first embed.weight: it belongs to another model or "
            "configuration.",
        ),
        (
            lambda saved: saved.update({"more": torch.zeros(1), "extra": torch.zeros(1)}),
            "2 tensors are unknown to the model in there, first extra: it belongs to another model "
            "or configuration.",
        ),
        (
            lambda saved: saved.update({"embed.weight": torch.zeros(4, 5)}),
            "embed.weight in there is (4, 5) torch.float32, the model wants (4, 3) torch.float32: "
            "it belongs to another configuration.",
        ),
        (
            lambda saved: saved.update({"kept": torch.zeros(2, dtype=torch.float64)}),
            "kept in there is (2,) torch.float64, the model wants (2,) torch.float32: it belongs "
            "to another configuration.",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused_before_any_is_copied(
    change: Callable[[dict[str, Tensor]], object], sentence: str
) -> None:
    target = Tied()
    before = target.embed.weight.detach().clone()
    saved = {name: torch.ones_like(tensor) for name, tensor in live_tensors(target).items()}
    change(saved)
    with pytest.raises(UserError) as caught:
        load_strictly(target, saved, source="there")
    assert str(caught.value) == sentence
    assert torch.equal(target.embed.weight, before)
    assert not target.kept.any()
