"""A model's config.json: read it, check it with transformers, and refuse unsupported models."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.checkpoint.from_config import stock_config
from regrow.checkpoint.multimodal import is_multimodal, text_config_of
from regrow.errors import UserError, last_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

COMPRESSED = "compressed-tensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of a folder's config.json; raises UserError when it names no model."""
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"no config.json in {folder}: give a Hugging Face model folder")
    config = read_json(path)
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path} names no model_type: give a Hugging Face model folder")
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises UserError when it is not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch or write it again") from None


def check_generation_config(folder: Path) -> None:
    """Raise UserError when the folder has a generation_config.json that transformers refuses."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if not path.exists():
        return
    fields = read_json(path)
    try:
        GenerationConfig.from_dict({**fields})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is refused by transformers: {_last_line(error)}; correct it, or fetch it again"
        ) from None


def accept_config(
    config: dict[str, Any], place: Path, quantized: bool = False
) -> PretrainedConfig | None:
    """The config as transformers reads it; None for a model_type that transformers does not know.

    The model is built once without memory for its weights, because some errors only occur then.
    Raises UserError for a config that transformers refuses, and for kinds of models that are not
    supported; `quantized` accepts compressed-tensors.
    """
    refuse_quantized(config, place, quantized)
    if is_multimodal(config):
        raise UserError(f"{place} is multimodal: give the config of its text model alone")
    stock = _causal_lm_config(config, place)
    if stock is not None and not hasattr(stock, "num_attention_heads"):
        raise UserError(
            f"{place} is a state-space model ({config['model_type']} has no "
            "num_attention_heads): only attention layers are supported"
        )
    return stock


def text_fields(config: dict[str, Any], place: Path) -> dict[str, Any]:
    """The fields of a config's text model: all of them, unless the model is multimodal.

    Raises UserError for a text model that has no class of its own.
    """
    if not is_multimodal(config):
        return config
    refuse_quantized(config, place)
    return text_config_of(stock_config(config, place), place)


def is_tied(config: dict[str, Any], stock: PretrainedConfig | None) -> bool:
    """Whether the output head is tied to the embedding, by the config or its class's default."""
    return bool(config.get("tie_word_embeddings") if stock is None else stock.tie_word_embeddings)


def refuse_quantized(config: dict[str, Any], place: Path, quantized: bool = False) -> None:
    """Raise UserError for a quantized model; `quantized` accepts compressed-tensors."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown")
    if quantized and method != COMPRESSED:
        raise UserError(f"{place} is quantized by {method}: only {COMPRESSED} is read here")
    if not quantized:
        raise UserError(
            f"{place} is quantized ({method}): prune first and quantize last; "
            "give the unquantized checkpoint"
        )


def _causal_lm_config(config: dict[str, Any], place: Path) -> PretrainedConfig | None:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        return None
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{place} is the config of a {model_type}, which is no causal language model: give one "
            "that is"
        )
    reason: Exception
    try:
        return copy.deepcopy(_make(json.dumps(config, sort_keys=True)))
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
        reason = error
    except (StrictDataclassError, RuntimeError, ZeroDivisionError, IndexError) as error:
        reason = error
    raise UserError(
        f"{place}: transformers cannot build a causal language model from this config: "
        f"{_last_line(reason)}"
    )


@lru_cache(maxsize=64)
def _make(fields: str) -> PretrainedConfig:
    """The transformers config for a config.json, after a model was built from a copy of it."""
    from transformers import CONFIG_MAPPING

    from regrow.checkpoint.from_config import on_meta

    raw = json.loads(fields)
    config: PretrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    unquantized = copy.deepcopy(config)
    unquantized.__dict__.pop("quantization_config", None)
    on_meta(unquantized)  # raises if transformers cannot build it
    return config


def _last_line(error: Exception) -> str:
    reason = last_line(error).removeprefix("ValueError: ").removeprefix("TypeError: ")[:200]
    return f"{type(error).__name__} {reason}" if isinstance(error, KeyError) else reason
