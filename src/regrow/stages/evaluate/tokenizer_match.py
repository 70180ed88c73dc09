"""Texts in every model's tokens, and what their tokens are to the teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TypeAlias

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig
from regrow.data.blend import check_ids, embedding_rows
from regrow.errors import UserError
from regrow.llama_cpp import GgufModel
from regrow.runtime.progress import say
from regrow.stage_dir import digest
from regrow.stages.evaluate.config import HELDOUT, EvaluateConfig
from regrow.stages.evaluate.gguf_model import GgufFile
from regrow.stages.evaluate.texts import Reference, Text, build_texts, openings_of
from regrow.training.shared_tokens import ids_in

Models: TypeAlias = dict[str, Checkpoint | GgufFile]


def texts_of(
    checkpoints: Models, data: DataConfig | None, config: EvaluateConfig, first: str
) -> dict[str, list[Text]]:
    """The texts by model's label, tokenized once per distinct tokenizer.

    The first tokens of a further text are those of the model `first`; a model with another
    tokenizer gets the same string in its own tokens, and no model a figure per token.
    """
    tokenizers = {label: checkpoint.tokenizer() for label, checkpoint in checkpoints.items()}
    keys = {label: fingerprint(tokenizer) for label, tokenizer in tokenizers.items()}
    built = {keys[first]: build_texts(data, tokenizers[first], config)}
    if len(set(keys.values())) == 1:
        return _split_alike({label: built[key] for label, key in keys.items()}, checkpoints)
    openings = openings_of(tokenizers[first], config)
    for label, key in keys.items():
        if key not in built:
            built[key] = build_texts(data, tokenizers[label], config, openings)
    say(
        "evaluate: the models' tokenizers differ, so perplexities per token do not compare and are "
        f"left out; compare bits per byte, or perplexities per token of {first}"
    )
    references = {text.name: _reference(first, text) for text in built[keys[first]]}
    built = {
        key: [_told_apart(text, references[text.name]) for text in texts]
        for key, texts in built.items()
    }
    return _split_alike({label: built[key] for label, key in keys.items()}, checkpoints)


def _split_alike(texts: dict[str, list[Text]], models: Models) -> dict[str, list[Text]]:
    """The texts by label; of a GGUF file those alone that llama.cpp splits into these tokens."""
    found = dict(texts)
    for label, model in models.items():
        for text in texts[label]:
            used, rows = text.sequences.input_ids.unique().tolist(), embedding_rows(model)
            check_ids(used, model.tokenizer(), rows, model.folder)
        if isinstance(model, GgufFile):
            apart = _split_apart(texts[label], model)
            found[label] = [text for text in texts[label] if text.name not in apart]
            for name in apart:
                say(
                    f"evaluate: llama.cpp splits the text {name!r} into other tokens than the "
                    f"tokenizer of {label} does: no figures of it"
                )
    return found


def _split_apart(texts: list[Text], file: GgufFile) -> list[str]:
    """Names of the texts that llama.cpp splits otherwise."""
    tokenizer = file.tokenizer()
    apart = []
    with GgufModel(file.folder, only_look=True) as opened:
        for text in texts:
            for ids, real in zip(text.sequences.input_ids, text.sequences.real, strict=True):
                plain = tokenizer.decode(ids[real].tolist(), skip_special_tokens=True)
                assert isinstance(plain, str)
                if tokenizer.encode(plain, add_special_tokens=False) != opened.tokenize(plain):
                    apart.append(text.name)
                    break
    return apart


def _told_apart(text: Text, reference: Reference | None) -> Text:
    if text.name == HELDOUT:
        own = "in the model's own tokens: not the same text for one of other tokens"
        return replace(text, convention=f"{text.convention}; {own}", per_token=False)
    return replace(text, reference=reference, per_token=False)


def _reference(label: str, text: Text) -> Reference | None:
    if text.num_bytes is None:
        return None
    return Reference(label, text.num_bytes / text.sequences.scored_tokens)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, as hex, of what decides how text becomes tokens and how chats are rendered."""
    rules = sorted(tokenizer.get_vocab().items())
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    parts = [backend.get(key) for key in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    return digest(rules, parts, tokenizer.chat_template, tokenizer.special_tokens_map)


def teacher_ids_of(
    checkpoints: Models, teacher: str, texts: dict[str, list[Text]]
) -> dict[str, Tensor | None]:
    """Per model the teacher's ids of its tokens; None where ids and texts are the teacher's own.

    A model may have more ids than the teacher (padding of the vocabulary, added tokens), or some of
    its tokens under other ids. Raises UserError for one that is neither.
    """
    found: dict[str, Tensor | None] = {}
    checkpoint = checkpoints[teacher]
    theirs, size = checkpoint.tokenizer(), int(checkpoint.config["vocab_size"])
    for label, checkpoint in checkpoints.items():
        other = checkpoint.tokenizer()
        reason = _difference(other, theirs, texts[label], texts[teacher])
        found[label] = None if reason is None else ids_in(other, theirs, size)
        if reason is not None and found[label] is None:
            raise UserError(f"no KL between {label} and {teacher}: {reason}")
    return found


def _difference(
    other: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    mine: list[Text],
    theirs: list[Text],
) -> str | None:
    """Why the ids of one mean nothing to the other; None when they mean the same."""
    token_of, other_of = _tokens_by_id(teacher), _tokens_by_id(other)
    odd = sorted(i for i in token_of.keys() & other_of.keys() if token_of[i] != other_of[i])
    if odd:
        at = odd[0]
        return (
            f"token {at} is {other_of[at]!r} in one and {token_of[at]!r} in the other; leave `kl` "
            "out of metrics, or compare with a model of the same tokens"
        )
    reference_of = {text.name: text for text in theirs}
    for one in mine:
        reference = reference_of[one.name]
        if one is not reference and one.sequences.fingerprint != reference.sequences.fingerprint:
            return (
                f"their tokenizers split the text {one.name!r} differently; leave `kl` out of "
                "metrics"
            )
    return None


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}
