"""Folders with sparse weights as bitmasks: smaller, and the same model when it is read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import data_of, write_model, write_text
from tiny_job import call, refused

from regrow import (
    EvaluateConfig,
    ExportConfig,
    SparsifyConfig,
    UserError,
    evaluate,
    export,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.bitmask import Packed
from regrow.sparsity import zeros
from regrow.stages.sparsify.stage import sparsify

TYPE = ExportConfig(type="bitmask")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    place = tmp_path_factory.mktemp("sparse")
    model = write_model(place / "model", dtype=torch.bfloat16, intermediate_size=61)
    config = SparsifyConfig(method="magnitude", sparsity=0.6, keep=("v_proj",))
    return load(sparsify(model, place / "sparse", config))


@pytest.fixture(scope="module")
def packed(sparse: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(sparse, tmp_path_factory.mktemp("packed") / "out", TYPE)


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_it_is_smaller_and_read_back_bit_for_bit(sparse: Checkpoint, packed: Path) -> None:
    assert bytes_of(packed) < 0.85 * bytes_of(sparse.folder)
    back = load(packed)
    assert back.shapes == sparse.shapes
    for name in sparse.names():
        assert torch.equal(back.tensor(name), sparse.tensor(name)), name
        assert back.dtype(name) == sparse.dtype(name)
    assert back.config == sparse.config
    assert back.tokenizer().get_vocab() == sparse.tokenizer().get_vocab()
    assert zeros.sparsity_of(back) == "0.6"


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_the_bytes_that_are_told_are_those_that_are_written(share: float, tmp_path: Path) -> None:
    """At a tenth of zeros a bitmask saves nothing, and none is written."""
    model = write_model(tmp_path / "model", dtype=torch.bfloat16)
    config = SparsifyConfig(method="magnitude", sparsity=share)
    sparse = sparsify(model, tmp_path / "sparse", config)
    size = EvaluateConfig(metrics=("size",))
    evaluation = evaluate({"it": sparse}, tmp_path / "evaluation", config=size)
    rows = json.loads((evaluation / "evaluation.json").read_text())["figures"]["it"]
    told = {row["name"]: row["value"] for row in rows}
    at_once = {row["name"]: row["value"] for row in stage_dir.read(sparse)["figures"]}
    assert told["zeros"] == pytest.approx(at_once["zeros of all"])
    if share < 0.5:
        assert "bytes_as_bitmask" not in told
        assert at_once["bytes as bitmask"] == at_once["bytes"]
        return
    packed = export(sparse, tmp_path / "packed", TYPE)
    assert told["bytes_as_bitmask"] == at_once["bytes as bitmask"] == Packed(packed).bytes()


def test_only_sparse_weights_are_packed(packed: Path) -> None:
    stored = load_file(packed / "model.safetensors")
    assert "model.layers.0.self_attn.v_proj.weight" in stored
    assert "model.layers.0.mlp.down_proj.weight" not in stored
    assert stored["model.layers.0.mlp.down_proj.bitmask"].shape == (48, 8)  # 61 columns
    entry = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert entry["sparsity_config"]["format"] == "sparse-bitmask"
    assert entry["sparsity_config"]["global_sparsity"] == pytest.approx(0.6, abs=0.01)
    assert "model.layers.0.self_attn.v_proj" in entry["sparsity_config"]["ignore"]


def test_every_command_reads_it(sparse: Checkpoint, packed: Path, tmp_path: Path) -> None:
    text = data_of(write_text(tmp_path / "text.jsonl"))
    config = EvaluateConfig(metrics=("size", "kl"), dtype="float32", heldout_sequences=2)
    place = evaluate({"packed": packed}, tmp_path / "e", text, sparse, config)
    rows = json.loads((place / "evaluation.json").read_text())["figures"]["packed"]
    assert {row["name"]: row["value"] for row in rows}["kl/heldout"] == 0
    call("inspect", packed)


def test_the_command(
    sparse: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("export", sparse.folder, "--type", "bitmask", "--out", tmp_path / "out")
    call(*run, "--dry-run")
    assert "sparse weights as bitmasks" in capsys.readouterr().out
    call(*run)
    assert "transformers 5 and vLLM from 0.19.1 on do not" in capsys.readouterr().err
    call(*run)
    assert "complete and unchanged" in capsys.readouterr().err


def test_a_dense_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "model")
    told = refused(capsys, "export", model.folder, "--type", "bitmask", "--out", tmp_path / "out")
    assert "no weight of" in told
    assert "run regrow sparsify first" in told


def test_a_broken_bitmask_is_refused(packed: Path, tmp_path: Path) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    stored[f"{name}.compressed"] = stored[f"{name}.compressed"][:-3].clone()
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"the bitmask of {name} is broken"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("REGROW_OLD_COMPRESSED_TENSORS" not in os.environ, reason="needs its folder")
def test_the_old_reader_opens_it(sparse: Checkpoint, packed: Path, tmp_path: Path) -> None:
    """REGROW_OLD_COMPRESSED_TENSORS: a folder with compressed_tensors 0.14 or older, unpacked."""
    program = """
import sys
from safetensors.torch import save_file
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import BitmaskConfig
compressor = BaseCompressor.load_from_registry("sparse-bitmask", config=BitmaskConfig())
save_file(dict(compressor.decompress(sys.argv[1])), sys.argv[2])
"""
    paths = [os.environ["REGROW_OLD_COMPRESSED_TENSORS"], os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    arguments = [sys.executable, "-c", program, str(packed), str(tmp_path / "back")]
    subprocess.run(arguments, check=True, env=environment)
    back = load_file(tmp_path / "back")
    assert back.keys() == set(sparse.names())
    assert all(torch.equal(back[name], sparse.tensor(name)) for name in back)
