"""Checkpoints that are whole or absent: one directory, checksums last, then one rename.

Only safetensors and JSON. A reader verifies every byte against the manifest before it trusts one;
a damaged newest checkpoint is passed over, aloud, for the one before it. A folder has the name of a
checkpoint only while it is whole: it gets the name last and loses it before anything in it goes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moe.errors import UserError

MANIFEST = "MANIFEST.json"
PREFIX = "checkpoint-"
_UNNAMED = ".tmp-"  # before a folder's name while it is being written or deleted


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What one directory holds: tensors and documents by file name, and the manifest."""

    folder: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, object]
    manifest: dict[str, object]


def live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, under its first name (tied weights share one)."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def load_strictly(model: nn.Module, saved: Mapping[str, Tensor], *, source: str) -> None:
    """Copy `saved` into the model; raises UserError unless names, shapes and dtypes all match."""
    live = live_tensors(model)
    for kind, names in (
        ("missing from", sorted(set(live) - set(saved))),
        ("unknown to the model in", sorted(set(saved) - set(live))),
    ):
        if names:
            raise UserError(
                f"{len(names)} tensors are {kind} {source}, first {names[0]}: it belongs to "
                "another model or configuration."
            )
    for name, tensor in live.items():
        other = saved[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise UserError(
                f"{name} in {source} is {tuple(other.shape)} {other.dtype}, the model wants "
                f"{tuple(tensor.shape)} {tensor.dtype}: it belongs to another configuration."
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])


def fingerprint_tensors(model: nn.Module) -> str:
    """16 hex digits over the names, types, shapes and values of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in live_tensors(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()[:16]


def write_checkpoint(
    folder: Path,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, object],
    facts: Mapping[str, object],
) -> None:
    """Write `folder` under a temporary name, fsync all, manifest last, then rename.

    tensors: file stem -> name -> tensor (`<stem>.safetensors`); documents: file stem -> JSON value.
    facts: what the manifest says beside sizes and checksums. Raises UserError, with what is free,
    when the disk does not take it; what was there before is untouched then.
    """
    temporary = folder.with_name(f"{_UNNAMED}{folder.name}-{os.getpid()}")
    with _told_when_the_disk_refuses(folder, temporary):
        _sweep(temporary)
        temporary.mkdir(parents=True)
        for stem, named in tensors.items():
            contiguous = {name: t.detach().cpu().contiguous() for name, t in named.items()}
            save_file(contiguous, temporary / f"{stem}.safetensors")
        for stem, value in documents.items():
            text = json.dumps(value, indent=1, sort_keys=True)
            (temporary / f"{stem}.json").write_text(text + "\n", encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = json.dumps({"schema": 1, **facts, "files": files}, indent=1)
        (temporary / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
        for path in [*temporary.iterdir(), temporary]:
            _fsync(path)
        delete_checkpoint(folder)
        temporary.rename(folder)
        _fsync(folder.parent)


@contextmanager
def _told_when_the_disk_refuses(folder: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        where = next(path for path in (folder, *folder.parents) if path.is_dir())
        free = shutil.disk_usage(where).free / 2**20
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(
            f"{folder} could not be written: {reason} ({free:,.0f} MiB are free there). The "
            "checkpoints before it are untouched: mend that, then go on by --resume."
        ) from error


def read_checkpoint(folder: Path) -> Checkpoint:
    """Verify and read; raises UserError naming the first file that is missing, cut or changed."""
    manifest = _verified_manifest(folder)
    names = list(manifest["files"])  # type: ignore[call-overload]
    return Checkpoint(
        folder=folder,
        tensors={
            name.removesuffix(".safetensors"): load_file(folder / name)
            for name in names
            if name.endswith(".safetensors")
        },
        documents={
            name.removesuffix(".json"): json.loads((folder / name).read_text(encoding="utf-8"))
            for name in names
            if name.endswith(".json")
        },
        manifest=manifest,
    )


def newest_checkpoint(root: Path) -> tuple[Path | None, list[str]]:
    """The newest directory under `root` that verifies, and a sentence for each that does not."""
    notes = []
    for folder in reversed(checkpoints(root)):
        try:
            _verified_manifest(folder)
        except UserError as error:
            notes.append(f"{error} Passing it over for the one before.")
            continue
        return folder, notes
    return None, notes


def checkpoints(root: Path) -> list[Path]:
    """Checkpoint directories under `root`, oldest step first."""
    found = [p for p in root.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def rotate(root: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, counted from the newest that verifies.

    Damaged ones above it are left for a later save of that step to replace. What killed processes
    left half written or half deleted goes too.
    """
    for stale in root.glob(f"{_UNNAMED}{PREFIX}*"):
        _sweep(stale)
    if len(checkpoints(root)) <= keep:
        return
    newest, notes = newest_checkpoint(root)
    for note in notes:
        print(note, flush=True)
    if newest is None:
        return
    found = checkpoints(root)
    for folder in found[: max(found.index(newest) + 1 - keep, 0)]:
        delete_checkpoint(folder)


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it is there; its name goes first, so that no part is taken for it."""
    if folder.exists():
        nameless = folder.with_name(f"{_UNNAMED}{folder.name}-{os.getpid()}-old")
        _sweep(nameless)
        folder.rename(nameless)
        _sweep(nameless)


def _sweep(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _verified_manifest(folder: Path) -> dict[str, object]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} has no {MANIFEST}: it was not written to its end.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        for name, facts in files.items():
            if Path(name).name != name:
                raise UserError(f"{path} names {name!r}, outside its folder: not trusted.")
            held = folder / name
            if not held.is_file() or held.stat().st_size != facts["bytes"]:
                raise UserError(f"{held} is missing or cut short: the checkpoint is damaged.")
            if _sha256(held) != facts["sha256"]:
                raise UserError(f"{held} differs from its checksum: the checkpoint is damaged.")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({error}): the checkpoint is damaged.") from error
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
