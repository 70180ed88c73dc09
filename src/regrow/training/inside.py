"""What can be read inside a model on a batch, beside its final hidden states.

Shapes: B blocks, T tokens, H hidden channels, A attention heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from regrow.errors import UserError
from regrow.training.head import Head

if TYPE_CHECKING:
    from regrow.training.teacher import States

EAGER = "eager"
"""The attention of transformers that gives its weights away; the fused ones never form them."""


class Inside(NamedTuple):
    """One model's states on a batch, and how it would read one of them out."""

    layers: tuple[Tensor, ...]
    """[B, T, H] each: the embedding's output, then every block's; the last is after the norm."""
    attentions: tuple[Tensor, ...]
    """[B, A, T, T] each: the weights, by query and key, of every layer; empty unless asked for."""
    norm: Callable[[Tensor], Tensor]
    """The final norm."""
    head: Head


def inside(model: Any, states: States, head: Head) -> Inside:
    """The states of `model` with its final norm and the head to read them by."""
    return Inside(states.layers, states.attentions, final_norm(model), head)


def final_norm(model: Any) -> Callable[[Tensor], Tensor]:
    """The norm before the output head; UserError for a model that has none where all others do."""
    found: Callable[[Tensor], Tensor] | None = getattr(model.base_model, "norm", None)
    if found is None:
        raise UserError(f"{model.config.model_type}: no final norm found; inner signals need one")
    return found


def give_attentions(model: Any) -> None:
    """Make the model form its attention weights, by eager attention."""
    model.set_attn_implementation(EAGER)
