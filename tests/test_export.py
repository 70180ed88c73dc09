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
from tiny_folders import write_model, write_text
from tiny_gguf import FLAT, WIDE, exported, write_case
from tiny_job import PROFILE, PRUNE, Refused, recipe_fields, write_recipe
from tiny_tokenizer import GENERATION_TEMPLATE, tiny_tokenizer
from tokenizers import Regex, pre_tokenizers

from regrow import UserError, llama_cpp
from regrow.checkpoint import Checkpoint
from regrow.cli import main
from regrow.stages.export import chat, pre, writer
from regrow.stages.export.lineage import Licence, licence_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_case(tmp_path_factory.mktemp("export") / "model", "llama", torch.bfloat16).folder


def set_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_to_a_folder_and_again(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["export", str(model), "--out", str(tmp_path / "out"), "--type", "q8_0"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "model-Q8_0.gguf, architecture llama" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "out" / "model-Q8_0.gguf")
    assert "verified: llama.cpp against transformers" in said.err
    assert "llama_model_loader" not in said.err + said.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model-Q8_0.gguf", "Modelfile", "README.md", "manifest.json"}
    assert main(arguments) == 0
    assert "complete and unchanged" in capsys.readouterr().err


def test_to_files_side_by_side(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("small.gguf", "large.gguf"):
        kind = "F16" if name == "large.gguf" else "Q8_0"
        path = exported(Checkpoint(model), tmp_path / name, kind, verify="never")
        assert path == tmp_path / name
    beside = {"gguf", "Modelfile", "README.md", "manifest.json"}
    expected = {f"{stem}.{end}" for stem in ("small", "large") for end in beside}
    assert {path.name for path in tmp_path.iterdir()} == expected | {"notes.txt"}
    assert (tmp_path / "small.Modelfile").read_text().startswith("FROM ./small.gguf\n")
    before = (tmp_path / "small.gguf").stat().st_mtime_ns
    exported(Checkpoint(model), tmp_path / "small.gguf", "Q8_0", verify="never")
    assert (tmp_path / "small.gguf").stat().st_mtime_ns == before
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="was not written by regrow export"):
        exported(Checkpoint(model), tmp_path / "mine.gguf", "Q8_0")


def test_in_a_recipe(tmp_path: Path) -> None:
    write_model(tmp_path / "model", dtype=torch.bfloat16, head_dim=8)
    (tmp_path / "model" / "LICENSE").write_text("MIT License\n\nCopyright (c) …")
    text = write_text(tmp_path / "text.jsonl", documents=120)
    stages = [PROFILE, PRUNE, {"export": {"type": "F16", "verify_tokens": 40}}]
    recipe = write_recipe(tmp_path / "r.yaml", recipe_fields(tmp_path / "model", text, *stages))
    assert main(["run", str(recipe), "--out", str(tmp_path / "mini")]) == 0
    out = tmp_path / "mini" / "stages" / "03-export"
    made = json.loads((out / "manifest.json").read_text())
    figures = {row["name"]: row for row in made["figures"]}
    assert figures["kl"]["n"] == 40
    assert figures["kl"]["value"] < 1e-3
    assert (out / "mini-F16.gguf").exists()
    for card in (out / "README.md", tmp_path / "mini" / "model" / "README.md"):
        told = card.read_text()
        assert told.startswith("---\nlicense: mit\n")
        assert "- of the parent: mit (its file LICENSE begins so)" in told
        assert "- 02-prune-repaired: prune of `" in told
        assert "- text.jsonl: licence unknown to regrow" in told
        assert str(tmp_path) not in told
    assert "| kl | " in (out / "README.md").read_text()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "quantized": (
        {"quantization_config": {"quant_method": "gptq"}},
        "is quantized (gptq): prune first and quantize last",
    ),
    "rotation": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'dynamic': llama.cpp's llama knows default, linear, llama3, yarn",
    ),
    "activation": ({"hidden_act": "relu"}, "activation 'relu': llama.cpp's llama computes silu"),
    "unknown family": ({"model_type": "lama"}, "no family named 'lama'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_model(kind: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    fields, expected = REFUSED[kind]
    set_config(folder, **fields)
    assert expected in refused("export", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


SHAPES: dict[str, tuple[str, dict[str, Any], str]] = {
    "phi3 with fewer heads": (
        "phi3",
        {"head_dim": 8},
        "4 heads of 8 with hidden_size 64: llama.cpp's phi3 holds heads × head_dim = hidden_size",
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
        "layers [0, 2] of 4 have full attention: llama.cpp derives that from a period",
    ),
    "bias": ("qwen3", {"attention_bias": True}, "attention_bias: llama.cpp's qwen3 has none"),
    "width": (
        "qwen2",
        {**FLAT, "hidden_size": 48, "intermediate_size": 56},
        "type Q8_0 packs 32 weights of a row, and 100% of this model's are in rows of 48, 56",
    ),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_refused_shape(kind: str, tmp_path: Path, refused: Refused) -> None:
    model_type, fields, expected = SHAPES[kind]
    write_model(tmp_path / "m", model_type, **{**WIDE, **fields})
    said = refused("export", tmp_path / "m", "--out", tmp_path / "out")
    assert expected in said


def test_refused_by_a_missing_extra(
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


def test_not_verified_without_llama_cpp(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)
    exported(Checkpoint(model), tmp_path / "out", "F16")
    assert "not verified, llama.cpp is not installed" in capsys.readouterr().err


def test_refused_type(model: Path, tmp_path: Path, refused: Refused) -> None:
    said = refused("export", model, "--out", tmp_path / "out", "--type", "Q4_K_X")
    assert said.startswith("--type: no type named 'Q4_K_X' — did you mean 'Q4_K_")


@pytest.mark.parametrize("out", ["out", "out.gguf"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K_M"])
def test_a_disk_that_fills(
    out: str, kind: str, model: Path, tmp_path: Path, refused: Refused, monkeypatch: Any
) -> None:
    free = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    said = refused("export", model, "--out", tmp_path / out, "--type", kind)
    assert "no disk space for" in said
    monkeypatch.setattr(shutil, "disk_usage", free)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_packed", full)
    said = refused("export", model, "--out", tmp_path / out, "--type", kind, at_once=False)
    assert "no disk space left while writing" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_differs_is_not_kept(
    model: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.stages.export.tensors.INTERLEAVED", ())
    said = refused("export", model, "--out", tmp_path / "out", "--type", "F16", at_once=False)
    assert "nats from transformers', more than 0.01 for F16: the file is not kept" in said
    assert list(tmp_path.iterdir()) == []


def test_values_that_f16_cannot_hold(tmp_path: Path, refused: Refused) -> None:
    folder = write_case(tmp_path / "m", "mistral").folder
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = refused("export", folder, "--out", tmp_path / "out", "--type", "F16", at_once=False)
    assert said.startswith("blk.1.ffn_up.weight has values beyond ±65504")


def rules_of(splitter: Any, ignore_merges: bool = False) -> dict[str, Any]:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = ignore_merges
    return rules


def test_how_a_tokenizer_splits() -> None:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    assert pre.identify(rules_of(plain)) == "gpt-2"
    assert pre.identify(rules_of(digits)) == "smollm"
    assert pre.identify(rules_of(pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    odd = rules_of(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), plain]))
    with pytest.raises(UserError, match=r"splits text \(Punctuation \+ words and bytes\)"):
        pre.name_of(odd, None)
    assert pre.name_of(odd, "gpt-2") == "gpt-2"


@pytest.mark.parametrize("name", pre.KNOWN)
def test_llama_cpp_splits_as_the_tokenizer(name: str, tmp_path: Path) -> None:
    """The same expressions, by their effect: llama.cpp's tokens are those of the tokenizer."""
    from regrow.llama_cpp import GgufModel

    steps, whole = pre.KNOWN[name]
    made: list[Any] = []
    for step in steps:
        if step[0] == "split":
            made.append(pre_tokenizers.Split(Regex(step[1]), "isolated"))
        elif step[0] == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=step[1]))
        else:
            regex = step[0] != "bytes"
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex))
    checkpoint = write_case(tmp_path / "m", "llama")
    tokenizer = checkpoint.tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(made)
    path = tmp_path / "m" / "tokenizer.json"
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = whole
    # Merges across what some ways keep apart, so that a wrong way shows.
    for pair in ("1 2", "12 3", "Ġ 1", "1 9", ". Ċ", "Ċ Ċ", "Ġ Ġ", "' S", "a B"):
        left, right = pair.split(" ")
        rules["model"]["vocab"].setdefault(left + right, len(rules["model"]["vocab"]))
        rules["model"]["merges"].insert(0, [left, right])
    path.write_text(json.dumps(rules))
    set_config(tmp_path / "m", vocab_size=len(rules["model"]["vocab"]))
    _widen(tmp_path / "m", len(rules["model"]["vocab"]))
    again = Checkpoint(tmp_path / "m")
    assert pre.identify(json.loads(again.tokenizer().backend_tokenizer.to_str())) == name
    file = exported(again, tmp_path / "out", "F32", verify="never")
    with GgufModel(file) as opened:
        for text in ("In 1907 12345 ships;  it'S\n\n\nHe'll aBc.\n\n x", "naïve  東京 ÄÖ १२३"):
            expected = again.tokenizer()(text, add_special_tokens=False)["input_ids"]
            assert opened.tokenize(text) == expected, text


def _widen(folder: Path, size: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    old = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = torch.cat([old, old[: size - len(old)]]).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_chat_template_in_ollamas_language(tmp_path: Path) -> None:
    found = chat.pieces_of(tiny_tokenizer())
    assert found is not None
    assert found.system == ("<|im_start|>system\n", "<|im_end|>\n")
    assert found.user == ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    assert found.answer == "<|im_end|>\n"
    assert found.default == ""
    assert found.go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}'
        '<|im_end|>\n{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '<|im_start|>assistant\n{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}"
    )
    assert chat.pieces_of(tiny_tokenizer(chat_template=None)) is None
    assert chat.pieces_of(tiny_tokenizer(chat_template="{{ messages | length }}")) is None
    shouts = GENERATION_TEMPLATE.replace("m['content']", "m['content'] | upper")
    assert chat.pieces_of(tiny_tokenizer(chat_template=shouts)) is None


def test_a_licence_is_not_guessed(tmp_path: Path) -> None:
    assert licence_of(str(tmp_path)) == Licence()
    assert str(licence_of(str(tmp_path))) == "unknown"
    assert licence_of("someone/some-model").id is None
    (tmp_path / "LICENSE").write_text("You may do what you like, mostly.")
    assert licence_of(str(tmp_path)).id is None
    (tmp_path / "LICENSE.txt").write_text("   Apache License\n   Version 2.0, January 2004")
    assert licence_of(str(tmp_path)).id == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    assert "non-commercial" in licence_of(str(tmp_path)).terms
