"""The kernel of attention over packed documents.

A sequence has several documents, whose positions restart at 0. transformers finds their borders in
the positions. For sdpa it builds a mask [B, 1, T, T], with which no flash kernel runs; for
flex_attention it builds the blocks in which a document attends to itself, and skips the others.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from regrow.errors import MOST_CHARACTERS, UserError
from regrow.runtime.precision import autocast
from regrow.training.model_check import check_model


def set_attention(model: PreTrainedModel, attention: str, check: bool = True) -> None:
    """Let a model compute attention with another kernel, and `check` that it keeps documents apart.

    Raises UserError for a model that has no such kernel, or that cannot run with it here.
    """
    name = model.config.model_type
    try:
        model.set_attn_implementation(attention)
        if check:
            check_model(model)
            _run_in_half_precision(model)
    except UserError as error:
        raise UserError(f"attention {attention}: {error}; leave the option out") from None
    except Exception as error:  # whatever a model class or a compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:MOST_CHARACTERS]
        raise UserError(
            f"attention {attention}: {name} cannot run with it here ({reason}); "
            "leave the option out"
        ) from None


@torch.no_grad()
def _run_in_half_precision(model: PreTrainedModel) -> None:
    """A short pass as in a training, where queries and values may come in different dtypes."""
    ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    with autocast(model.device):
        model.base_model(input_ids=ids, position_ids=ids.cumsum(-1), use_cache=False)
