"""The output folder of a stage and its manifest.json.

A stage writes into a hidden folder next to its output folder, and renames it when the stage is
complete. If the process is killed, either the old folder or the new one remains. The manifest
records the config, the inputs, the figures, and a digest of config and inputs. A stage that is run
again with the same digest is skipped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import ConfigDict

import regrow
from regrow.config import Config
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.energy import Meter
from regrow.runtime.lock import Lock
from regrow.runtime.progress import say

NAME = "manifest.json"
MARK = ".digest"
"""A file in the hidden folder with the digest of the stage that writes there."""
LOCK = ".lock"
"""A file in the folder of a run, which is locked while the run works."""
SPARSITY = "sparsity"
"""The entry of a manifest that names the sparsity of a model's weights."""
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


class Figure(Config):
    """One measured number, with the unit and the convention that are needed for comparisons."""

    model_config = ConfigDict(allow_inf_nan=True)

    name: str
    """Name of the quantity, for instance perplexity."""
    value: float
    """The number."""
    unit: str = ""
    """The unit, for instance nats, bytes, tokens/s."""
    n: int | None = None
    """Number of items (tokens, runs, …) that were measured."""
    stderr: float | None = None
    """Standard error of the mean, in the same unit."""
    interval: tuple[float, float] | None = None
    """Confidence interval of 95 %, in the same unit."""
    convention: str = ""
    """The method of measurement: corpus, windows, scored tokens."""


def digest(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of `parts`, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None when there is none or it cannot be read."""
    return read_file(folder / NAME)


def read_file(path: Path) -> dict[str, Any] | None:
    """The manifest in a file, or None when there is none or it cannot be read."""
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def forget(folder: Path) -> None:
    """Mark the stage in `folder` as not done; its figures can still be read."""
    manifest = read(folder)
    if manifest is not None:
        write_json(folder / NAME, {**manifest, "digest": None, "resume_digest": None})


def versions() -> dict[str, str]:
    """Versions of regrow, of Python, and of the packages on which figures depend."""
    installed = {"regrow": regrow.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[name] = metadata.version(name)
    return installed


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, with a rename, so that readers never see a partial file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


class StageDir:
    """The output folder of one stage, written to a hidden folder and renamed when complete.

    `with StageDir(...) as folder:` provides the folder to write into. Test `.complete` first: a
    finished stage with the same digest need not run again. With `resumable`, an interrupted folder
    with the same `resume_digest` (by default the digest) is kept, and the stage continues in it. If
    `out` is a link to a folder, that folder is replaced and the link is kept. Raises UserError when
    `out` is not a folder, contains anything other than a result of this stage, or is being written
    by another process.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        config: Config,
        inputs: dict[str, str],
        resumable: bool = False,
        resume_digest: str | None = None,
    ) -> None:
        refuse_foreign(out)
        out = output_folder(out)
        self.out, self.name, self.config, self.inputs = out, name, config, inputs
        self.resumable = resumable
        self.digest = digest(name, config.model_dump(mode="json"), inputs, regrow.__version__)
        self.resume_digest = resume_digest or self.digest
        self.figures: list[Figure] = []
        self.extra: dict[str, Any] = {}
        self.started = time.time()
        self.meter = Meter()
        self.partial = out.parent / f".{out.name}.partial"
        self.lock = Lock(out.parent / f".{out.name}.lock", self._result)
        if distributed.is_main():
            self.lock.refuse()
            recover(out)
        distributed.agree(f"the inputs of {name}", self.digest)
        refuse_foreign(out, name)

    @property
    def _result(self) -> Path:
        """What the user knows the result as."""
        return self.out

    @property
    def complete(self) -> bool:
        """Whether `out` already has the result of this stage for this config and these inputs."""
        manifest = read(self.out)
        return manifest is not None and manifest.get("digest") == self.digest

    def __enter__(self) -> Path:
        try:
            if distributed.is_main():
                self._begin()
            distributed.wait()
            distributed.require_shared(self.partial / MARK)
        except BaseException:
            self.lock.release()
            raise
        return self.partial

    def _begin(self) -> None:
        self.partial.parent.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        if (difference := self._difference()) is not None:
            say(
                f"{self.name}: {self._result} holds a finished {self.name} {difference}: it will "
                "be replaced when this one is complete"
            )
        self.meter.start()
        mark = self.partial / MARK
        same = mark.exists() and mark.read_text() == self.resume_digest
        if self.partial.exists() and not (self.resumable and same):
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            mark.write_text(self.resume_digest)

    def _earlier(self) -> dict[str, Any] | None:
        """The manifest of the result that this one will replace, if there is one."""
        return read(self.out)

    def _difference(self) -> str | None:
        """How this stage differs from the finished result in its place, in words."""
        earlier = self._earlier() or {}
        if earlier.get("digest") in (None, self.digest):
            return None
        config, inputs = earlier.get("config", {}), earlier.get("inputs", {})
        now = self.config.model_dump(mode="json")
        if names := [name for name in now if name in config and now[name] != config[name]]:
            return f"with other settings ({', '.join(names)})"
        now = self.inputs
        if names := [name for name in {**now, **inputs} if now.get(name) != inputs.get(name)]:
            return f"with other inputs ({', '.join(names)})"
        return "of another version of regrow"

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.lock:
            if error is not None:
                self._abandon(error)
                return
            distributed.wait()
            try:
                if distributed.is_main():
                    self._finish()
            except OSError as caught:
                self._abandon(caught)
                raise
            distributed.wait()  # until every process can read the result

    def _abandon(self, error: BaseException) -> None:
        self.meter.stop()
        if not self.resumable and distributed.is_main():
            shutil.rmtree(self.partial, ignore_errors=True)
        if is_full_disk(error):
            raise UserError(
                f"no disk space left while writing {self.out}: free some and run the command again"
            ) from error

    def _finish(self) -> None:
        write_json(self.partial / NAME, {**self.manifest(), **self.meter.stop()})
        (self.partial / MARK).unlink()
        replace_folder(self.partial, self.out)

    def manifest(self) -> dict[str, Any]:
        """The fields of manifest.json."""
        return {
            "stage": self.name,
            "digest": self.digest,
            "resume_digest": self.resume_digest,
            "config": self.config.model_dump(mode="json"),
            "inputs": self.inputs,
            "figures": [f.model_dump(mode="json", exclude_none=True) for f in self.figures],
            "versions": versions(),
            "machine": {"processor": platform.machine(), "system": platform.system()},
            "seconds": round(time.time() - self.started, 1),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            **self.extra,
        }


def refuse_input(out: Path, *folders: Path) -> None:
    """Raise UserError when `out` is one of the folders that the stage reads."""
    for folder in folders:
        if out.resolve() == folder.resolve():
            raise UserError(f"{out} is an input of this stage: give --out another folder")


def refuse_foreign(out: Path, stage: str | None = None) -> None:
    """Raise UserError if `out` is not a folder, or has files that were not written by `stage`.

    Without `stage`, files of any stage are accepted. A link to a folder counts as that folder.
    Devices, sockets and named pipes are never opened.
    """
    for place in (out, *out.parents):
        if place.is_dir():
            break
        if os.path.lexists(place):
            raise UserError(f"{place} is {_kind(place)}: give --out a folder that is new or empty")
    if not out.is_dir() or all(path.name == LOCK for path in out.iterdir()):
        return
    manifest = read(out) or {}
    if "digest" not in manifest or "stage" not in manifest:
        raise UserError(
            f"{out} has files that are not from regrow: give --out a folder that is new or empty"
        )
    if stage is not None and manifest["stage"] != stage:
        raise UserError(
            f"{out} has the result of {manifest['stage']}: give {stage} a new or empty folder"
        )


def _kind(path: Path) -> str:
    """The kind of a path that is not a folder, as text for messages."""
    if not path.exists():
        return "a link to a place that does not exist"
    if path.is_file():
        return "a file"
    if path.is_fifo():
        return "a named pipe"
    return "a socket" if path.is_socket() else "a device"


def output_folder(out: Path) -> Path:
    """The folder that a result is renamed to: `out`, or its target if `out` is a link.

    Raises UserError for a folder that cannot be renamed.
    """
    folder = out.resolve() if out.is_symlink() or out.name in ("", "..") else out
    if folder.is_dir() and (folder.is_mount() or folder.samefile(".")):
        raise UserError(f"{out} is a mount point or the current folder: give --out a folder in it")
    return folder


def output_file(path: Path, own: tuple[str, Callable[[bytes], bool]] | None = None) -> Path:
    """The file that a result is renamed to: `path`, or its target if `path` is a link.

    `own` has the name of the command and a function that tells its files by their content. Raises
    UserError for any other file that is not empty, a folder, a device, a socket or a named pipe.
    """
    if path.is_symlink() and path.exists():
        path = path.resolve()
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else _kind(path)
        raise UserError(f"{path} is {kind}: give --out the name of a file")
    if own is not None and path.is_file() and path.stat().st_size and not own[1](path.read_bytes()):
        raise UserError(
            f"{path} exists and was not written by regrow {own[0]}: give --out another name"
        )
    return path


def replace_folder(new: Path, out: Path) -> None:
    """Replace the folder `out` by `new`, with renames; the old folder is deleted last."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def link(source: str, target: str) -> None:
    """Make a hard link, or a copy if links are not supported; the file must never change later."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def recover(out: Path) -> None:
    """Finish a `replace_folder` that was killed between its two renames and left no `out`.

    The new folder is used if it is complete; otherwise the old folder is restored.
    """
    old, new = out.parent / f".{out.name}.old", out.parent / f".{out.name}.partial"
    if old.exists() and not out.exists():
        (new if read(new) is not None and not (new / MARK).exists() else old).rename(out)


def is_begun(out: Path) -> bool:
    """Whether a stage or a run that was stopped has left work to continue from."""
    partial = out.resolve().with_name(f".{out.resolve().name}.partial")
    return partial.exists() or (out / "stages").exists()


def require_space(folder: Path, bytes_needed: int) -> None:
    """Raise UserError when the disk of `folder` has fewer than `bytes_needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise UserError(
            f"no disk space for {folder}: {bytes_needed / 1e9:.2f} GB are needed and "
            f"{free / 1e9:.2f} GB free; free some or give --out another disk"
        )


def is_full_disk(error: BaseException | None) -> bool:
    """Whether `error` means a full disk or quota, including the exceptions of other libraries."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return error is not None and "No space left on device" in str(error)
