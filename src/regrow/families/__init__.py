"""A model family is a table of named dimensions: data, one file per `model_type`."""

from __future__ import annotations

from regrow import plugins
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError, unknown
from regrow.families._memory import accept_disk_names, as_on_disk, in_memory
from regrow.families._refusals import can_have, check_sizes
from regrow.families._table import Family, Tensor, TensorRef, parts, rows, unit_rows

__all__ = [
    "Family",
    "Tensor",
    "TensorRef",
    "accept_disk_names",
    "as_on_disk",
    "can_have",
    "check_sizes",
    "get",
    "in_memory",
    "of",
    "parts",
    "rows",
    "unit_rows",
]


def get(model_type: str) -> Family:
    """The table of the family `model_type`, the key of that name in a model's config.json.

    Raises UserError for a family that has no file here, naming those there are.
    """
    known = plugins.names(__name__)
    if model_type not in known:
        told = unknown("family", model_type, known)
        raise UserError(f"{told}; to add one, read docs/add-a-family.md")
    family = plugins.load(__name__, model_type).FAMILY
    assert isinstance(family, Family)
    assert family.model_type == model_type
    return family


def of(checkpoint: Checkpoint) -> Family:
    """The family of an opened checkpoint, whose tensors are checked against the table.

    Raises UserError for an unknown family or tensors that do not fit it.
    """
    model_type = checkpoint.config["model_type"]
    known = plugins.names(__name__)
    if checkpoint.has_remote_code and model_type not in known:
        raise UserError(
            f"{checkpoint.folder} would need remote code (auto_map in its config), which is never "
            f"run; {model_type!r} is none of the families there are: {', '.join(known)}; to add "
            "one, read docs/add-a-family.md"
        )
    family = get(checkpoint.config["model_type"])
    if not checkpoint.quantized:  # whose tensors are packed, under other names
        family.check_tensors(checkpoint.config, checkpoint.shapes)
    return family
