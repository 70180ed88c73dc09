"""The residual streams of two models over the same text, taken from layer to layer.

Shapes: B sequences, T tokens, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.data.sequences import Sequences
from regrow.layerwise import LayerByLayer, Spill

SHARE_OF_RAM = 0.3
"""Share of the host's free memory that streams may take; larger ones go to disk."""


def spilled_bytes(
    text: Iterable[Sequences], models: Iterable[Checkpoint], dtype: torch.dtype
) -> int:
    """Bytes of the models' streams over the text if they go to disk; 0 if they stay in memory."""
    tokens = sum(len(sequences) * sequences.length for sequences in text)
    width = sum(int(model.config["hidden_size"]) for model in models)
    size = tokens * width * dtype.itemsize
    return size if size > SHARE_OF_RAM * psutil.virtual_memory().available else 0


class Streams:
    """Per batch, the teacher's and the student's hidden states after the layers run so far.

    They are kept below `folder` or, if it is None, in the host's memory. A device has those of one
    batch.
    """

    def __init__(
        self,
        folder: Path | None,
        batches: list[dict[str, Tensor]],
        dense: LayerByLayer,
        cut: LayerByLayer,
    ) -> None:
        self.batches, self._models = batches, {"dense": dense, "cut": cut}
        self._kept: dict[str, dict[int, Tensor] | Spill] = {
            name: {} if folder is None else Spill(folder / name) for name in ("dense", "cut")
        }
        self._begun = {"dense": False, "cut": False}

    def dense(self, number: int) -> Tensor:
        """The teacher's stream [B, T, H] of a batch."""
        return self._get("dense", number)

    def cut_input(self, number: int) -> Tensor | None:
        """The student's stream [B, T, H] of a batch; None before the first layer."""
        return self._get("cut", number) if self._begun["cut"] else None

    @torch.no_grad()
    def advance_dense(self, layers: Iterable[int], ids_V: Tensor | None) -> None:
        """Take the teacher's stream through these layers; `ids_V` are its ids of the tokens."""
        for layer in layers:
            self._advance("dense", layer, ids_V)

    @torch.no_grad()
    def advance_cut(self, layer: int) -> None:
        """Take the student's stream through a layer, with the weights that it has now."""
        self._advance("cut", layer, None)

    def _advance(self, name: str, layer: int, ids_V: Tensor | None) -> None:
        model = self._models[name]
        with model.resident(layer):
            for number, batch in enumerate(self.batches):
                if ids_V is not None:
                    batch = {**batch, "input_ids": ids_V[batch["input_ids"]]}
                hidden = self._get(name, number) if self._begun[name] else None
                self._put(name, number, model.step(batch, hidden))
        self._begun[name] = True

    def _put(self, name: str, number: int, tensor: Tensor) -> None:
        kept = self._kept[name]
        if isinstance(kept, Spill):
            kept.put(number, tensor)
        else:
            kept[number] = tensor.cpu()

    def _get(self, name: str, number: int) -> Tensor:
        kept = self._kept[name]
        return kept.get(number) if isinstance(kept, Spill) else kept[number]
