"""Where a distillation goes on: its last whole checkpoint, or a finished run of fewer tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from regrow import stage_dir
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.checkpoint import carry
from regrow.runtime import distributed
from regrow.runtime.progress import say
from regrow.stage_dir import StageDir
from regrow.stages.distill.config import DistillConfig

TRAINER = "trainer"


METRICS = "metrics.jsonl"


def adopt_finished(out: Path, folder: Path, stage: StageDir, config: DistillConfig) -> None:
    """Take over the trainer's state of a finished run with a smaller budget, to extend it."""
    found = stage_dir.read(out)
    if found is None or found.get("resume_digest") != stage.resume_digest:
        return
    if (folder / TRAINER).exists() or found["config"]["tokens"] > config.tokens:
        return
    say(f"distill: extends {found['config']['tokens']:,} tokens")
    partial = folder / f"{TRAINER}.partial"  # a kill must not leave half of it under its name
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(out / TRAINER, partial, copy_function=stage_dir.link)
    shutil.copyfile(out / METRICS, folder / METRICS)
    partial.rename(folder / TRAINER)


def last_checkpoint(trainer: Path) -> Path | None:
    """The newest checkpoint that is whole; what a kill left of a later one goes.

    transformers writes trainer_state.json last.
    """
    found = sorted(trainer.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = None
    for path in found:
        if _is_json(path / "trainer_state.json"):
            whole = path
        elif distributed.is_main():
            shutil.rmtree(path)
    return whole


def rescue(trainer: Path, out: Path, like: Checkpoint) -> str:
    """Keep the last good checkpoint of a run that failed beside `out`, and say where."""
    last = last_checkpoint(trainer)
    if last is None:
        return "no checkpoint had been made yet, the student is as it was"
    kept = out.parent / f"{out.name}-stopped"
    if distributed.is_main():
        shutil.rmtree(kept, ignore_errors=True)
        last.rename(kept)
        carry(like.folder, kept)
    return f"the last good checkpoint ({last.name}) is kept in {kept}"


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
