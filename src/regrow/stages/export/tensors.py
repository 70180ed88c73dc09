"""The tensors of a GGUF file, one by one, from those of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.stages.export import rope

if TYPE_CHECKING:
    import numpy as np
    import torch

INTERLEAVED = ("llama",)
"""Architectures for which llama.cpp rotates neighbouring rows of a head together; transformers, and
llama.cpp for the others, a row of the first half with one of the second."""


@dataclass(frozen=True)
class Entry:
    """A tensor of the file, and what it is made of."""

    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    """As in torch: rows before columns; the experts' first."""
    template: str
    """Row of the family's table."""
    parts: tuple[str, ...]
    """Names on disk: one, or each expert's."""


def entries(checkpoint: Checkpoint, family: Family) -> list[Entry]:
    """Every tensor of the file made from the checkpoint's, layer after layer."""
    from gguf import get_tensor_name_map

    config = checkpoint.config
    layers = family.sizes(config)["layers"]
    names = get_tensor_name_map(_architecture(family), layers)
    grouped: dict[tuple[int, str], list[str]] = {}
    for template in family.tensors:
        for place in family.places(template, config):
            layer = -1 if place.layer is None else place.layer
            grouped.setdefault((layer, template), []).append(place.name)
    found = []
    for (layer, template), parts in sorted(grouped.items(), key=lambda item: item[0][0]):
        whole = template.replace("{layer}", str(layer)).replace("experts.{expert}", "experts")
        name = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf names no {whole} of {family.gguf}"
        shape = checkpoint.shapes[parts[0]]
        stacked = (len(parts), *shape) if "{expert}" in template else shape
        found.append(Entry(name, stacked, template, tuple(parts)))
    return found


def head_name(entries: list[Entry]) -> str:
    """Name of the tensor that serves as the head: of its own, or the embedding."""
    names = {entry.name for entry in entries}
    return "output.weight" if "output.weight" in names else "token_embd.weight"


def read(checkpoint: Checkpoint, family: Family, entry: Entry) -> np.ndarray:
    """The entry's values [as its shape] in float32, in llama.cpp's order of rows."""
    import torch

    parts = [checkpoint.tensor(name).float() for name in entry.parts]
    whole = torch.stack(parts) if "{expert}" in entry.template else parts[0]
    values: np.ndarray = _changed(whole, family, entry, checkpoint.config).contiguous().numpy()
    return values


def extra(config: Any, head_dim: int) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of the file that no tensor of the checkpoint stands for: factors of the rotation."""
    yield from rope.tensors(config, head_dim)


def _changed(
    whole: torch.Tensor, family: Family, entry: Entry, config: dict[str, Any]
) -> torch.Tensor:
    name = entry.template.rsplit(".", 1)[0]
    if name.endswith("norm") and family.norm_offset:
        whole = whole + family.norm_offset  # llama.cpp multiplies by what is stored
    if name.endswith("q_norm") and family.model_type == "gemma3_text":
        return whole * _query_factor(family, config)
    if family.gguf in INTERLEAVED and name.endswith(("q_proj", "k_proj")):
        (dim, *_) = family.tensors[entry.template].axes
        assert isinstance(dim, str)
        return interleaved(whole, family.sizes(config)[dim])
    return whole


def interleaved(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads × head_dim, …] with each head's two halves taken in turns: 0, h/2, 1, h/2 + 1, …

    transformers rotates row i with row i + h/2, llama.cpp's `llama` row 2i with row 2i + 1.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _query_factor(family: Family, config: dict[str, Any]) -> float:
    """What makes llama.cpp's scale of Gemma 3's queries the config's query_pre_attn_scalar^-1/2.

    llama.cpp takes 1/√head_dim and, for a model of 62 layers (the 27B), 1/√(hidden/heads).
    """
    sizes = family.sizes(config)
    theirs = sizes["head_dim"]
    if sizes["layers"] == 62:
        theirs = sizes["hidden"] // sizes["heads"]
    ours = config.get("query_pre_attn_scalar", 256)
    return float((theirs / ours) ** 0.5)


def _architecture(family: Family) -> Any:
    from gguf import MODEL_ARCH_NAMES

    return next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family.gguf)
