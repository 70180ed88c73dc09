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
    """The table of a family; `model_type` is the value of that key in a model's config.json.

    Raises UserError, with the names of all families, for a family that has no file here.
    """
    known = plugins.names(__name__)
    if model_type not in known:
        message = unknown("family", model_type, known)
        raise UserError(f"{message}; to add one, read docs/add-a-family.md")
    family = plugins.load(__name__, model_type).FAMILY
    assert isinstance(family, Family)
    assert family.model_type == model_type
    return family


def of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint; its config and tensors are checked against the family's table.

    Raises UserError for an unknown family, for tensors that do not fit it, and for a multiplier in
    the config that the table cannot express.
    """
    model_type = checkpoint.config["model_type"]
    known = plugins.names(__name__)
    if checkpoint.has_remote_code and model_type not in known:
        raise UserError(
            f"{checkpoint.folder} would need remote code (auto_map in its config), which is never "
            f"run; {model_type!r} is not a known family ({', '.join(known)}); to add one, read "
            "docs/add-a-family.md"
        )
    family = get(checkpoint.config["model_type"])
    _check_multipliers(family, checkpoint)
    if not checkpoint.quantized:  # quantized tensors are packed and have other names
        family.check_tensors(checkpoint.config, checkpoint.shapes)
    return family


def _check_multipliers(family: Family, checkpoint: Checkpoint) -> None:
    """Refuse a multiplier in the forward pass, which tables cannot express and repair ignores."""
    for key, value in checkpoint.config.items():
        plain = value is None or value == 1 or key in family.defaults
        if key.endswith(("_multiplier", "_multipliers")) and not plain:
            raise UserError(
                f"{checkpoint.folder}: {key} {value} in config.json is not supported for the "
                f"family {family.model_type}, only 1: its cut and repaired layers would be wrong"
            )
