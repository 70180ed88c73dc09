"""Where an export goes: a stage's folder, or a .gguf file of any name among other files."""

from __future__ import annotations

import shutil
from pathlib import Path

from regrow import stage_dir
from regrow.config import Config
from regrow.errors import UserError
from regrow.stage_dir import StageDir

MODELFILE = "Modelfile"


CARD = "README.md"


class FileStageDir(StageDir):
    """A stage whose result is a file, NAME.gguf, and NAME.* beside it, among files of others.

    The other files are put in place first, the large one last, each by a rename; a kill leaves the
    old ones or the new ones, and a hidden folder that the next run clears.
    """

    def __init__(self, file: Path, name: str, config: Config, inputs: dict[str, str]) -> None:
        self.file = file
        super().__init__(file.parent / f".{file.name}.export", name, config, inputs)
        if file.is_dir():
            raise UserError(f"{file} is a folder: give --out another name, or a folder")
        if file.exists() and self._found() is None:
            raise UserError(
                f"{file} is there and was not written by regrow export: give --out another name"
            )

    def _beside(self, name: str) -> Path:
        return self.file.with_name(f"{self.file.stem}.{name}")

    def _found(self) -> dict[str, object] | None:
        path = self._beside(stage_dir.NAME)
        return stage_dir.read_file(path) if path.exists() else None

    @property
    def complete(self) -> bool:
        """Whether the file is there, made by this config of these inputs."""
        found = self._found()
        return self.file.exists() and found is not None and found.get("digest") == self.digest

    def _finish(self) -> None:
        stage_dir.write_json(self.partial / stage_dir.NAME, self.manifest())
        (self.partial / stage_dir.MARK).unlink()
        for path in sorted(self.partial.iterdir(), key=lambda path: path.suffix == ".gguf"):
            path.replace(self.file if path.suffix == ".gguf" else self._beside(path.name))
        shutil.rmtree(self.partial)


def stage_at(
    out: Path, name: str, config: Config, inputs: dict[str, str], default: str
) -> tuple[StageDir, str]:
    """The stage that writes to `out`, a folder or NAME.gguf, and the name of the GGUF file."""
    if out.suffix == ".gguf":
        return FileStageDir(out, name, config, inputs), out.name
    return StageDir(out, name, config, inputs), default
