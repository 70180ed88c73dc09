"""The text that models are measured or trained on: packed, unless a model mixes documents.

Several documents in one sequence save padding. Some models let them see each other, because a
state passes from one to the next, or because their class ignores positions in its masks. For such
a model each sequence has one document. As a decoder reads from left to right, the padding after it
changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.data.config import DataConfig, Split
from regrow.data.sequences import Sequences, build_sequences
from regrow.errors import UserError
from regrow.runtime.progress import say


def text_for(
    configs: Iterable[dict[str, Any]],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    split: Split,
    num_sequences: int,
    embedding: Checkpoint | None = None,
    cache: Path | None = None,
) -> Sequences:
    """Sequences of a split that models of these `configs` can read; see `build_sequences`.

    `embedding` is the model whose embedding must have every token id. Raises UserError for too
    little text, and for sequences that are longer than the positions of a model.
    """
    configs = list(configs)
    for config in configs:
        check_length(data, config)
    reason = next(filter(None, map(families.mixes, configs)), "")
    given = (data, tokenizer, split, num_sequences, embedding, cache)
    sequences = build_sequences(*given, alone=bool(reason))
    if reason:
        padding = 1 - float(sequences.real.float().mean())
        say(
            f"data: each {split} sequence has one document, as packed documents would see each "
            f"other ({reason}); {padding:.0%} of the positions are padding"
        )
    return sequences


def check_length(data: DataConfig, config: dict[str, Any]) -> None:
    """Raise UserError for sequences that are longer than the positions of a model."""
    positions = config.get("max_position_embeddings")
    if positions and data.sequence_length > positions:
        raise UserError(
            f"sequence_length {data.sequence_length} is longer than the {config['model_type']} "
            f"model supports ({positions} positions): set it to {positions} or less"
        )
