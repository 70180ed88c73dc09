"""Checkpoints that are not taken: each is refused in one line, before a tensor is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_folders import write_model

from regrow import families
from regrow.checkpoint import load, shards
from regrow.checkpoint.checkpoint import write
from regrow.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", tie_word_embeddings=True)
    return tmp_path / "model"


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(source: Path | str) -> str:
    """What is said, in one line, of a model that is not taken."""
    with pytest.raises(UserError) as raised:
        families.of(load(source))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def empty_config(folder: Path) -> None:
    (folder / "config.json").write_text("{}")


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x" * 99)


def change_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])

    return spoil


NORM = "model.norm.weight"


def one_shard_missing(folder: Path) -> None:
    source = load(folder)
    out = folder.with_name("sharded")
    tensors = ((name, source.tensor(name)) for name in source.names())
    layout = {name: source.meta(name) for name in source.names()}
    write(out, source.config, layout, tensors, source, max_shard_bytes=60_000)
    shutil.rmtree(folder)
    out.rename(folder)
    next(folder.glob("model-00002-*")).unlink()


def broken_index(folder: Path) -> None:
    (folder / shards.INDEX).write_text('{"weight_map": [')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **fields)


TRUNCATED = "model.safetensors is truncated or no safetensors file: fetch or write it again"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "no such model folder"),
    "no config": (no_config, "no config.json in"),
    "broken JSON": (broken_config, "config.json is no JSON"),
    "no model_type": (empty_config, "config.json names no model_type"),
    "unknown family": (
        with_config(model_type="qwen9"),
        "no family named 'qwen9' — did you mean 'qwen3'?; there are: gemma3_text, llama, mistral, "
        "mixtral, phi3, qwen2, qwen3, qwen3_moe; to add one, read docs/add-a-family.md",
    ),
    "remote code": (
        with_config(model_type="my_llama", auto_map={"AutoModelForCausalLM": "modeling_my.My"}),
        "would need remote code (auto_map in its config), which is never run; 'my_llama' is none",
    ),
    "truncated": (cut_off, TRUNCATED),
    "empty file": (empty_file, TRUNCATED),
    "no header": (no_header, TRUNCATED),
    "header without shape": (change_header(lambda header: header[NORM].pop("shape")), TRUNCATED),
    "wrong dtype": (change_header(lambda header: header[NORM].update(dtype="F64")), TRUNCATED),
    "wrong shape": (change_header(lambda header: header[NORM].update(shape=[49])), TRUNCATED),
    "renamed tensor": (
        change_header(lambda header: header.update({"model.nrm.weight": header.pop(NORM)})),
        "model.nrm.weight: no tensor of a llama model with this config",
    ),
    "other config": (
        with_config(intermediate_size=57),
        "shape (48, 56), but by config.json it must be (48, 57)",
    ),
    "missing layer": (with_config(num_hidden_layers=4), "is missing (9 in all)"),
    "missing shard": (one_shard_missing, "is missing: fetch the model again"),
    "broken index": (broken_index, "model.safetensors.index.json is broken"),
    "pickled": (pickled, "pickled weights only, which can run code when opened: save them as"),
    "no weights": (no_weights, "no model.safetensors in"),
    "quantized": (
        with_config(quantization_config={"quant_method": "awq", "bits": 4}),
        "is quantized (awq): prune first and quantize last; give the unquantized checkpoint",
    ),
    "multimodal": (
        with_config(model_type="gemma3", vision_config={"hidden_size": 4}, text_config={}),
        "is multimodal (its config has vision_config): only text models are supported",
    ),
    "linear attention": (
        with_config(layer_types=["linear_attention", "full_attention", "full_attention"]),
        "is a hybrid model (linear_attention): only attention layers are supported",
    ),
    "mamba": (with_config(mamba_d_state=16), "is a hybrid model (mamba_d_state)"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, folder: Path) -> None:
    spoil, expected = REFUSED[kind]
    families.of(load(folder))
    spoil(folder)
    assert expected in refusal(folder)


def test_empty_markers_are_no_reason_to_refuse(folder: Path) -> None:
    set_config(folder, quantization_config=None, vision_config=None, layer_types=None)
    families.of(load(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_refused(name: str, folder: Path) -> None:
    """None at all, or a file of it cut off."""
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match=rf"{name} is no JSON \(.*\): fetch or write it again"):
        load(folder).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer in .*expected one of tokenizer\.json"):
        load(folder).tokenizer()
