"""The sparsify stage: folders with zeros that stock readers open, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM

from regrow import (
    Options,
    QuantizeConfig,
    SparsifyConfig,
    UserError,
    quantize,
    sparsify,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.cli.main import main
from regrow.config import parse
from regrow.sparsity import zeros
from regrow.stages.sparsify.methods.sparsegpt import sparsify as by_sparsegpt

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def tiny(place: Path, family: str = "llama", **fields: Any) -> Checkpoint:
    given = {**WIDE, **HEADS, **fields}
    if family == "gemma3_text":
        given["layer_types"] = ["sliding_attention", "full_attention"]
    dtype = given.pop("dtype", torch.bfloat16)
    return write_model(place / family, family, dtype, **given)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny(tmp_path_factory.mktemp("model"))


def matrices(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return dict(zeros.weights(checkpoint))


def figures_of(folder: Path) -> dict[str, float]:
    return {f["name"]: f["value"] for f in (stage_dir.read(folder) or {})["figures"]}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"sparsity": 0.6}),
        ("phi3", {"pattern": "2:4"}),
        ("gemma3_text", {"pattern": "2:4"}),
    ],
)
def test_stock_readers_open_the_zeros(
    family: str, fields: dict[str, Any], tmp_path: Path, text: Path
) -> None:
    checkpoint = tiny(tmp_path, family)
    config = SparsifyConfig(samples=16, **fields)
    out = sparsify(checkpoint, tmp_path / "out", config, data_of(text))
    made = load(out)
    assert made.shapes == checkpoint.shapes
    for name, weight in matrices(made).items():
        assert weight.dtype == torch.bfloat16
        assert zeros.share(weight) == pytest.approx(config.target.share, abs=0.01), name
        if config.pattern:
            assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
    for name in set(made.names()) - set(matrices(made)):
        assert torch.equal(made.tensor(name), checkpoint.tensor(name)), name
    stock, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"] | info["unexpected_keys"]
    state = stock.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in matrices(made).items())
    assert made.tokenizer().get_vocab() == checkpoint.tokenizer().get_vocab()
    found = figures_of(out)
    assert found["zeros"] == pytest.approx(config.target.share, abs=0.01)
    assert found["bytes as bitmask"] < 0.8 * found["bytes"]
    assert found["kl"] > 0
    assert (stage_dir.read(out) or {})["sparsity"] == str(config.target)


def test_layers_are_calibrated_on_the_sparse_ones_before(tmp_path: Path, text: Path) -> None:
    """The second layer by hand, on inputs that come through the sparse first one."""
    from regrow.data.sequences import build_sequences, held_out

    checkpoint = tiny(tmp_path, dtype=torch.float32)
    config = SparsifyConfig(samples=16, sparsity=0.7)
    out = sparsify(checkpoint, tmp_path / "out", config, data_of(text))
    sparse, dense = load(out), checkpoint.model(torch.float32)
    first = [n for n in checkpoint.names() if n.startswith("model.layers.0.")]
    blocks = build_sequences(data_of(text), checkpoint.tokenizer(), "calibration", 16)
    numbers = [n for n in range(16) if not held_out(n)]
    name = "model.layers.1.mlp.down_proj"
    seen: list[Tensor] = []
    dense.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].float()))
    for names in ((), first):
        dense.load_state_dict({n: sparse.tensor(n) for n in names}, strict=False)
        with torch.no_grad():
            dense(
                input_ids=blocks.input_ids[numbers],
                position_ids=blocks.position_ids[numbers],
                use_cache=False,
            )
    found = sparse.tensor(name + ".weight")
    errors = []
    for x in seen:
        x = x[blocks.real[numbers]]
        by_hand = by_sparsegpt(checkpoint.tensor(name + ".weight"), config.target, x.T @ x / len(x))
        errors.append(float((found - by_hand).norm() / found.norm()))
    assert errors[1] < 1e-3 < errors[0]


def test_methods_in_order_of_quality(tmp_path: Path, model: Checkpoint, text: Path) -> None:
    kl = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        config = SparsifyConfig(method=method, sparsity=0.5)
        out = sparsify(model, tmp_path / method, config, data_of(text))
        kl[method] = figures_of(out)["kl"]
    assert kl["sparsegpt"] < kl["wanda"] < kl["magnitude"]


def test_kept_modules_and_magnitude_without_text(tmp_path: Path, model: Checkpoint) -> None:
    config = SparsifyConfig(method="magnitude", sparsity=0.4, keep=(r"layers\.0\.", "v_proj"))
    out = sparsify(model, tmp_path / "out", config)
    for name, weight in matrices(load(out)).items():
        dense = ".layers.0." in name or "v_proj" in name
        assert torch.equal(weight, model.tensor(name)) == dense
        assert (zeros.share(weight) > 0.39) != dense
    assert "kl" not in figures_of(out)


def test_experts_by_magnitude_and_dense_routers(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny(tmp_path, "mixtral", num_local_experts=4, intermediate_size=64)
    out = sparsify(
        checkpoint, tmp_path / "out", SparsifyConfig(pattern="2:4", samples=16), data_of(text)
    )
    assert "the experts are sparsified by magnitude" in capsys.readouterr().err
    for name, weight in matrices(load(out)).items():
        if "gate.weight" in name:
            assert torch.equal(weight, checkpoint.tensor(name))
            continue
        assert ((weight == 0).view(-1, 4).sum(1) == 2).all()
        if "experts" in name:
            kept = weight[weight != 0]
            assert torch.equal(kept, checkpoint.tensor(name)[weight != 0])


def test_complete_and_redone(
    tmp_path: Path, model: Checkpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SparsifyConfig(method="magnitude")
    out = sparsify(model, tmp_path / "out", config)
    finished = (stage_dir.read(out) or {})["finished"]
    sparsify(model, out, config)
    assert "complete and unchanged" in capsys.readouterr().err
    assert (stage_dir.read(out) or {})["finished"] == finished
    sparsify(model, out, SparsifyConfig(method="magnitude", sparsity=0.3))
    assert figures_of(out)["zeros"] == pytest.approx(0.3, abs=0.01)
    assert not list(out.glob("work-*"))


@pytest.mark.parametrize(
    ("scheme", "method"),
    [("int8", "gptq"), ("int4", "gptq"), ("int4-g32-asym", "rtn"), ("fp8", "rtn")],
)
def test_zeros_stay_zero_when_quantized(
    scheme: str, method: str, tmp_path: Path, model: Checkpoint, text: Path
) -> None:
    sparse = load(sparsify(model, tmp_path / "s", SparsifyConfig(method="magnitude", sparsity=0.6)))
    config = QuantizeConfig(scheme=scheme, method=method, samples=16)
    out = quantize(sparse, tmp_path / "q", config, data_of(text))
    state = Checkpoint(out, quantized=True).model(torch.float32).state_dict()
    for name, weight in matrices(sparse).items():
        assert (state[name][weight == 0] == 0).all(), name
    assert (stage_dir.read(out) or {})["sparsity"] == "0.6"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({}, "sparsegpt calibrates on text: give data, or the method magnitude"),
    "width": (
        {"method": "magnitude", "pattern": "8:32"},
        "pattern 8:32: model.layers.0.mlp.down_proj has 168 columns, which is no multiple of 32",
    ),
    "no zero in a row": (
        {"method": "wanda", "sparsity": 0.005},
        "sparsity 0.005: wanda counts in each row, and of the 64 weights of a row",
    ),
    "nothing but zeros": ({"method": "wanda", "sparsity": 0.995}, "all would become zero"),
    "damping": ({"damping": float("inf")}, "finite"),
    "nothing matches": ({"keep": ("qq_proj",)}, "keep: 'qq_proj' matches no module of this model"),
    "all kept": ({"keep": (".",)}, "nothing is left to sparsify"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    checkpoint = tiny(tmp_path, intermediate_size=168)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        sparsify(checkpoint, tmp_path / "out", parse(SparsifyConfig, fields, "sparsify"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_width_that_does_not_fit_may_stay_dense(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, intermediate_size=168)
    fields = {"method": "magnitude", "pattern": "8:32", "keep": ("down_proj",)}
    out = sparsify(checkpoint, tmp_path / "out", SparsifyConfig.model_validate(fields))
    assert figures_of(out)["zeros"] == 0.75


def test_a_quantized_model_is_refused(tmp_path: Path, model: Checkpoint) -> None:
    out = quantize(model, tmp_path / "q", QuantizeConfig(scheme="int8", method="rtn"))
    with pytest.raises(UserError, match=r"is quantized .*quantize last"):
        sparsify(out, tmp_path / "out", SparsifyConfig(method="magnitude"))
    with pytest.raises(UserError, match="is quantized: sparsify first and quantize last"):
        sparsify(
            Checkpoint(out, quantized=True), tmp_path / "o", SparsifyConfig(method="magnitude")
        )


def test_the_command(
    tmp_path: Path, model: Checkpoint, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    base = ["sparsify", str(model.folder), "--out", out, "--method", "wanda", "--pattern", "2:4"]
    run = [*base, "--data", str(text), "--sequence-length", "32", "--samples", "16"]
    assert main([*run, "--dry-run"]) == 0
    assert "14 matrices to 2:4 by wanda: about" in capsys.readouterr().out
    assert main(run) == 0
    assert "bytes as bitmask" in capsys.readouterr().out
    assert main(["sparsify", str(model.folder), "--out", out, "--sparsity", "1.5"]) == 2
    told = capsys.readouterr().err
    assert "1.5 is out of range" in told
    assert "Traceback" not in told


def test_options_do_not_change_the_result(tmp_path: Path, model: Checkpoint, text: Path) -> None:
    config = SparsifyConfig(samples=16)
    outs = [
        sparsify(model, tmp_path / str(size), config, data_of(text), Options(batch_size=size))
        for size in (1, 8)
    ]
    one, eight = (matrices(load(out)) for out in outs)
    same = [float(((one[n] == 0) == (eight[n] == 0)).float().mean()) for n in one]
    assert min(same) > 0.97  # sums in another order change a choice now and then
