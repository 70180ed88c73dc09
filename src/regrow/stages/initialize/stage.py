"""The initialize stage: reads a config and a tokenizer and writes a model with random weights."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from regrow import families
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.checkpoint.from_config import on_meta, random_model
from regrow.checkpoint.model_config import accept_config
from regrow.errors import UserError, nearest
from regrow.runtime.progress import say
from regrow.stage_dir import refuse_input
from regrow.stages.initialize import InitializeConfig
from regrow.training.rates import RANDOM_WEIGHTS
from regrow.training.shared_tokens import token_ids

OF_LAYERS = ("layer_types", "mlp_layer_types")
"""Fields with a value for each layer; transformers makes them anew for another number of layers."""


def initialize(
    model: str | Path | Checkpoint, out: str | Path, config: InitializeConfig | None = None
) -> Path:
    """Write a model in float32 with the config of `model`, and return the folder.

    Its weights are those that transformers gives a new model, drawn with `config.seed`. Raises
    UserError for sizes that transformers refuses, and for a vocabulary that is too small.
    """
    out, config = Path(out), config or InitializeConfig()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    stock = check(checkpoint, config)
    refuse_input(out, checkpoint.folder)
    stage = ModelDir(out, "initialize", config, {"model": checkpoint.fingerprint}, parent=None)
    if stage.complete:
        say(f"initialize: {out} is complete and unchanged")
        return out
    with stage as folder:
        drawn = random_model(stock, config.seed, checkpoint.folder)
        checkpoints.write_model(drawn, folder, checkpoint, whole=False)
        stage.extra[RANDOM_WEIGHTS] = True
    say(describe(checkpoint, config))
    return out


def check(checkpoint: Checkpoint, config: InitializeConfig) -> PretrainedConfig:
    """The config of the random model; raises UserError if there is no such model."""
    fields = {**checkpoint.config, **config.sizes, "dtype": "float32"}
    for name, size in config.sizes.items():
        now = checkpoint.config.get(name)
        if not isinstance(now, int) or isinstance(now, bool):
            known = [key for key, value in checkpoint.config.items() if type(value) is int]
            raise UserError(
                f"sizes: the config of {checkpoint.folder} has no size {name!r}"
                f"{nearest(name, known)}; it has: {', '.join(known)}"
            )
        if name == "num_hidden_layers" and size != now:
            fields = {key: value for key, value in fields.items() if key not in OF_LAYERS}
    stock = accept_config(fields, checkpoint.folder)
    if stock is None:
        raise UserError(
            f"transformers knows no model_type {fields['model_type']!r}: give another model"
        )
    families.of_config(stock.to_dict())
    needed = token_ids(checkpoint.tokenizer())
    if stock.vocab_size < needed:
        raise UserError(
            f"sizes: vocab_size {stock.vocab_size} is too small for the tokenizer of "
            f"{checkpoint.folder}; give {needed} or more"
        )
    return stock


def describe(checkpoint: Checkpoint, config: InitializeConfig) -> str:
    """One line: the number of parameters and the seed."""
    count = parameters_of(check(checkpoint, config))
    return f"initialize: {count:,} random weights, seed {config.seed}"


def parameters_of(config: PretrainedConfig) -> int:
    """The number of parameters; tied weights count once."""
    return sum(parameter.numel() for parameter in on_meta(config).parameters())
