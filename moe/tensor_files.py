"""The tensors of a model folder: safetensors, one file or shards with an index, and nothing else.

The decision to know: everything that the headers can tell is checked before a single weight is
read - which file holds which tensor, once, inside the folder, in a dtype that weights have - so
that a folder is opened whole or refused in one sentence.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a header says of one tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a folder by name; `read` gives one of them.

    Raises UserError for a folder without safetensors, for a file that leaves the folder or cannot
    be read, and where the index and the files do not agree.
    """

    stored: Mapping[str, Stored]

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        single = (directory / SINGLE).is_file() or (directory / SINGLE).is_symlink()
        indexed = (directory / INDEX).is_file() or (directory / INDEX).is_symlink()
        if single and indexed:
            raise UserError(
                f"{directory} has both {SINGLE} and {INDEX}: which of them holds the model? Take "
                "the other away."
            )
        if not single and not indexed:
            raise _no_tensors(directory)
        placed = None if single else _read_index(directory)
        files = [SINGLE] if placed is None else sorted(set(placed.values()))
        self._open: dict[str, Any] = {file: _open(directory, file) for file in files}
        self.stored = self._headers()
        if placed is not None:
            self._check_index(placed)

    def read(self, name: str) -> Tensor:
        file = self.stored[name].file
        try:
            return self._open[file].get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{name} cannot be read from {self.directory / file}: {error}."
            ) from error

    def common_dtype(self) -> torch.dtype:
        """The dtype of all tensors; a UserError where they differ."""
        names = sorted({stored.dtype for stored in self.stored.values()})
        if len(names) > 1:
            raise UserError(
                f"{self.directory} holds tensors in {' and '.join(names)}: say which dtype to load."
            )
        dtype: torch.dtype = getattr(torch, names[0])
        return dtype

    def _headers(self) -> dict[str, Stored]:
        found: dict[str, Stored] = {}
        for file, opened in self._open.items():
            for name in opened.keys():  # noqa: SIM118  no mapping
                header = opened.get_slice(name)
                dtype = header.get_dtype()
                if name in found:
                    raise UserError(
                        f"{name} is in both {found[name].file} and {file} of {self.directory}: the "
                        "shards do not belong together."
                    )
                if dtype not in DTYPES:
                    raise UserError(
                        f"{name} in {self.directory / file} is stored as {dtype}: only "
                        f"{', '.join(DTYPES.values())} are read; convert a quantized model first."
                    )
                shape = tuple(header.get_shape())
                found[name] = Stored(file=file, shape=shape, dtype=DTYPES[dtype])
        return found

    def _check_index(self, placed: Mapping[str, str]) -> None:
        for name in [*placed, *self.stored]:
            said = placed.get(name)
            found = self.stored[name].file if name in self.stored else None
            if said != found:
                raise UserError(
                    f"{self.directory / INDEX} puts {name} in {said or 'no file'}, but "
                    f"{found or 'no file'} holds it: index and files do not belong together."
                )


def inside(directory: Path, name: str) -> Path:
    """The file of this name in the folder.

    Raises UserError where the name or a link leads out of it. A snapshot of a hub cache is the one
    exception: there files are links into the `blobs` beside the snapshots.
    """
    home = directory.resolve()
    path = directory / name
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    target = path.resolve()
    plain = Path(name).name == name
    if not plain or not any(target.is_relative_to(root) for root in roots):
        raise UserError(
            f"{directory} names the file {name!r}, which leads out of the folder (to {target}): "
            "only files inside it are read."
        )
    return path


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """The JSON object in a file of the folder; a key that comes twice is refused."""
    path = inside(directory, name)
    if not path.is_file():
        raise UserError(f"{directory} has no {name}: give a model's folder.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON that can be read: {error}.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} holds a {type(document).__name__}: it must be a JSON object.")
    return document


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} comes twice")
    return document


def _read_index(directory: Path) -> dict[str, str]:
    placed = read_json(directory, INDEX).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError(
            f"{directory / INDEX} has no weight_map: it does not say where tensors are."
        )
    for name, file in placed.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(
                f"{directory / INDEX} puts {name} in {file!r}: only .safetensors files are read."
            )
    return placed


def _open(directory: Path, file: str) -> Any:
    path = inside(directory, file)
    if not path.is_file():
        raise UserError(f"{directory} lacks {file}, a part of the model: fetch it again.")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}.") from error


def _no_tensors(directory: Path) -> UserError:
    pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickled:
        return UserError(
            f"{directory} holds its weights only as {pickled[0]}, a pickle, which can run code "
            "when it is opened: convert it to safetensors where you trust it."
        )
    if (directory / "adapter_config.json").is_file():
        return UserError(
            f"{directory} holds an adapter, not a model: merge it into its base first."
        )
    return UserError(f"{directory} has neither {SINGLE} nor {INDEX}: it holds no whole model.")
