"""The export stage: by the command line and by a recipe, refused where it cannot be, kept whole."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import set_config, write_model, write_text
from tiny_gguf import FLAT, WIDE, exported, write_case
from tiny_job import PROFILE, PRUNE, Refused, recipe_fields, write_recipe

from regrow import UserError, llama_cpp
from regrow.checkpoint import Checkpoint, load
from regrow.cli.main import main
from regrow.stages.export import tensors


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("export") / "model", "llama", torch.bfloat16).folder


def test_an_export_to_a_folder_is_verified_and_skipped_the_second_time(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(model), "--out", str(tmp_path / "out"), "--type", "q8_0"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "model-Q8_0.gguf, architecture llama" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    output = capsys.readouterr()
    assert output.out.strip() == str(tmp_path / "out" / "model-Q8_0.gguf")
    assert "verified: llama.cpp against transformers" in output.err
    assert "llama_model_loader" not in output.err + output.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model-Q8_0.gguf", "Modelfile", "README.md", "manifest.json"}
    assert main(arguments) == 0
    assert "complete and unchanged" in capsys.readouterr().err


def test_exports_to_files_of_one_folder_leave_other_files_alone(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("small.gguf", "large.gguf"):
        kind = "F16" if name == "large.gguf" else "Q8_0"
        path = exported(Checkpoint(model), tmp_path / name, kind, verify="never")
        assert path == tmp_path / name
    endings = {"gguf", "Modelfile", "README.md", "manifest.json"}
    expected = {f"{stem}.{end}" for stem in ("small", "large") for end in endings}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"notes.txt"}
    assert (tmp_path / "small.Modelfile").read_text().startswith("FROM ./small.gguf\n")
    before = (tmp_path / "small.gguf").stat().st_mtime_ns
    exported(Checkpoint(model), tmp_path / "small.gguf", "Q8_0", verify="never")
    assert (tmp_path / "small.gguf").stat().st_mtime_ns == before
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="was not written by regrow export"):
        exported(Checkpoint(model), tmp_path / "mine.gguf", "Q8_0")


def test_a_recipe_exports_a_verified_file_and_writes_model_cards(tmp_path: Path) -> None:
    write_model(tmp_path / "model", dtype=torch.bfloat16, head_dim=8)
    (tmp_path / "model" / "LICENSE").write_text("MIT License\n\nCopyright (c) …")
    text = write_text(tmp_path / "text.jsonl", documents=120)
    stages = [PROFILE, PRUNE, {"export": {"type": "F16", "verify_tokens": 40}}]
    recipe = write_recipe(tmp_path / "r.yaml", recipe_fields(tmp_path / "model", text, *stages))
    assert main(["run", str(recipe), "--out", str(tmp_path / "mini")]) == 0
    out = tmp_path / "mini" / "stages" / "03-export"
    manifest = json.loads((out / "manifest.json").read_text())
    figures = {row["name"]: row for row in manifest["figures"]}
    assert figures["kl"]["n"] == 40
    assert figures["kl"]["value"] < 1e-3
    assert (out / "mini-F16.gguf").exists()
    for card in (out / "README.md", tmp_path / "mini" / "model" / "README.md"):
        card_text = card.read_text()
        assert card_text.startswith("---\nlicense: mit\n")
        assert "- of the base model: mit (recognised from its file LICENSE)" in card_text
        assert "- 02-prune-repaired: prune of `" in card_text
        assert "- text.jsonl: licence unknown" in card_text
        assert str(tmp_path) not in card_text
    assert "| kl | " in (out / "README.md").read_text()


def test_an_export_after_quantize_has_the_unrounded_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", dtype=torch.bfloat16, head_dim=8).folder
    text = write_text(tmp_path / "text.jsonl", documents=120)
    quantized = {"quantize": {"scheme": "int8", "method": "rtn"}}
    stages = [quantized, {"export": {"type": "BF16", "verify": "never"}}]
    recipe = write_recipe(tmp_path / "r.yaml", recipe_fields(folder, text, *stages))
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    gguf = tmp_path / "run" / "stages" / "02-export" / "model-BF16.gguf"
    source, exported_checkpoint = Checkpoint(folder), load(str(gguf))
    for name in source.names():
        assert torch.equal(
            exported_checkpoint.tensor(name).to(torch.bfloat16), source.tensor(name)
        ), name
    assert (tmp_path / "run" / "model" / "config.json").read_text().count("quantization_config")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        "is quantized (gptq): prune first and quantize last",
    ),
    "rotation": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic': llama.cpp's llama supports default, linear, llama3, yarn",
    ),
    "activation": ({"hidden_act": "relu"}, "activation 'relu': llama.cpp's llama supports silu"),
    "unknown family": ({"model_type": "lama"}, "no family named 'lama'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_llama_cpp_computes_differently_is_refused(
    kind: str, model: Path, tmp_path: Path, refused: Refused
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    fields, expected = REFUSED[kind]
    set_config(folder, **fields)
    assert expected in refused("export", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi3 with fewer heads": (
        "phi3",
        {"head_dim": 8},
        "4 heads of 8 with hidden_size 64: llama.cpp's phi3 requires heads × head_dim = hidden",
    ),
    "layers without experts": (
        "qwen3_moe",
        {"decoder_sparse_step": 2},
        "layer 0 has no experts: llama.cpp's qwen3moe has experts in every layer",
    ),
    "router as it is": (
        "qwen3_moe",
        {"decoder_sparse_step": 1, "norm_topk_prob": False},
        "norm_topk_prob false",
    ),
    "no period": (
        "gemma3_text",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layers [0, 2] of 4 have full attention: llama.cpp supports only a regular",
    ),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias: llama.cpp's qwen3 has no bias"),
    "width": (
        "qwen2",
        {**FLAT, "hidden_size": 48, "intermediate_size": 56},
        "in blocks of 32 weights, but 100% of this model's weights are in rows of 48, 56",
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_shape_that_llama_cpp_does_not_support_is_refused(
    kind: str, tmp_path: Path, refused: Refused
) -> None:
    model_type, fields, expected = SHAPES[kind]
    write_model(tmp_path / "m", model_type, **{**WIDE, **fields})
    message = refused("export", tmp_path / "m", "--out", tmp_path / "out")
    assert expected in message


def test_a_missing_extra_is_named_with_its_pip_command(
    model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    for missing, more, expected in (
        (
            "cyllama",
            ["--type", "Q4_K_M"],
            "type Q4_K_M needs llama.cpp: pip install 'regrow[llama]'",
        ),
        ("cyllama", ["--verify", "always"], "needs llama.cpp: pip install 'regrow[llama]'"),
        ("gguf", [], "writing GGUF needs the gguf package: pip install 'regrow[gguf]'"),
    ):
        for module in ("regrow.llama_cpp", "regrow.stages.export.stage"):
            monkeypatch.setattr(
                f"{module}.find_spec",
                lambda name, gone=missing: None if name == gone else find(name),
            )
        assert expected in refused("export", model, "--out", tmp_path / "out", *more)


def test_an_export_without_llama_cpp_is_not_verified_and_says_so(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    exported(Checkpoint(model), tmp_path / "out", "F16")
    assert "not verified, because llama.cpp is missing" in capsys.readouterr().err


def test_an_unknown_type_is_refused_with_the_nearest_name(
    model: Path, tmp_path: Path, refused: Refused
) -> None:
    message = refused("export", model, "--out", tmp_path / "out", "--type", "Q4_K_X")
    assert message.startswith("--type: no type named 'Q4_K_X' — did you mean 'Q4_K_")


@pytest.mark.parametrize("out", ["out", "out.gguf"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_full_disk_leaves_no_file(
    out: str, kind: str, model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any
) -> None:
    free = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    message = refused("export", model, "--out", tmp_path / out, "--type", kind)
    assert "no disk space for" in message
    monkeypatch.setattr(shutil, "disk_usage", free)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_packed", full)
    message = refused("export", model, "--out", tmp_path / out, "--type", kind, at_once=False)
    assert "no disk space left while writing" in message
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_outputs_differ_is_deleted(
    model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.stages.export.tensors.INTERLEAVED", ())
    message = refused("export", model, "--out", tmp_path / "out", "--type", "F16", at_once=False)
    assert "nats from transformers', more than 0.01 for F16, so the file was deleted" in message
    assert list(tmp_path.iterdir()) == []


def test_values_beyond_the_range_of_f16_are_refused(tmp_path: Path, refused: Refused) -> None:
    folder = write_case(tmp_path / "m", "mistral").folder
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refused("export", folder, "--out", tmp_path / "out", "--type", "F16", at_once=False)
    assert message.startswith("blk.1.ffn_up.weight has values beyond ±65504")
