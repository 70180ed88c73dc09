"""Checks each loaded model: our head reproduces its logits, and packed documents stay separate.

Many model types compute logits differently, or let packed documents attend to each other. Every
figure of such a model would be wrong without an error message. One short forward pass detects it.

Shapes: B sequences, T tokens, H hidden channels, V vocabulary entries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.errors import UserError
from regrow.training.head import head_of

LENGTH = 8
"""The number of tokens in each of the two documents."""
LARGEST_LOGIT = 30.0
"""The largest logit after scaling the states; a soft cap would hardly change smaller logits."""


@torch.no_grad()
def check_model(model: PreTrainedModel, packed: bool | None = None) -> None:
    """Raise UserError for a model with unsupported logits or mixed packed documents.

    Two rows of two documents run in one batch, and only the first document differs between the
    rows. With `packed`, the states of the second document must be equal in both rows; by default
    it is true unless the model's table says that it mixes documents, whose text is then not packed
    (`training.text`). The logits of the model must equal those of `head_of` on the same states.
    """
    name, head = model.config.model_type, head_of(model)
    if packed is None:
        packed = not families.mixes(model.config.to_dict())
    states: list[Tensor] = []

    def scale(module: Any, arguments: Any, outputs: Any) -> Any:
        states.append(outputs.last_hidden_state)
        logits_NV = head.logits(states[0].flatten(0, 1), head.weight_VH)
        largest = float(logits_NV.abs().max())
        states.append(states[0] * (LARGEST_LOGIT / largest if 0 < largest < math.inf else 1.0))
        outputs.last_hidden_state = states[1]
        return outputs

    hook = model.base_model.register_forward_hook(scale)
    try:
        outputs = model(**_inputs(model), use_cache=False)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{name} cannot run on packed text: {error}") from None
    finally:
        hook.remove()
    if not states:
        raise UserError(f"{name} does not run its base model as a whole: not supported")
    tolerance = torch.finfo(states[0].dtype).eps ** 0.75
    logits_BTV = head.logits(states[1].flatten(0, 1), head.weight_VH).view_as(outputs.logits)
    if not bool(logits_BTV.isfinite().all()):
        return  # broken weights: a later loss or figure is not finite and raises an error
    if not _equal(outputs.logits, logits_BTV, tolerance):
        raise UserError(f"{name} transforms its logits in a way that is not supported")
    first_TH, second_TH = states[0][:, LENGTH:]
    if packed and not _equal(first_TH, second_TH, tolerance / 8):  # most models: exactly equal
        raise UserError(
            f"{name} lets the documents of a packed sequence attend to each other: not supported"
        )


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Token and position ids [2, 2 · LENGTH]; only the first document differs between the rows."""
    size = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    row_T = torch.randint(size, (2 * LENGTH,), generator=generator)
    other_T = row_T.clone()
    other_T[:LENGTH] = (row_T[:LENGTH] + size // 2) % size
    position_ids = torch.arange(LENGTH).repeat(2, 2)
    inputs = {"input_ids": torch.stack([row_T, other_T]), "position_ids": position_ids}
    return {key: tensor.to(model.device) for key, tensor in inputs.items()}


def _equal(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether the mean relative distance between vectors (last axis) is within the tolerance."""
    one, other = one.double(), other.double()
    distance = (one - other).norm(dim=-1) / one.norm(dim=-1).clamp_min(1e-9)
    return float(distance.mean()) <= tolerance
