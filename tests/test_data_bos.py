"""A sequence begins with BOS wherever the tokenizer puts one before a text, in every stage."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny_tokenizer import PLAIN_TEMPLATE, SENTENCES, tiny_tokenizer, tiny_tokenizer_of
from tokenizers import processors

from regrow.data import DataConfig, Split
from regrow.data.documents import prefix_ids, read_row, tokenize
from regrow.data.prompts import read_prompt
from regrow.data.sequences import build_sequences
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.metrics.generations import prompt_ids
from regrow.stages.evaluate.texts import build_texts, windows

TOKENIZER = tiny_tokenizer_of("byte fallback")
BOS, EOS = 1, 2
TURNS = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
]


def with_template(template: str) -> object:
    tokenizer = tiny_tokenizer_of("byte fallback")
    tokenizer.chat_template = template
    return tokenizer


def write(path: Path, rows: int = 400) -> Path:
    """Documents of very different lengths, of which many are longer than a sequence."""
    texts = [" ".join([*SENTENCES * (1 + n % 3), f"{n}"]) for n in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_prefix_ids_are_the_tokens_before_any_text() -> None:
    assert prefix_ids(TOKENIZER) == [BOS]
    assert prefix_ids(tiny_tokenizer_of("unigram without bytes")) == [BOS]
    assert prefix_ids(tiny_tokenizer()) == []
    two = tiny_tokenizer()
    two.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|pad|> <|im_start|> $A <|endoftext|>",
        special_tokens=[("<|pad|>", 1), ("<|im_start|>", 2), ("<|endoftext|>", 0)],
    )
    assert prefix_ids(two) == [1, 2]


def test_every_sequence_of_every_split_begins_with_bos(tmp_path: Path) -> None:
    source = str(write(tmp_path / "a.jsonl"))
    data = DataConfig.model_validate({"sources": [source], "sequence_length": 24})
    split: Split
    for split in get_args(Split):
        sequences = build_sequences(data, TOKENIZER, split, 30)
        ids, labels = sequences.input_ids, sequences.labels
        assert ids.shape == (30, 24)
        assert torch.equal(ids == BOS, sequences.position_ids == 0)
        assert (ids[:, 0] == BOS).all()
        assert not (labels == BOS).any()
        assert (labels == EOS).any()
        # A document's first token is scored; where a sequence begins within one, it is not.
        first = labels[:, 1] != -100
        assert 0 < first.sum() < 30


@pytest.mark.parametrize("before", ["", "{{ bos_token }}"])
def test_conversations_begin_with_one_bos(before: str) -> None:
    tokenizer = with_template(before + PLAIN_TEMPLATE)
    bare = TOKENIZER(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        "Paris.<|im_end|>\n",
        add_special_tokens=False,
    )["input_ids"]
    (document,) = tokenize([read_row({"messages": TURNS}, "here")], tokenizer)
    assert (document.ids[0], document.scored[0]) == (BOS, False)
    assert document.ids.count(BOS) == 1
    assert len(document.ids) == len(document.scored)
    scored = [i for i, is_scored in zip(document.ids, document.scored, strict=True) if is_scored]
    assert str(TOKENIZER.decode(scored)).startswith("Paris.")
    if not before:  # with BOS in the text, it decides where a space is put
        assert document.ids == [BOS, *bare]


@pytest.mark.parametrize("before", ["", "{{ bos_token }}"])
def test_prompts_begin_with_one_bos(before: str) -> None:
    tokenizer = with_template(before + PLAIN_TEMPLATE)
    row = {"prompt": "What is it?"}
    read_ids = read_prompt(row, "here", 0, True).ids(tokenizer)
    assert (read_ids[0], read_ids.count(BOS)) == (BOS, 1)
    continued = read_prompt(row, "here", 0, False).ids(tokenizer)
    assert continued == TOKENIZER("What is it?\n")["input_ids"]
    assert (continued[0], continued.count(BOS)) == (BOS, 1)
    assert prompt_ids("What is it?", tokenizer) == read_ids
    assert read_prompt(row, "here", 0, True).ids(tiny_tokenizer())[0] == 2  # <|im_start|>


def slow_windows(ids: list[int], window: int, prefix: list[int]) -> list[list[tuple[int, int]]]:
    """Rows of (id, label), token by token."""
    rows: list[list[tuple[int, int]]] = []
    for token in ids:
        if not rows or len(rows[-1]) == window:
            rows.append([(i, -100) for i in prefix])
        first = len(rows[-1]) == len(prefix)
        rows[-1].append((token, -100 if first else token))
    return rows


@pytest.mark.parametrize("prefix", [[], [BOS], [8, 9]])
def test_windows_equal_the_slow_version(prefix: list[int]) -> None:
    for count in (3, 11, 12, 24):
        ids = list(range(20, 20 + count))
        sequences = windows(ids, 6, prefix)
        real = [
            [(int(i), int(label)) for i, label, is_real in zip(*rows, strict=True) if is_real]
            for rows in zip(sequences.input_ids, sequences.labels, sequences.real, strict=True)
        ]
        assert real == slow_windows(ids, 6, prefix)
        assert (sequences.labels[~sequences.real] == -100).all()
        assert sequences.position_ids.tolist() == [list(range(6))] * len(real)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, tiny_tokenizer()], ids=["bos", "no bos"])
def test_texts_of_evaluate_begin_with_bos(tokenizer: object, tmp_path: Path) -> None:
    """Windows begin with BOS, and conventions say so; bytes are those of the scored tokens."""
    source = str(write(tmp_path / "a.jsonl", 200))
    data = DataConfig.model_validate({"sources": [source], "sequence_length": 24})
    config = EvaluateConfig(texts={"t": source}, window=16, text_tokens=100, heldout_sequences=4)
    held_out, text = build_texts(data, tokenizer, config)
    prefix = prefix_ids(tokenizer)
    says = "each begins with <s>, which is not scored" if prefix else "no BOS"
    assert says in held_out.convention
    assert says in text.convention
    ids = text.sequences.input_ids
    size = 16 - len(prefix)
    assert len(ids) == -(-100 // size)
    assert (ids[:, : len(prefix)] == BOS).all()
    assert int(text.sequences.real.sum()) == 100 + len(prefix) * len(ids)
    assert text.sequences.scored_tokens == 100 - len(ids)
    real = text.sequences.real[:, len(prefix) :]
    text_ids = ids[:, len(prefix) :][real].tolist()
    labels = text.sequences.labels[:, len(prefix) :][real].tolist()
    ends = [len(tokenizer.decode(text_ids[:count]).encode()) for count in range(len(text_ids) + 1)]
    sizes = [end - begin for begin, end in pairwise(ends)]
    kept = zip(sizes, labels, strict=True)
    assert text.num_bytes == sum(size for size, label in kept if label != -100)
