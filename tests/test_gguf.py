"""Exported files, opened by real llama.cpp, give what transformers gives on the folder."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType
from tiny_folders import data_of, write_model, write_text
from tiny_gguf import CASES, WIDE, exported, random_ids, write_case
from tiny_tokenizer import tiny_tokenizer_of

from regrow import ExportConfig, UserError, families, load
from regrow.checkpoint import Checkpoint
from regrow.cost import file_bytes
from regrow.llama_cpp import GgufModel, quantize
from regrow.quantization.formats import GGUF_FORMATS, SCHEMES, TYPES
from regrow.stages.export import hyperparameters
from regrow.stages.export import stage as export_stage
from regrow.stages.export.tensors import contents, file_type, interleaved
from regrow.stages.export.verify import compare


def logits(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] by transformers in float32."""
    model = checkpoint.model(torch.float32)
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return logits_TV


def figures(folder: Path) -> dict[str, float]:
    rows = json.loads((folder / "manifest.json").read_text())["figures"]
    return {row["name"]: row["value"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    checkpoint = write_case(tmp_path / "model", case)
    out = tmp_path / "out"
    path = exported(checkpoint, out, "F32", verify="always", verify_tokens=64)
    ids = random_ids()
    expected = logits(checkpoint, ids)
    with GgufModel(path, context=len(ids)) as opened:
        computed = opened.logits(ids)
    scale = expected.abs().max().item()  # llama.cpp keeps keys and values in F16
    assert np.abs(expected.numpy() - computed).max() < 2e-3 * scale
    kl, same = compare(expected, computed)
    assert kl.mean() < 1e-5
    assert same.float().mean() > 0.97
    measured = figures(out)
    assert measured["kl"] < 1e-5
    assert measured["greedy_equal"] == 24
    assert measured["same_tokens"] == 1
    assert measured["bits_per_weight"] == 32


def test_the_cases_cover_every_family_that_llama_cpp_supports() -> None:
    from regrow import plugins

    known = {n for n in plugins.names("regrow.families") if families.get(n).gguf is not None}
    assert {model_type for model_type, _ in CASES.values()} == known


@pytest.mark.parametrize("type_name", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0", "Q4_K_M", "Q6_K"])
def test_each_type_has_its_stored_types_kl_and_size(type_name: str, tmp_path: Path) -> None:
    checkpoint = write_case(tmp_path / "model", "llama", torch.bfloat16)
    path = exported(checkpoint, tmp_path / "out", type_name, verify="always")
    limit = {"F16": 1e-3, "BF16": 2e-3, "Q8_0": 2e-2, "Q5_1": 0.1, "Q6_K": 0.05}.get(type_name, 0.4)
    measured = figures(path.parent)
    assert 0 < measured["kl"] < limit
    stored = contents(path)
    matrices = {kind for _, shape, kind in stored if len(shape) > 1}
    mixed = GGUF_FORMATS[type_name].by_llama_cpp
    if not mixed:
        expected_types = {type_name} | ({"Q8_0"} if type_name in ("Q5_1", "Q4_0") else set())
        assert matrices == expected_types  # the head, here also the embedding, has more bits
    fallbacks = json.loads((path.parent / "manifest.json").read_text())["fallbacks"]
    assert bool(fallbacks) == mixed  # rows of 64 and 96 are no multiple of 256
    size = sum(TYPES[kind].bytes(math.prod(shape[:-1]), shape[-1]) for _, shape, kind in stored)
    bits = 8 * size / families.of(checkpoint).count(checkpoint.config)
    assert measured["bits_per_weight"] == pytest.approx(bits)
    assert path.stat().st_size == measured["file_bytes"]


def test_sizes_are_those_of_the_gguf_package() -> None:
    for kind in TYPES.values():
        if kind.name not in SCHEMES:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]]
            assert (kind.block, kind.bits) == (block, 8 * size), kind.name
    for format in GGUF_FORMATS.values():
        prefix = "ALL" if format.name == "F32" else "MOSTLY"
        assert hasattr(LlamaFileType, f"{prefix}_{format.name}")


MIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "whole rows": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    "rows of 224": ("llama", {"num_key_value_heads": 2, "intermediate_size": 224}),
    "fused": ("phi3", {"num_key_value_heads": 4}),
    "8 experts": ("mixtral", {"num_local_experts": 8, "num_hidden_layers": 3}),
}


@pytest.mark.parametrize("case", MIXED)
def test_types_are_those_that_llama_cpp_chooses(case: str, tmp_path: Path) -> None:
    """In every mix of K-quants, in every layer, with rows that fit and rows that do not."""
    model_type, fields = MIXED[case]
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4}
    wide |= {"head_dim": 64, "num_hidden_layers": 17, "sliding_window": None}
    checkpoint = write_model(tmp_path / "model", model_type, torch.float16, **{**wide, **fields})
    source = export_stage.check(checkpoint, ExportConfig())
    plain = exported(checkpoint, tmp_path / "F16.gguf", "F16", verify="never")
    for mix in (format for format in GGUF_FORMATS.values() if format.by_llama_cpp):
        quantize(plain, tmp_path / "mix.gguf", file_type(mix.name))
        chosen = {name: kind for name, _, kind in contents(tmp_path / "mix.gguf")}
        assert {t.name: t.type for t in source.stored(mix)} == chosen, mix.name
        size = sum(t.bytes for t in source.stored(mix))
        assert file_bytes(source.family, checkpoint.config, mix.name) == size


def test_rows_that_do_not_fit_the_type_fall_back_and_are_reported(tmp_path: Path) -> None:
    fields = {**WIDE, "head_dim": 16, "intermediate_size": 72}
    checkpoint = write_model(tmp_path / "model", **fields)
    path = exported(checkpoint, tmp_path / "out", "Q4_0")
    by_name = {name: kind for name, _, kind in contents(path)}
    assert by_name["blk.0.ffn_down.weight"] == "F16"
    assert by_name["blk.0.ffn_up.weight"] == "Q4_0"
    (fallback,) = json.loads((path.parent / "manifest.json").read_text())["fallbacks"]
    size = 3 * 64 * 72 * 2  # three layers in F16
    more = size - 3 * 64 * 72 * 18 / 32
    assert fallback == (
        "3 tensors (ffn_down) with rows of 72, not a multiple of 32: F16 instead of Q4_0, "
        f"{size / 1e6:.2f} MB, {more / 1e6:.2f} MB more"
    )


def test_transformers_reads_the_same_tensors_from_the_file(tmp_path: Path) -> None:
    """F16 → transformers' own reader of GGUF → the same tensors."""
    checkpoint = write_case(tmp_path / "model", "llama", torch.float16)
    path = exported(checkpoint, tmp_path / "out", "F16", verify="never")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
        reread = load(path)
    assert set(reread.names()) == set(checkpoint.names())
    for name in checkpoint.names():
        expected = checkpoint.tensor(name).to(torch.bfloat16)  # what regrow keeps a GGUF file in
        assert torch.equal(reread.tensor(name), expected), name
    text = "Hello there, 12  cats.\n\nIt's <|im_end|>"
    assert reread.tokenizer()(text)["input_ids"] == checkpoint.tokenizer()(text)["input_ids"]


def test_the_halves_of_each_head_are_interleaved() -> None:
    rows = torch.arange(12.0)[:, None] * torch.ones(1, 3)
    order = interleaved(rows, 2)[:, 0].tolist()
    assert order == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_llama3_divisors_are_those_of_transformers() -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {**CASES["llama3 rotation"][1]["rope_parameters"]}
    config = AutoConfig.for_model("llama", head_dim=24, rope_parameters=parameters)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 24, 2).double() / 24)
    expected = (plain / scaled.double()).numpy()
    assert np.allclose(hyperparameters.llama3_divisors(parameters, 24), expected, rtol=1e-5)
    assert 1 < expected[5:].max() == pytest.approx(8)


def test_sliding_windows_end_the_context(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {**WIDE, "head_dim": 16, "sliding_window": 40}
    checkpoint = write_model(tmp_path / "model", "mistral", **fields)
    path = exported(checkpoint, tmp_path / "out", "F32", verify_tokens=40)
    assert "no sliding window: context_length is set to the window, 40 of 256" in (
        capsys.readouterr().err
    )
    assert GGUFReader(path).fields["llama.context_length"].contents() == 40
    assert figures(path.parent)["kl"] < 1e-5


@pytest.mark.parametrize("kind", ["byte fallback", "unigram", "unigram without bytes"])
def test_tokenizers_with_byte_fallback_and_unigram_split_the_same(
    kind: str, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer_of(kind)
    size = len(tokenizer) + 5  # an embedding with rows for no token
    checkpoint = write_model(tmp_path / "model", **WIDE, head_dim=16, vocab_size=size)
    tokenizer.save_pretrained(str(tmp_path / "model"))
    path = exported(checkpoint, tmp_path / "out", "F32", verify="always")
    with GgufModel(path) as opened:
        assert opened.vocab_size == size
        spelt = "The quick fox; naïve 東京\n\nParagraphs" if kind == "byte fallback" else "One fox"
        for text in ("Hello there, 12 cats.", spelt):
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert opened.tokenize(text) == expected, text
    assert figures(path.parent)["kl"] < 1e-5


def test_the_comparison_runs_on_held_out_text_of_the_data(tmp_path: Path) -> None:
    checkpoint = write_case(tmp_path / "model", "llama")
    from regrow import export

    data = data_of(write_text(tmp_path / "text.jsonl"))
    export(checkpoint, tmp_path / "out", ExportConfig(type="F16", verify_tokens=50), data)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (kl,) = [row for row in manifest["figures"] if row["name"] == "kl"]
    assert kl["n"] == 50
    assert "held-out text of the data, in windows of 32" in kl["convention"]


def test_a_broken_file_is_reported_in_one_line(tmp_path: Path) -> None:
    checkpoint = write_case(tmp_path / "model", "llama")
    path = exported(checkpoint, tmp_path / "out", "F32", verify="never")
    content = path.read_bytes()
    for size in (100, len(content) // 2, len(content) - 4096):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"llama\.cpp cannot load it") as caught:
            GgufModel(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(content[:100])
    with pytest.raises(UserError, match="truncated or not a GGUF file"):
        contents(path)
