"""A lock on an output, so that two processes never write to it at the same time.

It is an flock on a hidden file that names the process. The system frees it when the process ends,
even if it is killed. `filelock` is not used here: a second process would empty the file, and where
flock is missing, a kill would leave a lock that nobody frees.
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Literal

from regrow.errors import UserError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None  # type: ignore[assignment]

PATIENCE = 0.5
"""Seconds in which a lock may become free: `state` holds it for an instant."""


class Lock:
    """The lock in the file `path` on the output `out`; the file is deleted when it is released.

    On a file system without locks, and in a folder that cannot be written to, it excludes nobody.
    """

    def __init__(self, path: Path, out: Path) -> None:
        self.path, self.out = path, out
        self.file: FileIO | None = None

    def acquire(self) -> None:
        """Take the lock unless it is held already; raises UserError if another process has it."""
        end = time.monotonic() + PATIENCE
        while self.file is None:
            try:
                file = FileIO(self.path, "a+")
            except OSError:
                return
            if self._take(file):
                self.file = file
                return
            file.close()
            if time.monotonic() > end:
                raise UserError(
                    f"{self.out} is being written by another regrow process{_holder(self.path)}: "
                    "wait for it, or stop it"
                )
            time.sleep(0.02)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self.file is not None:
            with suppress(OSError):
                self.path.unlink()
            self.file.close()
            self.file = None

    def refuse(self) -> None:
        """Raise UserError if another process has the lock; delete the file of a killed process."""
        if self.path.exists():
            self.acquire()
            self.release()

    def _take(self, file: FileIO) -> bool:
        """Lock the open file and write the process into it; False if another process has it."""
        try:
            _flock(file)
        except BlockingIOError:
            return False
        except OSError:  # this file system has no locks
            pass
        with suppress(OSError):  # the disk may be full
            file.truncate(0)
            file.write(f"{os.getpid()} on {socket.gethostname()}".encode())
        try:  # the process that had the lock may have deleted the file in the meantime
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def state(path: Path) -> Literal["held", "free", "unknown"]:
    """Whether a process has the lock in the file `path`.

    Unknown where the file system has no locks; and where the process was on another host, as some
    network file systems keep the locks of each host to themselves.
    """
    try:
        with FileIO(path, "r") as file:
            _flock(file, shared=True)
    except FileNotFoundError:
        return "free"
    except BlockingIOError:
        return "held"
    except OSError:
        return "unknown"
    return "free" if _holder(path).endswith(f" on {socket.gethostname()})") else "unknown"


def _flock(file: FileIO, shared: bool = False) -> None:
    """Lock an open file; raises BlockingIOError if it is locked, OSError if there are no locks."""
    if fcntl is None:
        raise OSError("this system has no flock")
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file.fileno(), kind | fcntl.LOCK_NB)


def _holder(path: Path) -> str:
    """The process that has taken the lock last, for messages; empty if it is not known."""
    try:
        text = path.read_text()
    except (OSError, ValueError):
        return ""
    return f" ({text})" if text else ""
