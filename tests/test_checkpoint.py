"""Checkpoints: read lazily, written sharded and whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_folders import set_config, write_model
from tiny_models import tiny_ids, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from regrow import families
from regrow.checkpoint import Checkpoint, load, save, shards
from regrow.checkpoint.checkpoint import write
from regrow.checkpoint.model_config import EMBEDDING
from regrow.errors import UserError

CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "qwen3", "tie_word_embeddings": False},
    "fused": {"model_type": "phi3"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model", tie_word_embeddings=True)
    return tmp_path / "model"


def layout_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.meta(name) for name in checkpoint.names()}


def tensors_of(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    return ((name, checkpoint.tensor(name)) for name in checkpoint.names())


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    logits: Tensor = AutoModelForCausalLM.from_pretrained(folder)(tiny_ids()).logits
    return logits


def test_reads_what_the_stock_reader_reads(folder: Path) -> None:
    checkpoint = load(folder)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    del state["lm_head.weight"]
    assert set(checkpoint.names()) == set(state)
    for name, value in state.items():
        assert torch.equal(checkpoint.tensor(name), value)
        assert checkpoint.shapes[name] == tuple(value.shape)
        assert checkpoint.dtype(name) == "float32"
        assert checkpoint.bytes(name) == 4 * value.numel()
    assert checkpoint.shard_bytes() == sum(4 * value.numel() for value in state.values())


def test_opening_reads_headers_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor is read when it is asked for, and its file is opened once."""
    opened: list[str] = []

    def watched(path: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name)
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr("safetensors.safe_open", watched)
    checkpoint = load(folder)
    families.of(checkpoint)
    assert checkpoint.fingerprint
    assert opened == []
    for name in checkpoint.names():
        checkpoint.tensor(name)
    assert opened == ["model.safetensors"]


@pytest.mark.parametrize("limit", [1, 12_000, 60_000, 10**9])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sharded_checkpoint_is_read_by_transformers(
    kind: str, limit: int, tmp_path: Path
) -> None:
    """No file over the limit unless one tensor is; the index is right; stock reads it equal."""
    source = write_model(tmp_path / "model", **CONFIGS[kind])
    out = tmp_path / "out"
    write(out, source.config, layout_of(source), tensors_of(source), source, max_shard_bytes=limit)
    files = sorted(out.glob("*.safetensors"))
    for path in files:
        sizes = [tensor.numel() * 4 for tensor in load_file(path).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        assert not (out / shards.INDEX).exists()
    else:
        count = len(files)
        named = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        assert [path.name for path in files] == named
        index = json.loads((out / shards.INDEX).read_text())
        assert index["weight_map"] == {name: p.name for p in files for name in load_file(p)}
        assert index["metadata"]["total_size"] == sum(map(source.bytes, source.names()))
    assert len(files) == 1 if limit == 10**9 else len(files) > 1
    assert list(load(out).names()) == source.names()
    assert torch.equal(logits(out), logits(source.folder))


@pytest.mark.parametrize("stray", ["single file", "index"])
def test_the_weight_file_is_chosen_as_in_transformers(stray: str, tmp_path: Path) -> None:
    """Shards and a single file of another model in one folder: what the stock reader takes."""
    source = write_model(tmp_path / "model")
    folder = tmp_path / "both"
    shard_bytes = 20_000 if stray == "single file" else 10**9
    write(folder, source.config, layout_of(source), tensors_of(source), source, shard_bytes)
    sizes = {"vocab_size": source.config["vocab_size"], "rms_norm_eps": 1e-6}
    other = tiny_model("llama", torch.float32, seed=7, **sizes)
    other.save_pretrained(tmp_path / "other", max_shard_size=10**9 if shard_bytes < 10**9 else 9999)
    for path in (tmp_path / "other").glob("model*"):
        shutil.copyfile(path, folder / path.name)
    checkpoint, state = load(folder), AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), state[name])


def test_a_tied_head_stored_alone_is_the_embedding(folder: Path) -> None:
    """It is the embedding, as for the stock reader, in this checkpoint and in what is written."""
    expected, before = logits(folder), dict(tensors_of(load(folder)))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    checkpoint = load(folder)
    families.of(checkpoint)
    assert sorted(checkpoint.names()) == sorted(before)
    assert torch.equal(checkpoint.tensor(EMBEDDING), before[EMBEDDING])
    assert checkpoint.shapes[EMBEDDING] == before[EMBEDDING].shape
    write(folder / "out", checkpoint.config, layout_of(checkpoint), tensors_of(checkpoint))
    assert torch.equal(logits(folder), expected)
    assert torch.equal(logits(folder / "out"), expected)


def test_write_keeps_the_parents_shard_size(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model")
    write(
        tmp_path / "many",
        source.config,
        layout_of(source),
        tensors_of(source),
        source,
        max_shard_bytes=20_000,
    )
    sharded = load(tmp_path / "many")
    write(tmp_path / "again", sharded.config, layout_of(sharded), tensors_of(sharded), sharded)
    assert load(tmp_path / "again").shard_bytes() <= sharded.shard_bytes()
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1


def test_write_keeps_one_tensor_in_memory(tmp_path: Path) -> None:
    """When the next tensor is made, the one before is gone."""
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number in range(12):
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = torch.full((1000,), float(number))
            alive.append(weakref.ref(tensor))
            yield f"t{number}", tensor
            del tensor

    layout = {f"t{number}": torch.empty(1000, device="meta") for number in range(12)}
    write(tmp_path / "out", {}, layout, stream(), max_shard_bytes=8000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 6


def test_dtypes_of_all_widths_in_one_file(tmp_path: Path) -> None:
    """The safetensors package reads them equal; each lies at a multiple of its own width."""
    mixed = {
        "half": torch.randn(3).to(torch.bfloat16),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "turned": torch.randn(4, 3).T,
        "none": torch.empty(0, 5),
        "other": torch.randn(1, 1, 5).half(),
    }
    write(tmp_path, {}, mixed, mixed.items())
    path = tmp_path / "model.safetensors"
    tensors_read = load_file(path)
    assert set(tensors_read) == set(mixed)
    for name, tensor in mixed.items():
        assert tensors_read[name].dtype == tensor.dtype
        assert torch.equal(tensors_read[name], tensor)
    _, header = shards.read_headers(tmp_path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    for name, entry in header.items():
        assert (8 + length + entry["data_offsets"][0]) % mixed[name].element_size() == 0


@pytest.mark.parametrize("wrong", ["shape", "dtype", "name", "fewer", "more"])
def test_a_stream_that_differs_from_its_layout_is_no_checkpoint(wrong: str, tmp_path: Path) -> None:
    layout = {"a": torch.zeros(2), "b": torch.zeros(3)}
    b = {"shape": torch.zeros(2), "dtype": torch.zeros(3).half()}.get(wrong, torch.zeros(3))
    tensors = [("a", torch.zeros(2)), ("c" if wrong == "name" else "b", b), ("d", b)]
    count = {"fewer": 1, "more": 3}.get(wrong, 2)
    with pytest.raises((AssertionError, ValueError)):
        write(tmp_path, {}, layout, tensors[:count])


def test_tokenizer_and_chat_template_are_copied(folder: Path, tmp_path: Path) -> None:
    """Tokenizer, chat templates, generation config and licence; neither logs nor code."""
    GenerationConfig(eos_token_id=3, temperature=0.3, do_sample=True).save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "LICENSE").write_text("mine")
    (folder / "training.log").write_text("not theirs")
    (folder / "modeling_llama.py").write_text("import os")
    source, out = load(folder), tmp_path / "out"
    write(out, source.config, layout_of(source), tensors_of(source), source)
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
        *("config.json", "model.safetensors", "generation_config.json", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        "additional_chat_templates/tools.jinja",
    }
    tokenizer = AutoTokenizer.from_pretrained(out)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.temperature == 0.3
    assert model.generation_config.eos_token_id == 3


@pytest.mark.parametrize("tied", [True, False])
def test_save_writes_a_model_that_transformers_loads(tied: bool, tmp_path: Path) -> None:
    """Tied weights are written once and are still one parameter; the files around travel along."""
    source = write_model(tmp_path / "model", tie_word_embeddings=tied)
    model = tiny_model("llama", torch.float32, seed=5, tie_word_embeddings=tied, rms_norm_eps=1e-6)
    out = save(model, tmp_path / "out", like=source)
    assert ("lm_head.weight" in load(out).names()) is not tied
    back = AutoModelForCausalLM.from_pretrained(out)
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is tied
    with torch.no_grad():
        assert torch.equal(logits(out), model(tiny_ids()).logits)
    assert AutoTokenizer.from_pretrained(out).chat_template is not None


@pytest.mark.parametrize("tied", [True, False])
def test_write_stores_tied_weights_once(tied: bool, tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", tie_word_embeddings=tied)
    write(tmp_path / "out", source.config, layout_of(source), tensors_of(source), source)
    assert ("lm_head.weight" in load(tmp_path / "out").names()) is not tied
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (back.lm_head.weight is back.model.embed_tokens.weight) is tied


def test_save_is_all_or_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("regrow.checkpoint.checkpoint.carry", full)
    with pytest.raises(OSError, match="No space"):
        save(tiny_model("llama"), tmp_path / "out", like=load(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_save_refuses_a_folder_in_use(folder: Path) -> None:
    with pytest.raises(UserError, match="has files that are not from regrow"):
        save(tiny_model("llama"), folder, like=load(folder))
    assert load(folder).tokenizer() is not None


def test_the_fingerprint_depends_on_config_and_weights_only(folder: Path, tmp_path: Path) -> None:
    """Of what the model is, not of where it lies or when it was written."""
    first = load(folder).fingerprint
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    os.utime(moved / "model.safetensors", (0, 0))
    (moved / "README.md").write_text("words")
    assert load(moved).fingerprint == first
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    assert load(moved).fingerprint != first
    copied = Path(shutil.copytree(folder, tmp_path / "again"))
    set_config(copied, rope_theta=5.0)
    assert load(copied).fingerprint != first


def test_an_unchanged_folder_is_opened_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same object, until one of its files is another; never another folder's object."""
    monkeypatch.setattr("regrow.checkpoint.identity.SETTLED", -1.0)
    first = load(folder)
    assert load(str(folder)) is first
    assert load(folder, quantized=True) is first
    set_config(folder, rope_theta=5.0)
    changed = load(folder)
    assert changed is not first
    assert changed.config["rope_theta"] == 5.0
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert load(moved).folder == moved
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such model folder"):
        load(folder)
    moved.rename(folder)
    assert load(folder) is not changed


def test_a_tokenizer_is_read_once(folder: Path, tmp_path: Path) -> None:
    """Also where its files were copied; a changed template is another tokenizer."""
    first = load(folder).tokenizer()
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    assert load(moved).tokenizer() is first
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    assert load(moved).tokenizer().chat_template == "{{ messages }}"
    assert load(folder).tokenizer() is first


def test_remote_code_of_a_known_family_is_not_written(folder: Path, tmp_path: Path) -> None:
    """The stock class reads it, and what we write does not ask for code either."""
    set_config(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    source = load(folder)
    families.of(source)
    write(tmp_path / "cut", source.config, layout_of(source), tensors_of(source), source)
    save(source.model(torch.float32), tmp_path / "saved", like=source)
    for out in (tmp_path / "cut", tmp_path / "saved"):
        assert "auto_map" not in json.loads((out / "config.json").read_text())
        assert torch.equal(logits(out), logits(folder))
