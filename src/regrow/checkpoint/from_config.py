"""Stock configs of transformers, and models from them: with random weights, or without weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.errors import UserError, reason_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def stock_config(fields: Mapping[str, Any], place: Path | None = None) -> PretrainedConfig:
    """The config as its own class reads it; `place` is where it is, for error messages.

    Raises UserError if the installed transformers has no such class, or its class refuses a value.
    """
    from transformers import CONFIG_MAPPING

    at, model_type = "" if place is None else f"{place}: ", fields["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{at}the installed transformers knows no model_type {model_type!r}: install a newer "
            "transformers"
        )
    try:
        made: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(fields)))
    except Exception as error:  # whatever a config class raises for a value that it refuses
        reason = reason_of(error)
        raise UserError(f"{at}transformers refuses this {model_type} config: {reason}") from None
    return made


def random_model(config: PretrainedConfig, seed: int, like: Path) -> PreTrainedModel:
    """A model in float32 and eval mode, with the random weights of its class, drawn with `seed`.

    It has the generation config of the folder `like`, if there is one.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if (like / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(str(like))
    return model


def on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model on the meta device, which takes no memory for weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model
