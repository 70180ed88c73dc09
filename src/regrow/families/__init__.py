"""A model family is a table of named dimensions: one file per `model_type`, or derived."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regrow import plugins
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError, unknown
from regrow.families._cut import Replace, check_plan, cut, cut_config, cut_tensor, new_name
from regrow.families._memory import accept_disk_names, as_on_disk, in_memory
from regrow.families._refusals import can_have, check_layers, check_sizes
from regrow.families._rows import LayerRule, Tensor, TensorRef, parts, rows, unit_rows
from regrow.families._table import Family

if TYPE_CHECKING:
    from regrow.families._derive import Derived

__all__ = [
    "Family",
    "LayerRule",
    "Replace",
    "Tensor",
    "TensorRef",
    "accept_disk_names",
    "as_on_disk",
    "can_have",
    "check_plan",
    "check_sizes",
    "cut",
    "cut_config",
    "cut_tensor",
    "exported",
    "get",
    "in_memory",
    "mixes",
    "new_name",
    "of",
    "of_config",
    "parts",
    "rows",
    "typed",
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

    Raises UserError for a model that has no table, for tensors that do not fit the table, and for a
    multiplier in the config that the table cannot express.
    """
    model_type = checkpoint.config["model_type"]
    if checkpoint.has_remote_code and not _stock_class(model_type):
        known = ", ".join(plugins.names(__name__))
        raise UserError(
            f"{checkpoint.folder} would need remote code (auto_map in its config), which is never "
            f"run; {model_type!r} is not a known family ({known}), and the installed transformers "
            "has no class for it; read docs/add-a-family.md"
        )
    family = of_config(checkpoint.config)
    if not family.derived:
        check_layers(checkpoint.config, checkpoint.folder)
        _check_multipliers(family, checkpoint)
    if not checkpoint.quantized:  # quantized tensors are packed and have other names
        family.check_tensors(checkpoint.config, checkpoint.shapes)
    return family if checkpoint.whole is None else _inside(family)


def _inside(family: Family) -> Family:
    """The table of a text model that other parts of a multimodal model depend on."""
    refused = {
        "hidden": "the model is multimodal, and its projector writes into all of these channels",
        "vocab": "the model is multimodal, and its processor knows tokens by their ids",
    }
    return replace(family, refused={**family.refused, **refused})


def of_config(config: dict[str, Any]) -> Family:
    """The family of a config: the table with its name, or one that is derived from its class.

    Raises UserError when the installed transformers has no class for it, or when no table can
    describe it.
    """
    model_type = config["model_type"]
    if model_type in plugins.names(__name__) or not _stock_class(model_type):
        return get(model_type)
    return derived(config).family


def derived(config: dict[str, Any]) -> Derived:
    """The derived table of a config, with what was proven of it; kept on disk.

    Raises UserError when no table can describe the model.
    """
    from regrow.families._derive import UnsupportedError, derive

    try:
        return derive(config)
    except UnsupportedError as error:
        raise UserError(f"{config['model_type']}: no table can be derived: {error}") from None


def mixes(config: dict[str, Any]) -> str:
    """Why packed documents see each other in a model of this config; empty if they do not.

    It is also empty for a model that no table can describe.
    """
    try:
        return of_config(config).mixes
    except UserError:
        return ""


def typed() -> list[str]:
    """The model types whose tables are written by hand."""
    return plugins.names(__name__)


def exported() -> list[str]:
    """The model types that have a name in llama.cpp, and so can be exported to GGUF."""
    return [name for name in typed() if get(name).gguf is not None]


def _stock_class(model_type: str) -> bool:
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_multipliers(family: Family, checkpoint: Checkpoint) -> None:
    """Refuse a multiplier in the forward pass, which tables cannot express and repair ignores."""
    for key, value in checkpoint.config.items():
        plain = value is None or value == 1 or key in family.defaults
        if key.endswith(("_multiplier", "_multipliers")) and not plain:
            raise UserError(
                f"{checkpoint.folder}: {key} {value} in config.json is not supported for the "
                f"family {family.model_type}, only 1: its cut and repaired layers would be wrong"
            )
