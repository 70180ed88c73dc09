"""Tokenizers of the models, the texts in their tokens, and the teacher's ids of these tokens."""

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


def open_tokenizers(models: Models, teacher: str | None) -> dict[str, PreTrainedTokenizerBase]:
    """Open each model's tokenizer; folders with the same tokenizer files share one object.

    A GGUF file uses the tokenizer of the first folder whose tokens have the same ids in the file;
    the teacher is tried first. If there is none, it uses the tokenizer in the file. Raises
    UserError for a missing tokenizer.
    """
    labels = sorted(models, key=lambda label: label != teacher)
    tokenizers = {
        label: model.tokenizer()
        for label in labels
        if isinstance(model := models[label], Checkpoint)
    }
    folders = list({id(tokenizer): tokenizer for tokenizer in tokenizers.values()}.values())
    for label, model in models.items():
        if isinstance(model, GgufFile):
            same = (tokenizer for tokenizer in folders if model.has_tokens_of(tokenizer))
            tokenizers[label] = next(same, None) or model.tokenizer()
    return tokenizers


def texts_of(
    models: Models,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    data: DataConfig | None,
    config: EvaluateConfig,
    first: str,
) -> dict[str, list[Text]]:
    """Return the texts by model label, tokenized once per distinct tokenizer.

    The length of a further text is counted in tokens of the model `first`. A model with another
    tokenizer gets the same string in its own tokens, and then no model gets a figure per token.
    """
    rules = {id(tokenizer): tokenizer for tokenizer in tokenizers.values()}
    keys = {label: str(id(tokenizer)) for label, tokenizer in tokenizers.items()}
    if len(rules) > 1:  # files differ, but the rules may be equal
        fingerprints = {key: fingerprint(tokenizer) for key, tokenizer in rules.items()}
        keys = {label: fingerprints[id(tokenizer)] for label, tokenizer in tokenizers.items()}
    configs = [model.config for model in models.values() if isinstance(model, Checkpoint)]
    built = {keys[first]: build_texts(data, tokenizers[first], config, None, configs)}
    if len(set(keys.values())) == 1:
        return _split_alike({label: built[key] for label, key in keys.items()}, models, tokenizers)
    openings = openings_of(tokenizers[first], config)
    for label, key in keys.items():
        if key not in built:
            built[key] = build_texts(data, tokenizers[label], config, openings, configs)
    say(
        "evaluate: the models' tokenizers differ, so perplexities per token cannot be compared and "
        f"are left out; compare bits per byte, or perplexities per token of {first}"
    )
    references = {text.name: _reference(first, text) for text in built[keys[first]]}
    built = {
        key: [_per_byte_only(text, references[text.name]) for text in texts]
        for key, texts in built.items()
    }
    return _split_alike({label: built[key] for label, key in keys.items()}, models, tokenizers)


def _split_alike(
    texts: dict[str, list[Text]], models: Models, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> dict[str, list[Text]]:
    """Return the texts by label; for GGUF files, only those that llama.cpp tokenizes equally."""
    alike = dict(texts)
    for label, model in models.items():
        for text in texts[label]:
            used, rows = text.sequences.ids_used().tolist(), embedding_rows(model)
            check_ids(used, tokenizers[label], rows, model.folder)
        if isinstance(model, GgufFile):
            different = _split_apart(texts[label], model, tokenizers[label])
            alike[label] = [text for text in texts[label] if text.name not in different]
            for name in different:
                say(
                    f"evaluate: llama.cpp tokenizes the text {name!r} differently from the "
                    f"tokenizer of {label}, so {label} gets no figures on it"
                )
    return alike


def _split_apart(
    texts: list[Text], file: GgufFile, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Names of the texts that llama.cpp tokenizes differently from `tokenizer`."""
    names = []
    with GgufModel(file.folder, only_look=True) as opened:
        for text in texts:
            for ids, real in zip(text.sequences.input_ids, text.sequences.real, strict=True):
                plain = tokenizer.decode(ids[real].tolist(), skip_special_tokens=True)
                assert isinstance(plain, str)
                if tokenizer.encode(plain, add_special_tokens=False) != opened.tokenize(plain):
                    names.append(text.name)
                    break
    return names


def _per_byte_only(text: Text, reference: Reference | None) -> Text:
    """Mark a text as not comparable per token between the models."""
    if text.name == HELDOUT:
        remark = (
            "in the model's own tokens; a model with other tokens reads another part of the text"
        )
        return replace(text, convention=f"{text.convention}; {remark}", per_token=False)
    return replace(text, reference=reference, per_token=False)


def _reference(label: str, text: Text) -> Reference | None:
    if text.num_bytes is None:
        return None
    return Reference(label, text.num_bytes / text.sequences.scored_tokens)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, as hex, of the rules for tokenization and for chat templates."""
    rules = sorted(tokenizer.get_vocab().items())
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    parts = [backend.get(key) for key in ("normalizer", "pre_tokenizer", "model", "post_processor")]
    return digest(rules, parts, tokenizer.chat_template, tokenizer.special_tokens_map)


def teacher_ids_of(
    models: Models,
    tokenizers: dict[str, PreTrainedTokenizerBase],
    teacher: str,
    texts: dict[str, list[Text]],
    metrics: list[str],
) -> dict[str, Tensor | None]:
    """For each model, the teacher's ids of its tokens; None if ids and texts equal the teacher's.

    A model may have more ids than the teacher (vocabulary padding, added tokens), or other ids for
    some tokens. Raises UserError, which names the `metrics` to leave out, for a model whose tokens
    cannot be compared.
    """
    ids: dict[str, Tensor | None] = {}
    teacher_tokenizer, size = tokenizers[teacher], int(models[teacher].config["vocab_size"])
    for label, tokenizer in tokenizers.items():
        ids[label] = None
        if tokenizer is teacher_tokenizer:
            continue
        reason = _difference(tokenizer, teacher_tokenizer, texts[label], texts[teacher])
        if reason is not None:
            ids[label] = ids_in(tokenizer, teacher_tokenizer, size)
        if reason is not None and ids[label] is None:
            raise UserError(
                f"{' and '.join(metrics)} cannot compare {label} with {teacher}: {reason}; leave "
                f"{', '.join(metrics)} out of metrics, or compare with a model of the same tokens"
            )
    return ids


def _difference(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    texts: list[Text],
    teacher_texts: list[Text],
) -> str | None:
    """Reason why the ids of two models mean different tokens; None if they mean the same."""
    teacher_tokens, tokens = _tokens_by_id(teacher), _tokens_by_id(student)
    shared_ids = teacher_tokens.keys() & tokens.keys()
    if different := sorted(i for i in shared_ids if teacher_tokens[i] != tokens[i]):
        i = different[0]
        return f"token {i} is {tokens[i]!r} in one and {teacher_tokens[i]!r} in the other"
    of_teacher = {text.name: text for text in teacher_texts}
    for text in texts:
        reference = of_teacher[text.name]
        same = text is reference or text.sequences.fingerprint == reference.sequences.fingerprint
        if not same:
            return f"their tokenizers split the text {text.name!r} differently"
    return None


def _tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {i: token for token, i in tokenizer.get_vocab().items()}
