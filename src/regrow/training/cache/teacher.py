"""A teacher whose outputs are read from a cache; only its head is loaded.

Shapes: B sequences, T tokens, N scored tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.training.cache.folder import Cache, sequence_keys
from regrow.training.cache.sparse import Sparse
from regrow.training.head import Head, scale_of
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import States, scored

ANY_CACHE = ("forward_kl", "cross_entropy")


class CachedTeacher:
    """Replaces a Teacher; its outputs for a batch come from a cache."""

    def __init__(self, cache: Cache, head: Head) -> None:
        self.cache, self.head = cache, head

    def sparse(self, batch: dict[str, Tensor]) -> Sparse | None:
        """The stored distributions [N] of a batch; None if hidden states are stored instead."""
        split, keys = self._find(batch)
        form = self.cache.formats[split]
        if form.STATES:
            return None
        parts = [form.decode(self.cache.stores[split].read(key)) for key in keys]
        if not parts:
            return Sparse.nothing(self.cache.header.vocab_size, batch["labels"].device)
        return Sparse.join(parts).to(batch["labels"].device)  # type: ignore[arg-type]

    def hidden(self, batch: dict[str, Tensor], **reads: bool) -> States:
        """The final hidden states: those of the live teacher if the token is scored, else 0."""
        assert not any(reads.values()), "a cache has no states of inner layers"
        split, keys = self._find(batch)
        mask = scored(batch)
        size = self.cache.header.hidden_size
        final = torch.zeros(*mask.shape, size, dtype=torch.bfloat16, device=mask.device)
        parts = [self.cache.formats[split].decode(self.cache.stores[split].read(k)) for k in keys]
        if parts:
            final[mask] = torch.cat(parts).to(mask.device)  # type: ignore[arg-type]
        return States(final, ())

    def compared(self, head: Head, targets_N: Tensor) -> tuple[Head, Tensor]:
        """Return the student's head and targets unchanged; both models have the same tokens."""
        return head, targets_N

    def _find(self, batch: dict[str, Tensor]) -> tuple[str, list[bytes]]:
        """The split of a batch, and the keys of its sequences that have a scored token."""
        there = scored(batch).any(-1).tolist()
        keys = [key for key, some in zip(sequence_keys(batch), there, strict=True) if some]
        for split, store in self.cache.stores.items():
            if all(key in store for key in keys):
                return split, keys
        raise UserError(
            f"a sequence is not in the cache {self.cache.folder}: run regrow cache again"
        )


def head_from(teacher: Checkpoint, device: torch.device) -> Head:
    """Load only the output head of a checkpoint, in bfloat16."""
    family = families.of(teacher)
    name = family.head if family.head in teacher.names() else family.embedding
    weight_VH = teacher.tensor(name).to(device, torch.bfloat16)
    softcap = teacher.config.get("final_logit_softcapping")
    return Head(weight_VH, softcap, scale_of(teacher.config))


def check_use(format: str, mix: LossWeights, needs_layers: bool) -> None:
    """Raise UserError for losses that a cache cannot support: on features, or on all logits.

    `format` is the format of the training sequences.
    """
    if needs_layers:
        raise UserError("feature losses need the live teacher: leave out the cache, or them")
    if format == "hidden":
        return
    what = beyond_forward_kl(mix)
    if what is not None:
        raise UserError(
            f"{what} needs all of the teacher's logits, and the cache has {format}: make one with "
            "--format hidden, or use forward_kl at temperature 1"
        )


def beyond_forward_kl(mix: LossWeights) -> str | None:
    """The loss, or the temperature, that a distribution of few known ids is not enough for."""
    terms = [term for each in mix.groups for term in each.terms()]
    others = [loss for loss, _, _, needs in terms if needs and loss not in ANY_CACHE]
    if others:
        return f"the loss {others[0]}"
    return None if mix.temperature == 1.0 else f"temperature {mix.temperature:g}"
