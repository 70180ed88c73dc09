"""Another orthonormal basis for the residual stream; the model's output stays the same.

RMSNorm without its gain g divides by a length, which no rotation changes (SliceGPT; Ashkboos et
al., 2024, arXiv:2401.15024). With x = Q x' and the gains moved into what reads the norms' outputs,

    embedding  E' = E Q         reader  W' = W diag(g) Q         writer  W' = Qᵀ W,  b' = Qᵀ b

and all gains 1. SliceGPT rotates each layer's stream by its own Q, which needs matrices between
layers that no stock checkpoint has; here one Q is used for the whole model. The output head takes
the gain of the last norm and the embedding takes none, so that the two can no longer be tied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.families import Family, TensorRef

Read = Callable[[str], Tensor]


def check(family: Family) -> None:
    """Raise UserError for a family whose residual stream cannot be rotated."""
    if family.post_norm:
        raise UserError(
            f"{family.model_type} has norms after its attention and MLP, whose gains belong to "
            "single channels: it cannot be rotated; cut hidden without a rotation"
        )


def principal(moment_HH: Tensor) -> Tensor:
    """Eigenvectors [H, H] of a second moment as columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moment_HH)[1].flip(-1)


def rotated_config(config: dict[str, Any]) -> dict[str, Any]:
    """The rotated model's config.json: it has an untied lm_head."""
    return {**config, "tie_word_embeddings": False}


def rotated_tensors(
    names: list[str], read: Read, family: Family, config: dict[str, Any], basis_HH: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the rotated model, in the order of `names`, each in its dtype."""
    tied = not family.exists(family.tensors[family.head], config)
    for name in names:
        if name == family.head and tied:
            continue
        yield name, _rotated(name, read(name), read, family, basis_HH)
        if name == family.embedding and tied:
            yield family.head, _rotated(family.head, read(name), read, family, basis_HH)


def layout(
    names: list[str], meta: Read, family: Family, config: dict[str, Any]
) -> dict[str, Tensor]:
    """The tensors of `rotated_tensors`, on the meta device."""
    tied = not family.exists(family.tensors[family.head], config)
    tensors = {}
    for name in names:
        if name != family.head or not tied:
            tensors[name] = meta(name)
        if name == family.embedding and tied:
            tensors[family.head] = meta(name)
    return tensors


def _rotated(name: str, tensor: Tensor, read: Read, family: Family, basis_HH: Tensor) -> Tensor:
    place = family.find(name)
    assert place is not None, name
    row = family.tensors[place.template]
    if not row.has("hidden"):
        return tensor
    if row.norm:
        return torch.full_like(tensor, 1.0 - family.norm_offset)
    wide = tensor.to(basis_HH.dtype)
    if row.axes[0] == "hidden":
        wide = basis_HH.T @ wide
    else:
        norm = family.norm_before(place.template)
        if norm is not None:
            gain_H = read(TensorRef(norm, place.layer).name).to(basis_HH.dtype) + family.norm_offset
            wide = wide * gain_H
        wide = wide @ basis_HH
    return wide.to(tensor.dtype)
