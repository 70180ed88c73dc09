"""A token id beyond a model's embedding is refused in one line, before any slow work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from tiny_job import Refused, call
from tiny_tokenizer import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from regrow.checkpoint import Checkpoint
from regrow.data.sequences import build_sequences

EXTRA = "<|extra|>"
SIZE = ["--sequence-length", "32"]
COMMANDS: dict[str, list[str]] = {
    "profile": ["--samples", "8"],
    "rotate": ["--samples", "8"],
    "quantize": ["--samples", "8"],
    "cache": ["--tokens", "256", "--heldout-sequences", "2"],
    "generate": ["--split", "all"],
    "evaluate": ["--heldout-sequences", "4"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one token more than its embedding has rows."""
    folder = tmp_path_factory.mktemp("beyond") / "model"
    write_model(folder, dtype=torch.bfloat16, head_dim=8)
    wider = tiny_tokenizer()
    assert wider.add_tokens([EXTRA], special_tokens=True) == 1
    wider.save_pretrained(str(folder))
    return folder


def write_rows(path: Path) -> Path:
    """Rows of text, and of prompts, in which the token stands now and then."""
    rows: list[dict[str, Any]] = []
    for n in range(80):
        text = f"{n} The quick {EXTRA} fox jumps over the lazy dog, again and again."
        rows += [{"text": text}, {"prompt": text, "completion": "Paris."}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", COMMANDS)
def test_a_token_beyond_the_embedding_is_refused(
    name: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    if name == "generate":
        kept = [line for line in rows.read_text().splitlines(True) if "prompt" in line]
        rows.write_text("".join(kept))
    before = sorted(tmp_path.iterdir())
    message = refused(
        name, model, "--data", rows, *SIZE, *COMMANDS[name], "--out", tmp_path / "out",
        at_once=False,
    )  # fmt: skip
    size = len(tiny_tokenizer())
    assert message.startswith(
        f"the text has token {size} ('{EXTRA}'), but the embedding of {model}"
    )
    assert f"only {size} rows" in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_tokenizer_may_have_more_tokens_than_the_text_has(model: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.jsonl", 60)
    out = tmp_path / "out"
    call("profile", model, "--data", text, *SIZE, "--samples", 4, "--gram-tokens", 0, "--out", out)
    assert (out / "manifest.json").exists()


def test_padding_stays_below_the_embedding(model: Path, tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(model))
    tokenizer.pad_token = EXTRA
    tokenizer.save_pretrained(str(tmp_path / "tokenizer"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "One, two, three, four."}\n')
    data = data_of(
        text,
        heldout_fraction=0.001,
        validation_fraction=0.0005,
        calibration_fraction=0.998,
        sequence_length=64,
    )
    padded = build_sequences(data, tokenizer, "calibration", 1, Checkpoint(model))
    assert padded.input_ids[~padded.real].unique().tolist() == [tokenizer.eos_token_id]
