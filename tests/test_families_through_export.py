"""Ten types of models through every stage from the command line, three of them multimodal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import write_model, write_text
from tiny_job import LENGTH, Refused, call
from tiny_multimodal import IMAGE, logits_with_image, write_multimodal
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from regrow.checkpoint import Checkpoint

TEXT: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "llama": ({}, ["--num-layers", 2, "--intermediate-size", 40, "--hidden-size", 36]),
    "smollm3": ({"no_rope_layer_interval": 2}, ["--num-layers", 2, "--num-attention-heads", 4]),
    "olmo2": ({}, ["--num-attention-heads", 4, "--intermediate-size", 40]),
    "granite": (
        {"residual_multiplier": 0.22, "logits_scaling": 8.0},
        ["--hidden-size", 40, "--intermediate-size", 40],
    ),
    "glm4": ({"head_dim": 8}, ["--num-layers", 2, "--num-key-value-heads", 1]),
    "gpt_oss": ({"num_local_experts": 4}, ["--num-layers", 2, "--hidden-size", 40]),
    "qwen3_moe": ({"decoder_sparse_step": 1}, ["--num-experts", 3, "--hidden-size", 40]),
    "ministral3": ({"head_dim": 8}, ["--hidden-size", 40]),
}
"""Fields of the config, and the sizes to prune to."""
MULTIMODAL: dict[str, list[Any]] = {
    "gemma3": ["--num-layers", 2, "--intermediate-size", 40],
    "mistral3": ["--num-layers", 2, "--num-key-value-heads", 1, "--intermediate-size", 40],
    "qwen3_5": ["--intermediate-size", 40],
}
EXPORTED = {"llama", "qwen3_moe", "gemma3", "mistral3"}
"""Types that llama.cpp opens with what regrow writes."""


def through(model: Path, place: Path, sizes: list[Any]) -> Path:
    """Inspect, profile, prune with repair and distil; returns the last folder."""
    text = ["--data", write_text(place / "text.jsonl"), "--sequence-length", LENGTH]
    call("inspect", model)
    call("profile", model, *text, "--samples", 16, "--gram-tokens", 512, "--out", place / "profile")
    sizes = [*sizes, "--multiple-of", 4]
    call("prune", model, "--profile", place / "profile", *sizes, "--out", place / "cut")
    call(
        *("distill", place / "cut", "--teacher", model, *text, "--out", place / "better"),
        *("--tokens", 512, "--batch-tokens", 128, "--eval-tokens", 256),
        *("--heldout-sequences", 2),
    )
    return place / "better"


def export(name: str, better: Path, place: Path, refused: Refused) -> None:
    """Write a GGUF file, or be refused in one line."""
    arguments = ["export", better, "--type", "F16", "--out", place / "x.gguf"]
    if name in EXPORTED:
        call(*arguments)
        assert (place / "x.gguf").stat().st_size > 10_000
        return
    assert "cannot be exported" in refused(*arguments)
    assert not (place / "x.gguf").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TEXT)
def test_text_models(name: str, tmp_path: Path, refused: Refused) -> None:
    fields, sizes = TEXT[name]
    write_model(tmp_path / "model", name, **fields)
    better = through(tmp_path / "model", tmp_path, sizes)
    model = AutoModelForCausalLM.from_pretrained(better)
    assert bool(model(torch.arange(4, 12)[None]).logits.isfinite().all())
    export(name, better, tmp_path, refused)


@pytest.mark.parametrize(
    "name", [n if n == "gemma3" else pytest.param(n, marks=pytest.mark.slow) for n in MULTIMODAL]
)
def test_multimodal_models(name: str, tmp_path: Path, refused: Refused) -> None:
    """The text model is cut and trained; the rest is the same, byte for byte."""
    model = write_multimodal(tmp_path / "model", name)
    (model / "preprocessor_config.json").write_text('{"do_resize": true}')
    better = through(model, tmp_path, MULTIMODAL[name])
    before, after = (load_file(folder / "model.safetensors") for folder in (model, better))
    others = Checkpoint(model).whole.others  # type: ignore[union-attr]
    assert len(others) > 10 and {n.split(".")[0] for n in others} != {"language_model"}
    for tensor in others:
        assert torch.equal(before[tensor].view(torch.uint8), after[tensor].view(torch.uint8))
    inside = set(after) - set(others)
    assert any(not torch.equal(after[n], before[n]) for n in inside & set(before))
    dense, config = (json.loads((f / "config.json").read_text()) for f in (model, better))
    assert config["text_config"]["intermediate_size"] == 40
    assert config["vision_config"] == dense["vision_config"]
    assert config["model_type"] == name
    assert (better / "preprocessor_config.json").read_text() == '{"do_resize": true}'
    kind = AutoModelForImageTextToText
    whole, loaded = kind.from_pretrained(better, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"]
    assert bool(logits_with_image(whole.eval()).isfinite().all())
    export(name, better, tmp_path, refused)


def test_the_text_model_of_a_multimodal_folder_computes_the_same(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_multimodal(tmp_path / "model", "mistral3"))
    ids = torch.arange(9, 20)[None]
    whole, text = (make(torch.float32) for make in (checkpoint.whole_model, checkpoint.model))
    assert torch.equal(whole(input_ids=ids).logits, text(ids).logits)
    assert IMAGE not in ids


def without_embedding(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], None] | None, list[Any], str]] = {
    "hidden": (
        None,
        ["prune", "MODEL", "--hidden-size", 40],
        "hidden_size 40: it cannot be cut in this gemma3_text model: the model is multimodal",
    ),
    "vocab": (None, ["prune", "MODEL", "--vocab-size", 64], "the model is multimodal"),
    "rotate": (None, ["rotate", "MODEL"], "gemma3_text cannot be rotated: the model is multi"),
    "quantize": (
        None,
        ["quantize", "MODEL", "--scheme", "int8", "--method", "rtn"],
        "is multimodal: packed weights are not written into it",
    ),
    "no text model": (
        without_embedding,
        ["inspect", "MODEL"],
        "is multimodal, and 0 of its tensors are an embedding of",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_multimodal_folder_does_not_allow(
    name: str, tmp_path: Path, refused: Refused
) -> None:
    change, arguments, message = REFUSED[name]
    model = write_multimodal(tmp_path / "model", "gemma3")
    if change is not None:
        change(model)
    if name in ("rotate",):
        arguments = [*arguments, "--data", write_text(tmp_path / "text.jsonl")]
    if name != "no text model":
        arguments = [*arguments, "--out", tmp_path / "out"]
    said = refused(*(model if a == "MODEL" else a for a in arguments))
    assert message in said
    assert not (tmp_path / "out").exists()
