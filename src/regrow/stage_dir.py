"""What a stage did, and the folder it did it in.

A stage writes into a hidden neighbour of its output folder and renames it when complete; its
`manifest.json` holds a digest of its config and its inputs, so that running again skips what is
complete and unchanged, and a kill at any moment leaves either the old folder or the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import time
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

import regrow
from regrow.config import Config
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.energy import Meter

NAME = "manifest.json"
MARK = ".digest"
PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


class Figure(Config):
    """One measured number, with what is needed to compare it."""

    name: str
    """What was measured, for instance perplexity."""
    value: float
    """The number."""
    unit: str = ""
    """Unit, for instance nats, bytes, tokens/s."""
    n: int | None = None
    """How many items (tokens, runs, …) the number is taken over."""
    stderr: float | None = None
    """Standard error of the mean, in the same unit."""
    convention: str = ""
    """How it was measured: corpus, windows, what is scored."""


def digest(*parts: Any) -> str:
    """SHA-256 over the canonical JSON of `parts`, as hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in `folder`, or None when there is none or it cannot be read."""
    return read_file(folder / NAME)


def read_file(path: Path) -> dict[str, Any] | None:
    """The manifest in a file, or None when there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) else None


def forget(folder: Path) -> None:
    """Make the stage in `folder` count as not done, while its figures can still be read."""
    found = read(folder)
    if found is not None:
        write_json(folder / NAME, {**found, "digest": None, "resume_digest": None})


def versions() -> dict[str, str]:
    """Versions of regrow, Python and the packages whose changes change figures."""
    found = {"regrow": regrow.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, by rename, so that a reader never sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


class StageDir:
    """One stage's output folder: begun in a hidden neighbour, renamed when complete.

    `with Stage(...) as folder:` gives the folder to write into. Test `.complete` first: a finished
    stage with the same digest need not run. `resumable=True` keeps an interrupted folder of the
    same digest, so that its work can go on.
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
        self.out, self.name, self.config, self.inputs = out, name, config, inputs
        self.resumable = resumable
        self.digest = digest(name, config.model_dump(mode="json"), inputs, regrow.__version__)
        self.resume_digest = resume_digest or self.digest
        self.figures: list[Figure] = []
        self.extra: dict[str, Any] = {}
        self.started = time.time()
        self.meter = Meter()
        self.partial = out.parent / f".{out.name}.partial"
        if distributed.is_main():
            recover(out)
        refuse_foreign(out, name)

    @property
    def complete(self) -> bool:
        """Whether `out` already holds this stage's result for this config and these inputs."""
        found = read(self.out)
        return found is not None and found.get("digest") == self.digest

    def __enter__(self) -> Path:
        if distributed.is_main():
            self._begin()
        distributed.wait()
        return self.partial

    def _begin(self) -> None:
        self.meter.start()
        mark = self.partial / MARK
        same = mark.exists() and mark.read_text() == self.resume_digest
        if self.partial.exists() and not (self.resumable and same):
            shutil.rmtree(self.partial)
        self.partial.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            mark.write_text(self.resume_digest)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
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
        """What was done, as written to manifest.json."""
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
            raise UserError(f"{out} is what is read here: give --out another folder")


def refuse_foreign(out: Path, stage: str | None = None) -> None:
    """Raise UserError when `out` is a file or holds what no stage (or not `stage`) wrote."""
    blocked = next((place for place in (out, *out.parents) if place.is_file()), None)
    if blocked is not None:
        raise UserError(f"{blocked} is a file: give --out a folder that is new or empty")
    if not out.is_dir() or not any(out.iterdir()):
        return
    found = read(out) or {}
    if "digest" not in found or "stage" not in found:
        raise UserError(f"{out} holds something else: give --out a folder that is new or empty")
    if stage is not None and found["stage"] != stage:
        raise UserError(
            f"{out} holds the result of {found['stage']}: give {stage} a new or empty folder"
        )


def replace_folder(new: Path, out: Path) -> None:
    """Put the folder `new` in the place of `out` by renames; what was in `out` goes last."""
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def link(source: str, target: str) -> None:
    """A hard link where the disk can, else a copy: for files that are replaced, never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def recover(out: Path) -> None:
    """Finish what a kill between the two renames of `replace_folder` left: no folder at `out`."""
    old, new = out.parent / f".{out.name}.old", out.parent / f".{out.name}.partial"
    if old.exists() and not out.exists():
        (new if read(new) is not None and not (new / MARK).exists() else old).rename(out)


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
    """Whether `error` says that a disk or quota is full, if only by a library's own exception."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return error is not None and "No space left on device" in str(error)
