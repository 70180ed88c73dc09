"""Calibration text, and the part of it that only serves to measure the changed model."""

from __future__ import annotations

from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.data.sequences import Sequences, held_out
from regrow.errors import UserError
from regrow.training.text import text_for

Batches = list[dict[str, Tensor]]


def calibration_text(
    checkpoint: Checkpoint, data: DataConfig | None, samples: int, batch_size: int
) -> tuple[Batches, Batches]:
    """Batches to calibrate on, and batches to measure on: every eighth of `samples` sequences.

    Without `data` there are none. Raises UserError for too little text.
    """
    if data is None:
        return [], []
    tokenizer = checkpoint.tokenizer()
    sequences = text_for([checkpoint.config], data, tokenizer, "calibration", samples, checkpoint)
    if len(sequences) < 2:
        raise UserError(
            "too little text: 1 calibration sequence, and one is needed to calibrate on and one to "
            "measure on; add text or raise calibration_fraction"
        )
    numbers = range(len(sequences))
    unseen = [n for n in numbers if held_out(n)] or [len(sequences) - 1]
    fit = [n for n in numbers if n not in unseen]
    return (
        list(_rows(sequences, fit).batches(batch_size)),
        list(_rows(sequences, unseen).batches(batch_size)),
    )


def _rows(sequences: Sequences, numbers: list[int]) -> Sequences:
    return Sequences(
        sequences.input_ids[numbers],
        sequences.position_ids[numbers],
        sequences.labels[numbers],
        sequences.real[numbers],
    )
