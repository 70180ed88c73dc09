"""A distillation by two processes gives what one gives."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from safetensors.torch import load_file
from tiny_distillation import (
    CONFIG,
    OPTIONS,
    STEPS,
    data,
    held_out,
    rows_of,
    write_place,
)
from tiny_training import start_ranks
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.stages.distill.stage import distill
from regrow.training.callbacks import ProgressCallback
from regrow.training.trainer import DistillTrainer

LORA = CONFIG.model_copy(update={"adapter": "lora", "lora_rank": 3, "keep_adapters": True})


def _distill(rank: int, place: str, out: str) -> None:
    where = Path(place)
    distill(where / "pruned", where / "teacher", data(where), Path(out), CONFIG, OPTIONS)


def _distill_both(rank: int, place: str, out: str) -> None:
    """All weights, and adapters."""
    _distill(rank, place, out)
    where = Path(place)
    distill(where / "pruned", where / "teacher", data(where), where / "lora-2", LORA, OPTIONS)


def _killed(rank: int, place: str, out: str) -> None:
    """Rank 1 is killed in step 7; rank 0 says so in one line, and where the job goes on."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the starter ends the others, as torchrun does
    began = ProgressCallback.on_step_begin

    def die(self: ProgressCallback, args: object, state: Any, control: object, **_: object) -> None:
        if state.global_step == 6 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    ProgressCallback.on_step_begin = die  # type: ignore[method-assign]
    with pytest.raises(UserError, match="another process of this job has ended") as caught:
        _distill(rank, place, out)
    ProgressCallback.on_step_begin = began  # type: ignore[method-assign]
    (Path(place) / "said").write_text(str(caught.value))
    os._exit(2)


def _not_finite(rank: int, place: str, out: str, step: str) -> None:
    """The loss of rank 1 alone becomes NaN in a step; each rank writes down what it says."""
    stock = DistillTrainer.compute_loss

    def spoiled(self: DistillTrainer, *arguments: Any, **fields: Any) -> Any:
        loss = stock(self, *arguments, **fields)
        return (
            loss * float("nan") if rank == 1 and self.state.global_step == int(step) - 1 else loss
        )

    DistillTrainer.compute_loss = spoiled  # type: ignore[method-assign]
    with pytest.raises(UserError) as caught:
        _distill(rank, place, out)
    Path(f"{out}.{rank}").write_text(str(caught.value))


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names()}


def test_nan_on_another_rank_is_told_on_all_of_them(tmp_path: Path) -> None:
    """Before there is a checkpoint (they come every 4 steps), and after."""
    place = write_place(tmp_path / "place")
    for step in (2, 7):
        out = tmp_path / f"out{step}"
        start_ranks(2, _not_finite, str(place), str(out), str(step))
        messages = {Path(f"{out}.{rank}").read_text() for rank in (0, 1)}
        assert len(messages) == 1
        stopped = Path(f"{out}-stopped")
        saved = f"the last good checkpoint (checkpoint-4) is kept in {stopped}"
        if step == 2:
            saved = "no checkpoint had been written yet, and the student is unchanged"
        expected = f"the loss became nan at step {step}; {saved}; lower the learning rate"
        assert messages == {expected}
        assert (stopped / "model.safetensors").exists() == (step == 7)


def test_two_ranks_write_the_student_of_one_also_after_a_kill(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    one, out = tmp_path / "one", tmp_path / "several" / "out"
    distill(place / "pruned", place / "teacher", data(place), one, CONFIG, OPTIONS)
    with pytest.raises(torch.multiprocessing.ProcessExitedException):
        start_ranks(2, _killed, str(place), str(out))
    assert (place / "said").read_text().endswith("it continues from checkpoint-4")
    start_ranks(2, _distill_both, str(place), str(out))
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    alone, together = held_out(one), held_out(out)
    assert list(together) == list(alone)
    assert [row["step"] for row in rows_of(out) if "loss" in row] == list(range(1, STEPS + 1))
    for step, value in alone.items():
        assert together[step] == pytest.approx(value, rel=1e-3)
    expected = weights(one)
    for name, value in weights(out).items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-2, name
    alone_too = distill(
        place / "pruned", place / "teacher", data(place), place / "lora-1", LORA, OPTIONS
    )
    assert held_out(place / "lora-2") == pytest.approx(held_out(alone_too), rel=1e-3)
    one_pair, two_pair = (
        load_file(place / name / "adapter" / "adapter_model.safetensors")
        for name in ("lora-1", "lora-2")
    )
    assert one_pair.keys() == two_pair.keys()
    for name, value in one_pair.items():
        assert float((two_pair[name] - value).norm()) < 0.1 * float(value.norm()), name
