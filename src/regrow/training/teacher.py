"""The teacher: outside every module tree, in eval mode, giving final hidden states and its head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from regrow.training.head import Head, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Teacher:
    """A frozen model. A plain object, so that no trainer registers, trains or saves it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def hidden(self, batch: dict[str, Tensor]) -> Tensor:
        """Final hidden states [B, T, H] in the teacher's own dtype, outside any autocast."""
        assert not self.model.training, "the teacher left eval mode"
        with torch.autocast(batch["input_ids"].device.type, enabled=False):
            return final_hidden(self.model, batch)

    @property
    def head(self) -> Head:
        """The teacher's output head."""
        return head_of(self.model)


def final_hidden(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The hidden states [B, T, H] that the output head reads, after the last norm."""
    device = model.device
    outputs = model.base_model(
        input_ids=batch["input_ids"].to(device),
        position_ids=batch["position_ids"].to(device),
        use_cache=False,
    )
    hidden_BTH: Tensor = outputs.last_hidden_state
    return hidden_BTH[:, :-1]


def scored(batch: dict[str, Tensor]) -> Tensor:
    """Which of the T − 1 predicting positions are scored [B, T − 1]: t is scored by label t + 1."""
    return batch["labels"][:, 1:] != -100
