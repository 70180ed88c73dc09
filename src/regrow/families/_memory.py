"""Mapping between the parameters of a model in memory and the tensors on disk.

Only experts differ: on disk each expert has its own tensors; in memory the tensors of all experts
are stacked, and projections with the same input are concatenated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from regrow.families._rows import TensorRef
from regrow.families._table import Family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def as_on_disk(family: Family, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's parameters by their names on disk; parts of a joined parameter are views."""
    tensors = {}
    for name, tensor in named.items():
        number = re.search(r"(?<=\.layers\.)\d+", name)
        template = name if number is None else name.replace(number[0], "{layer}", 1)
        if template not in family.memory:
            tensors[name] = tensor
            continue
        layer, rows = int(number[0]) if number else None, family.memory[template]
        experts = enumerate(tensor) if "{expert}" in rows[0] else [(None, tensor)]
        for expert, whole in experts:
            for row, part in zip(rows, whole.chunk(len(rows)), strict=True):
                tensors[TensorRef(row, layer, expert).name] = part
    return tensors


def in_memory(
    family: Family, config: dict[str, Any], layer: int, read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each in-memory parameter of a layer; `read` loads a tensor from disk."""
    import torch

    joined = {row for rows in family.memory.values() for row in rows}
    plain = {row: (row,) for row in family.tensors if "{layer}" in row and row not in joined}
    for template, rows in {**plain, **family.memory}.items():
        places = [family.places(row, config, [layer]) for row in rows]
        experts = [[place.name for place in parts] for parts in zip(*places, strict=True)]
        value = None
        for expert, names in enumerate(experts):
            whole = read(names[0]) if len(names) == 1 else torch.cat([read(n) for n in names])
            if "{expert}" not in rows[0]:
                value = whole
                continue
            if value is None:
                value = whole.new_empty(len(experts), *whole.shape)
            value[expert] = whole
        if value is not None:
            yield TensorRef(template, layer).name, value


def accept_disk_names(family: Family, model: PreTrainedModel) -> None:
    """Let `model.load_state_dict` also accept tensors by their names on disk.

    The Trainer of transformers loads its checkpoints this way. It silently ignores tensors that
    have another name in memory, so the experts would keep their old weights.
    """
    config = model.config.to_dict()

    def rename(module: Any, state: dict[str, Tensor], *_: Any) -> None:
        for layer in range(family.sizes(config)["layers"]):
            places = [p for row in family.tensors for p in family.places(row, config, [layer])]
            names = [p.name for p in places if "{layer}" in p.template]
            if all(name in state for name in names):
                joined = dict(in_memory(family, config, layer, state.__getitem__))
                for name in names:
                    del state[name]
                state.update(joined)

    if family.memory:
        model.register_load_state_dict_pre_hook(rename)
