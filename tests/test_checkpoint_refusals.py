"""Checkpoints that are not taken: each is refused in one line, before a tensor is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import set_config, write_model
from tiny_job import COMMANDS, Refused, command

from regrow import families
from regrow.checkpoint import load, shards
from regrow.checkpoint.checkpoint import write as write_folder
from regrow.checkpoint.model_config import EMBEDDING, HEAD
from regrow.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", tie_word_embeddings=True)
    return tmp_path / "model"


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
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


NORM = "model.norm.weight"


def one_shard_missing(folder: Path) -> None:
    source = load(folder)
    out = folder.with_name("sharded")
    tensors = ((name, source.tensor(name)) for name in source.names())
    layout = {name: source.meta(name) for name in source.names()}
    write_folder(out, source.config, layout, tensors, source, max_shard_bytes=60_000)
    shutil.rmtree(folder)
    out.rename(folder)
    next(folder.glob("model-00002-*")).unlink()


def broken_index(folder: Path) -> None:
    no_weights(folder)
    (folder / shards.INDEX).write_text('{"weight_map": [')


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def a_head_of_its_own(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    write_weights(folder, {**weights, HEAD: weights[EMBEDDING].flip(0).contiguous()})


def a_head_of_another_size(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    write_weights(folder, {**weights, HEAD: weights[EMBEDDING][1:].clone()})


def one_tensor_twice(folder: Path) -> None:
    no_weights(folder)
    for name in ("a", "b"):
        save_file({NORM: torch.zeros(48)}, folder / f"{name}.safetensors")
    weight_map = {NORM: "a.safetensors", EMBEDDING: "b.safetensors"}
    (folder / shards.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def with_generation_config(text: str) -> Callable[[Path], None]:
    return lambda folder: write(folder / "generation_config.json", text)


def write(path: Path, text: str) -> None:
    path.write_text(text)


def with_config(**fields: Any) -> Callable[[Path], None]:
    return lambda folder: set_config(folder, **fields)


TRUNCATED = "model.safetensors is truncated or no safetensors file: fetch or write it again"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (shutil.rmtree, "no such model folder"),
    "no config": (no_config, "no config.json in"),
    "broken JSON": (broken_config, "config.json is not valid JSON"),
    "no model_type": (empty_config, "config.json names no model_type"),
    "unknown family": (
        with_config(model_type="qwen9"),
        "no family named 'qwen9' — did you mean 'qwen3'?; there are: gemma3_text, llama, mistral, "
        "mixtral, phi3, qwen2, qwen3, qwen3_moe; to add one, read docs/add-a-family.md",
    ),
    "remote code": (
        with_config(model_type="my_llama", auto_map={"AutoModelForCausalLM": "modeling_my.My"}),
        "would need remote code (auto_map in its config), which is never run",
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
        "is multimodal, and 0 of its tensors are an embedding of 262208 tokens in 2304 channels: "
        "its text model is not found",
    ),
    "linear attention": (
        with_config(layer_types=["linear_attention", "full_attention", "full_attention"]),
        "is a hybrid model (linear_attention): only attention layers are supported",
    ),
    "mamba": (with_config(mamba_d_state=16), "is a hybrid model (mamba_d_state)"),
    "no multiple": (
        with_config(num_attention_heads=5),
        "model: transformers cannot build a causal language model from this config: The hidden "
        "size (48) is not a multiple of the number of attention heads (5).",
    ),
    "layer_types too long": (
        with_config(layer_types=["full_attention"] * 9),
        "`num_hidden_layers` (3) must be equal to the number of `layer_types` (9)",
    ),
    "a size in words": (with_config(hidden_size="48"), "Field 'hidden_size' expected int, got str"),
    "no such activation": (with_config(hidden_act="relu9"), "from this config: KeyError 'relu9'"),
    "no such dtype": (with_config(dtype="float17"), "has no attribute 'float17'"),
    "no heads": (with_config(num_attention_heads=0), "cannot build a causal language model from"),
    "head of its own": (a_head_of_its_own, f"{HEAD} differs from {EMBEDDING}, although config"),
    "head of another size": (a_head_of_another_size, f"{HEAD} differs from {EMBEDDING}"),
    "one tensor twice": (one_tensor_twice, f"{NORM} is in a.safetensors and in b.safetensors of"),
    "generation config cut off": (
        with_generation_config('{"temperature":'),
        "generation_config.json is not valid JSON",
    ),
    "generation config of a list": (
        with_generation_config("[1]"),
        "generation_config.json is refused by transformers: ",
    ),
    "generation config out of range": (
        with_generation_config('{"max_new_tokens": -1}'),
        "refused by transformers: `max_new_tokens` must be greater than 0, but is -1.; correct it",
    ),
    "very deep JSON": (
        with_generation_config("[" * 100_000),
        "generation_config.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_broken_or_unsupported_checkpoint_is_refused_in_one_line(kind: str, folder: Path) -> None:
    spoil, expected = REFUSED[kind]
    families.of(load(folder))
    spoil(folder)
    assert expected in refusal(folder)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma3_text", "phi3", "qwen3_moe"])
def test_a_null_head_dim_is_accepted(model_type: str, tmp_path: Path) -> None:
    """These families need a number, or none at all."""
    write_model(tmp_path / "model", model_type)
    set_config(tmp_path / "model", head_dim=None)
    assert "transformers cannot build a causal language model" in refusal(tmp_path / "model")


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_mamba", "xlstm", "rwkv"])
def test_models_without_attention_are_refused(model_type: str, folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert "only attention layers are supported" in refusal(folder)


def test_every_stage_refuses_a_tied_config_with_a_separate_head(
    place: Path, untouched: Path, refused: Refused
) -> None:
    """The stages that would drop it, and those that run the model."""
    a_head_of_its_own(place / "model")
    set_config(place / "model", tie_word_embeddings=True)
    for name in COMMANDS:
        message = refused(*command(name, place, place / "model", untouched))
        assert f"{HEAD} differs from {EMBEDDING}, although config.json ties them" in message


@pytest.mark.parametrize("name", COMMANDS)
def test_every_stage_refuses_a_weight_that_is_nan(
    name: str, place: Path, untouched: Path, refused: Refused
) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    weights[NORM][0] = torch.nan
    write_weights(place / "model", weights)
    arguments = command(name, place, place / "model", untouched)
    message = refused(*arguments, at_once=name != "evaluate")
    assert f"model: {NORM} has values that are NaN or infinite: fetch the model again" in message


def test_empty_markers_are_no_reason_to_refuse(folder: Path) -> None:
    set_config(folder, quantization_config=None, vision_config=None, layer_types=None)
    families.of(load(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(name: str, folder: Path) -> None:
    """None at all, or a file of it cut off."""
    text = (folder / name).read_text()
    (folder / name).write_text(text[: len(text) // 2])
    with pytest.raises(
        UserError, match=rf"{name} is not valid JSON \(.*\): fetch or write it again"
    ):
        load(folder).tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer in .*expected one of tokenizer\.json"):
        load(folder).tokenizer()


def test_a_sentencepiece_tokenizer_alone_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask for tiktoken, which cannot read it either."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    with pytest.raises(UserError, match=r"tokenizer\.model cannot be read without tokenizer\.json"):
        load(folder).tokenizer()
