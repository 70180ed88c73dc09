"""Stock configs and models of transformers, built without weights or with random ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regrow.checkpoint.from_config import stock_config
from regrow.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class UnsupportedError(UserError):
    """A model for which no table can be found; the text is the reason."""


def stock(config: dict[str, Any]) -> PretrainedConfig:
    """The config as its own class reads it; raises UserError if it is no causal language model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    made = stock_config(config)
    if type(made) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"{config['model_type']} is no causal language model")
    return made


def explicit(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the values that its class takes for keys that it lacks."""
    made = stock(config)
    full: dict[str, Any] = made.to_dict()
    full["tie_word_embeddings"] = bool(getattr(made, "tie_word_embeddings", False))
    for key in ("quantization_config", "auto_map", "dtype"):
        full.pop(key, None)
    return full


def build(config: dict[str, Any], device: str = "meta") -> PreTrainedModel:
    """The stock model of a config, untrained, in float32 and eval mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(device), silent(), no_init_weights() if device == "meta" else nullcontext():
        model: Any = AutoModelForCausalLM.from_config(
            stock(config), dtype=torch.float32, experts_implementation="eager"
        )
    built: PreTrainedModel = model.eval()
    return built


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored tensor of a config's model, without memory for them."""
    return dict(_shapes(json.dumps(config, sort_keys=True, default=str)))


@lru_cache(maxsize=256)
def _shapes(fields: str) -> dict[str, tuple[int, ...]]:
    state = build(json.loads(fields)).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@contextmanager
def silent() -> Iterator[None]:
    """Silence the remarks of model code about sizes that no real model has."""
    import warnings

    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
