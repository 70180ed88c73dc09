"""Another orthonormal basis for the residual stream of a model that computes the same.

RMSNorm without its gain g divides by a length, which no rotation changes (SliceGPT; Ashkboos et
al., 2024, arXiv:2401.15024). With x = Q x' and the gains moved into what reads the norms' outputs,

    embedding  E' = E Q         reader  W' = W diag(g) Q         writer  W' = Qᵀ W,  b' = Qᵀ b

and all gains 1. SliceGPT turns each layer's stream by itself, which takes matrices between layers
that no stock checkpoint has; here one Q serves the whole model. The output head reads the last norm
and the embedding none, so that the two can no longer be tied.
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
    """Raise UserError for a family whose residual stream cannot be turned."""
    if family.post_norm:
        raise UserError(
            f"{family.model_type} has norms between its blocks and the residual stream, whose "
            "gains belong to single channels: it cannot be rotated; cut hidden without"
        )


def principal(moment_HH: Tensor) -> Tensor:
    """Eigenvectors [H, H] of a second moment as columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moment_HH)[1].flip(-1)


def rotated_config(config: dict[str, Any]) -> dict[str, Any]:
    """The rotated model's config.json: its head is a tensor of its own."""
    return {**config, "tie_word_embeddings": False}


def turned(
    names: list[str], read: Read, family: Family, config: dict[str, Any], basis_HH: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the rotated model, in the order of `names`, each in its dtype."""
    tied = not family.exists(family.tensors[family.head], config)
    for name in names:
        if name == family.head and tied:
            continue
        yield name, _turned(name, read(name), read, family, basis_HH)
        if name == family.embedding and tied:
            yield family.head, _turned(family.head, read(name), read, family, basis_HH)


def layout(
    names: list[str], meta: Read, family: Family, config: dict[str, Any]
) -> dict[str, Tensor]:
    """What `turned` will give, each tensor on the meta device."""
    tied = not family.exists(family.tensors[family.head], config)
    found = {}
    for name in names:
        if name != family.head or not tied:
            found[name] = meta(name)
        if name == family.embedding and tied:
            found[family.head] = meta(name)
    return found


def _turned(name: str, tensor: Tensor, read: Read, family: Family, basis_HH: Tensor) -> Tensor:
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
