"""How a model's parameters in memory relate to the tensors that transformers writes."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.families._derive.stock import UnsupportedError
from regrow.families._derive.tiny import template_of

if TYPE_CHECKING:
    from torch import Tensor

EXPERT = re.compile(r"\.experts\.(\d+)\.")


def written(model: Any) -> dict[str, Tensor]:
    """The tensors that the model's `save_pretrained` writes, by name."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors: dict[str, Tensor] = {}
        for path in sorted(Path(folder).glob("*.safetensors")):
            tensors.update(load_file(path))
        return tensors


def on_disk(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """For each template in memory that is not on disk, the templates of its parts on disk.

    Raises UnsupportedError for a parameter that is not a concatenation of tensors on disk, or a
    stack of such concatenations for all experts.
    """
    import torch

    state = model.state_dict()
    tied = {} if "lm_head.weight" in tensors else {"lm_head.weight": ()}
    left = {n: t for n, t in tensors.items() if n not in state or not torch.equal(state[n], t)}
    memory: dict[str, tuple[str, ...]] = {}
    for name, tensor in state.items():
        template, layer = template_of(name)
        if name in tied or (name in tensors and name not in left) or template in memory:
            continue
        inside = {n: t for n, t in left.items() if template_of(n)[1] == layer}
        memory[template] = _parts(name, tensor, inside)
    known = {part for parts in memory.values() for part in parts}
    unknown = [n for n in left if EXPERT.sub(".experts.{expert}.", template_of(n)[0]) not in known]
    if unknown:
        raise UnsupportedError(f"{unknown[0]} on disk is no part of a parameter in memory")
    return memory


def _parts(name: str, tensor: Tensor, left: Mapping[str, Tensor]) -> tuple[str, ...]:
    import torch

    def found(part: Tensor) -> list[str]:
        return [n for n, t in left.items() if t.shape == part.shape and torch.equal(t, part)]

    if whole := found(tensor):
        return (template_of(whole[0])[0],)
    stacked = tensor.dim() == 3
    for count in (1, 2, 3):
        pieces = (tensor[0] if stacked else tensor).chunk(count)
        names = [found(piece) for piece in pieces]
        if len(pieces) == count and all(names):
            parts = tuple(template_of(each[0])[0] for each in names)
            return tuple(EXPERT.sub(".experts.{expert}.", part) for part in parts)
    raise UnsupportedError(f"{name} is stored on disk in an arrangement that is not known")
