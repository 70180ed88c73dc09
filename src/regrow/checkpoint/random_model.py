"""Models from a config alone: with random weights, or without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
