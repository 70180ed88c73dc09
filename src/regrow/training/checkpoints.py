"""The checkpoints that transformers' Trainer writes into a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from regrow.runtime import distributed


def last_checkpoint(trainer: Path) -> Path | None:
    """The newest complete checkpoint; removes the incomplete ones of a killed run.

    transformers writes trainer_state.json last.
    """
    folders = sorted(trainer.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    complete = None
    for path in folders:
        if _is_json(path / "trainer_state.json"):
            complete = path
        elif distributed.is_main():
            shutil.rmtree(path)
    return complete


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
