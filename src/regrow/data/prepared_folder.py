"""What a folder of prepared text was made from; read without any heavy import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from regrow import stage_dir
from regrow.config import Config
from regrow.data.config import SourceConfig
from regrow.data.files import content_of, local_files
from regrow.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self

INDEX = "index.json"
LAYOUT = 1
"""The version of the arrays; it is part of every digest."""


class SourceFile(Config):
    """A local file as it was when its text was prepared."""

    name: str
    """Its path inside the source's folder, or its name."""
    size: int
    """Bytes."""
    changed: int
    """Time of its last change, in nanoseconds."""
    sha256: str
    """SHA-256 of its bytes, as hex."""


class Index(Config):
    """What a prepared source was made from."""

    source: SourceConfig
    """The source that was read; a local path is absolute."""
    files: list[SourceFile]
    """Its files, if it is local."""
    tokenizer: str
    """Digest of the tokenizer."""
    seed: int
    """Seed of the splits."""
    piece: int
    """Section length of long documents, in characters."""
    order: Literal["shuffled", "files"] = "shuffled"
    """The order in which its passages are read."""
    shards: list[int] = Field(default_factory=list)
    """The number of passages in each shard."""
    tokens: int = 0
    """The number of tokens in all shards."""

    @property
    def key(self) -> str:
        """The digest of all that decides the stored tokens; names of folders are not part of it."""
        contents = [[file.name, file.sha256] for file in self.files]
        return stage_dir.digest(
            LAYOUT,
            contents or self.source.source,
            self.source.reader,
            self.tokenizer,
            self.seed,
            self.piece,
        )


class PreparedFolder:
    """The folder of one prepared source; raises UserError if its index is broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.index = Index.model_validate_json((folder / INDEX).read_bytes())
        except (OSError, ValidationError):
            raise broken(folder) from None

    @classmethod
    def of(cls, source: SourceConfig) -> Self | None:
        """The prepared tokens in a source's folder; None for any other source."""
        folder = Path(source.source).expanduser()
        return cls(folder) if (folder / INDEX).is_file() else None

    @property
    def digest(self) -> str:
        """The digest of the tokens and of the order in which they are read."""
        return stage_dir.digest(self.index.key, self.index.order)

    def check_source(self) -> None:
        """Raise UserError if the source's files have changed; they may be absent.

        A file whose size and time of change are the same is not read.
        """
        source = self.index.source.source
        if not self.index.files or not Path(source).exists():
            return
        before = {file.name: file for file in self.index.files}
        now = {name_in(path, source): path for path in local_files(source)}
        differs = sorted(before.keys() ^ now.keys())
        differs += [
            name for name in before.keys() & now.keys() if _changed(before[name], now[name])
        ]
        if differs:
            raise UserError(
                f"{self.folder} was prepared before {source} changed ({differs[0]}): run regrow "
                "prepare again"
            )


def name_in(file: Path, source: str) -> str:
    """The path of a file inside a source that is a folder, or its name."""
    root = Path(source).expanduser()
    return str(file.relative_to(root)) if root.is_dir() else file.name


def _changed(before: SourceFile, path: Path) -> bool:
    stat = path.stat()
    if stat.st_size != before.size:
        return True
    if stat.st_mtime_ns == before.changed:
        return False
    return content_of(path, stat.st_size, stat.st_mtime_ns) != before.sha256


def broken(folder: Path) -> UserError:
    """The error for a prepared folder that cannot be read."""
    return UserError(f"{folder} is broken: delete the prepared folder and run regrow prepare again")
