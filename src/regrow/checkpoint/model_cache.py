"""Models that were converted once and are kept in the cache folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from regrow import stage_dir
from regrow.config import cache_folder
from regrow.runtime.progress import say


def cached_model(name: str, what: str, write: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; if it is not there, `write` fills it, and a line says `what`.

    Where several processes ask for it at once, the first one writes it and the others wait.
    """
    out = cache_folder() / "models" / name
    partial = out.parent / f".{name}.partial"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{name}.lock"):
        if (out / "config.json").exists():
            return out
        say(f"{what} to {out}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            write(partial)
            stage_dir.replace_folder(partial, out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return out
