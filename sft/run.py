"""A run is a folder: its configuration, its environment, its status, and every file written whole.

Decision to know: nothing here is ever half written. Each file goes to a temporary name in the same
folder, is fsynced and then renamed, so that a reader sees the old text or the new one.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import yaml

from moe.errors import UserError

Status = Literal["running", "done", "failed", "interrupted"]

_CONFIG = "config.yaml"
_ENVIRONMENT = "environment.json"
_STATUS = "status.json"
_CHANGES = "resumed_with_changes"
_PACKAGES = (
    "switchyard torch transformers trl peft accelerate datasets safetensors tokenizers wandb numpy"
).split()

_REDACTED = "<redacted>"
_ALWAYS_SECRET = {"secret", "password", "passwd", "apikey", "credential", "credentials"}
# `eos_token` and `prompt_key` name vocabulary entries and columns; hiding them would break reruns.
_HARMLESS_BEFORE = {
    "token": set("bos eos pad unk sep cls mask stop image special max min num per by".split()),
    "key": set("input output prompt chosen rejected label text messages column sort score".split()),
}
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pos]_[A-Za-z0-9]{30,}"
    r"|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
)


def plain(value: object) -> Any:
    """The value as JSON and YAML know it: dataclass to dict, tuple to list, Path to str.

    Raises:
        TypeError: for an object without a plain form.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars, without importing either
        return plain(value.tolist())
    raise TypeError(f"{type(value).__name__} has no plain form: {value!r}")


def _is_secret(key: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower().replace("-", "_").split("_")
    if _ALWAYS_SECRET & set(words):
        return True
    before = words[-2] if len(words) > 1 else ""
    return words[-1] in _HARMLESS_BEFORE and before not in _HARMLESS_BEFORE[words[-1]]


def redact(value: object) -> Any:
    """The plain value with secrets replaced, for anything that leaves the process.

    A secret is what stands under a key whose words say so (`api_key`, `hub_token`, `password`;
    not `eos_token` or `prompt_key`), or a text that has the form of a known kind of key.
    """
    return _redact_plain(plain(value))


def _redact_plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _REDACTED
            if _is_secret(key) and item is not None and not isinstance(item, bool)
            else _redact_plain(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_redact_plain(item) for item in value]
    return _SECRET_VALUE.sub(_REDACTED, value) if isinstance(value, str) else value


def redact_command(words: Sequence[str]) -> list[str]:
    """A command line without secrets (`--hub-token X`, `API_KEY=X`) and without home folders."""
    shown, hide_next = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = _is_secret(name.lstrip("-")) if word.startswith("-") or equals else False
        if hide_next and not word.startswith("--"):
            shown.append(_REDACTED)
        elif secret and equals:
            shown.append(f"{name}={_REDACTED}")
        else:
            shown.append(_without_home(_SECRET_VALUE.sub(_REDACTED, word)))
        hide_next = secret and not equals and word.startswith("-")
    return shown


def _without_home(text: str) -> str:
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return re.sub(r"(/home|/Users)/[^/\s:]+|[A-Za-z]:\\Users\\[^\\\s]+", "~", text)


def write_text_atomic(path: Path, text: str) -> None:
    """Replaces the file whole, or leaves it as it was, whatever ends the process in between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # a folder cannot be opened on Windows
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _nonfinite(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where or 'the value'} is {value}"
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _nonfinite(item, f"{where}.{key}" if where else str(key))


def write_json_atomic(path: Path, value: object) -> None:
    """Writes strict JSON: keys in the order given, indent 1, the same bytes for the same value.

    Raises:
        ValueError: for NaN or infinity, which JSON has not; the message says where it stands.
    """
    tree = plain(value)
    if bad := next(_nonfinite(tree), None):
        raise ValueError(f"{path.name}: {bad}; write null where a value is missing")
    write_text_atomic(path, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def yaml_line(name: str, value: object) -> str:
    """`name: value` on one line, whatever the value holds."""
    flow = yaml.safe_dump(
        [plain(value)], default_flow_style=True, allow_unicode=True, width=float("inf")
    )
    return f"{name}: {flow.strip()[1:-1]}"


def config_hash(config: object) -> str:
    """16 hex digits that are equal when two configurations are; the order of keys is no difference.

    A dataclass and its dict, a tuple and its list, a Path and its text count as equal.
    """
    text = json.dumps(redact(config), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _git(*words: str) -> str | None:
    """What git says about the repository that holds this code; None without git or repository."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
    try:
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _commit() -> tuple[str | None, bool | None]:
    """The commit of the running code, and whether files differ from it or code is untracked."""
    # Installed from a wheel, this file lies inside somebody else's repository: not tracked there.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    untracked = _git("ls-files", "--others", "--exclude-standard", "--", ":/*.py")
    return _git("rev-parse", "HEAD"), bool(changed) or bool(untracked)


def describe_environment() -> dict[str, object]:
    """What one needs to run this again elsewhere; no host name, no home folder, no secret.

    Does not import torch: its thread count is known only when the caller already has.
    """
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    torch = sys.modules.get("torch")
    commit, dirty = _commit()
    return {
        "python": platform.python_version(),
        "platform": platform.system(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads() if torch is not None else None,
        "packages": versions,
        "commit": commit,
        "dirty": dirty,
        "command": ["python", *redact_command(sys.orig_argv[1:])],
    }


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    def show(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key], ensure_ascii=False) if key in values else "absent"

    for key in dict.fromkeys([*old, *new]):
        if key not in old or key not in new or old[key] != new[key]:
            yield f"{key} differs ({show(old, key)} in the run, {show(new, key)} now)"


def _make_folder(parent: Path, suffix: str) -> Path:
    """A new folder `YYYYMMDD-HHMMSS-suffix`; a name already taken moves the stamp on by a second.

    mkdir decides, so that two commands started in the same second never share a folder.
    """
    parent.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now()
    while True:
        folder = parent / f"{stamp:%Y%m%d-%H%M%S}-{suffix}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            stamp += timedelta(seconds=1)


def _claim_folder(folder: Path, overwrite: bool) -> Path:
    """The folder named by --out: new, empty, or an earlier run that may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give --out a folder that is new or empty.")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(
                f"{folder} is not empty: add --resume to go on with it, --overwrite to replace it, "
                "or choose another --out."
            )
        # A mistyped `--out ~ --overwrite` must not empty somebody's home.
        if not (folder / _STATUS).is_file():
            raise UserError(
                f"{folder} holds files that no run has written (it has no {_STATUS}), so "
                "--overwrite leaves it alone; choose another --out."
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _point_latest(root: Path, folder: Path) -> None:
    """`<root>/latest` leads to the newest run, where the file system has links."""
    link, temporary = root / "latest", root / f".latest.{os.getpid()}"
    if link.exists() and not link.is_symlink():
        return
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(folder.relative_to(root), target_is_directory=True)
        os.replace(temporary, link)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One folder `results/<experiment>/<stamp>-<hash>/` and the small files that describe it.

    As a context manager it sets the status by how the block ends.

    Attributes:
        folder: where everything of this run is written.
        config: the configuration as `config.yaml` holds it (plain values, secrets redacted).
    """

    folder: Path
    config: Mapping[str, Any]

    @classmethod
    def create(
        cls,
        root: Path,
        experiment: str,
        config: object,
        *,
        out: Path | None = None,
        overwrite: bool = False,
    ) -> "Run":
        """Starts a run in a new folder below `root/experiment`, or in `out`.

        Args:
            config: a dataclass or a mapping; `--config <folder>/config.yaml` gives it back.
            overwrite: an `out` that holds an earlier run is emptied first.

        Raises:
            UserError: if `out` is not empty and may not be overwritten.
        """
        values = redact(config)
        if out is not None:
            folder = _claim_folder(Path(out), overwrite)
        else:
            folder = _make_folder(Path(root) / experiment, config_hash(config)[:4])
            _point_latest(Path(root), folder)
        run = cls(folder=folder, config=values)
        run.set_status("running")
        run._write_config(values)
        run.write_json(_ENVIRONMENT, describe_environment())
        return run

    def _write_config(self, values: Mapping[str, Any]) -> None:
        text = "".join(yaml_line(name, value) + "\n" for name, value in values.items())
        write_text_atomic(self.folder / _CONFIG, text)

    @classmethod
    def open(
        cls, folder: Path, config: object | None = None, *, ignore: Collection[str] = ()
    ) -> "Run":
        """Opens an earlier run, to resume it if `config` agrees with the run's own.

        Args:
            config: what is asked for now; None takes the run's own without comparing.
            ignore: keys that may differ (`out`, `resume`, ...).

        Raises:
            UserError: if the folder is no run, or naming each differing key and both its values.
        """
        folder = Path(folder)
        path = folder / _CONFIG
        if not path.is_file():
            raise UserError(f"{folder} is not a run: it has no {_CONFIG}. Give a run's folder.")
        try:
            stored = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {error}") from error
        if config is not None:
            kept = {key: value for key, value in stored.items() if key not in ignore}
            asked = {key: value for key, value in redact(config).items() if key not in ignore}
            if found := "; ".join(_differences(kept, asked)):
                raise UserError(
                    f"Cannot resume {folder}: {found}. Give the run's values, or start a new run."
                )
        return cls(folder=folder, config=stored)

    def note_changes(self, step: int, changes: Sequence[object], *, config: object) -> None:
        """Records that the run goes on from `step` with something else than it began with.

        Args:
            changes: dataclasses or mappings, kept in environment.json beside those of before.
            config: what config.yaml holds from now on.
        """
        environment = self._environment()
        noted = [*environment.get(_CHANGES, ()), {"step": step, "changes": redact(changes)}]
        self.write_json(_ENVIRONMENT, {**environment, _CHANGES: noted})
        self._write_config(redact(config))

    @property
    def changes(self) -> list[dict[str, Any]]:
        """What `note_changes` recorded, in order: step, and the changes made there."""
        return list(self._environment().get(_CHANGES, ()))

    def _environment(self) -> dict[str, Any]:
        path = self.folder / _ENVIRONMENT
        if not path.is_file():  # the process ended before it wrote it
            return {}
        environment: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return environment

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.name

    @property
    def status(self) -> str:
        """`running`, `done`, `failed: reason` or `interrupted`, as the folder says now."""
        path = self.folder / _STATUS
        if not path.is_file():
            return "interrupted"  # the process ended before it wrote its first status
        value = json.loads(path.read_text(encoding="utf-8"))
        return f"{value['status']}: {value['reason']}" if "reason" in value else value["status"]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, so that there is nothing to resume."""
        return self.status == "done"

    def set_status(self, status: str, *, reason: str | None = None) -> None:
        """Records the status; `failed` needs a reason, given apart or as `failed: reason`."""
        word, _, told = status.partition(": ")
        reason = reason or told or None
        if word not in get_args(Status):
            raise ValueError(f"status {word!r} is not one of {', '.join(get_args(Status))}")
        if (word == "failed") != (reason is not None):
            raise ValueError("a reason belongs to the status 'failed', and to no other")
        value = {"status": word}
        if reason is not None:
            value["reason"] = _without_home(redact(" ".join(reason.split())))
        self.write_json(_STATUS, value)

    def write_json(self, path: str | Path, value: object) -> None:
        """`write_json_atomic` to a path inside the folder; folders on the way are made."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(target, value)

    def __enter__(self) -> "Run":
        self.set_status("running")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.set_status("done")
        elif isinstance(error, KeyboardInterrupt):
            self.set_status("interrupted")
        else:
            self.set_status("failed", reason=f"{type(error).__name__}: {error}".rstrip(": "))
