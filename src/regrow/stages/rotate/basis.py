"""Change the orthonormal basis of the residual stream without changing the model's output.

RMSNorm without its gain g divides by a length, which no rotation changes (SliceGPT; Ashkboos et
al., 2024, arXiv:2401.15024). Let x = Q x', and multiply the gains into the readers of the norms:

    embedding  E' = E Q         reader  W' = W diag(g) Q         writer  W' = Qᵀ W,  b' = Qᵀ b

and set all gains to 1. SliceGPT rotates each layer's stream by its own Q, which needs extra
matrices between layers, and standard checkpoints have none. Here one Q is used for the whole model.
The output head absorbs the gain of the last norm, but the embedding absorbs no gain, so the two can
no longer be tied.
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
    if family.derived:
        raise UserError(
            f"{family.model_type} cannot be rotated: its table is derived, and does not say which "
            "norm each projection reads; cut hidden without a rotation"
        )
    if reason := family.refused.get("hidden"):
        raise UserError(f"{family.model_type} cannot be rotated: {reason}")
    if family.post_norm:
        raise UserError(
            f"{family.model_type} has norms after its attention and MLP, whose gains belong to "
            "single channels: it cannot be rotated; cut hidden without a rotation"
        )


def principal(moment_HH: Tensor) -> Tensor:
    """The eigenvectors [H, H] of a second moment, as columns, the largest eigenvalue first."""
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
    """The names, shapes and dtypes of `rotated_tensors`, as tensors on the meta device."""
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
