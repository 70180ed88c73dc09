"""Texts in every model's tokens, and whether models have the same tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeAlias

from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.errors import UserError
from regrow.manifest import digest
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.texts import Reference, Text, build_texts, openings_of

Models: TypeAlias = dict[str, Checkpoint]


def texts_of(
    checkpoints: Models, data: DataConfig | None, config: EvaluateConfig, first: str
) -> dict[str, list[Text]]:
    """The texts by model's label, tokenized once per distinct tokenizer.

    The first tokens of a further text are those of the model `first`; a model with another
    tokenizer gets the same string in its own tokens.
    """
    tokenizers = {label: checkpoint.tokenizer() for label, checkpoint in checkpoints.items()}
    keys = {label: fingerprint(tokenizer) for label, tokenizer in tokenizers.items()}
    built = {keys[first]: build_texts(data, tokenizers[first], config)}
    if len(set(keys.values())) == 1:
        return {label: built[key] for label, key in keys.items()}
    openings = openings_of(tokenizers[first], config)
    for label, key in keys.items():
        if key not in built:
            built[key] = build_texts(data, tokenizers[label], config, openings)
    references = {text.name: _reference(first, text) for text in built[keys[first]]}
    built = {
        key: [replace(text, reference=references[text.name]) for text in texts]
        for key, texts in built.items()
    }
    return {label: built[key] for label, key in keys.items()}


def _reference(label: str, text: Text) -> Reference | None:
    if text.num_bytes is None:
        return None
    return Reference(label, text.num_bytes / text.blocks.scored_tokens)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, as hex, of what decides how text becomes tokens and how chats are rendered."""
    rules = sorted(tokenizer.get_vocab().items())
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    parts = [backend.get(key) for key in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    return digest(rules, parts, tokenizer.chat_template, tokenizer.special_tokens_map)


def same_tokens(checkpoints: Models, teacher: str, texts: dict[str, list[Text]]) -> None:
    """Raise UserError unless token ids mean the same in every model and texts have the same ids.

    A model may have more ids than another (padding of the vocabulary, added tokens).
    """
    token_of = _tokens_by_id(checkpoints[teacher].tokenizer())
    for label, checkpoint in checkpoints.items():
        other = _tokens_by_id(checkpoint.tokenizer())
        odd = sorted(i for i in token_of.keys() & other.keys() if token_of[i] != other[i])
        if odd:
            at = odd[0]
            raise UserError(
                f"no KL between {label} and {teacher}: token {at} is {other[at]!r} in one and "
                f"{token_of[at]!r} in the other; leave `kl` out of metrics, or compare with a "
                "model of the same tokenizer"
            )
        for mine, theirs in zip(texts[label], texts[teacher], strict=True):
            if mine is not theirs and mine.blocks.fingerprint != theirs.blocks.fingerprint:
                raise UserError(
                    f"no KL between {label} and {teacher}: their tokenizers split the text "
                    f"{mine.name!r} differently; leave `kl` out of metrics"
                )


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}
