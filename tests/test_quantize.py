"""The quantize stage: folders that the stock reader opens, with the values that were meant."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import data_of, write_model, write_text
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from regrow import (
    EvaluateConfig,
    QuantizeConfig,
    UserError,
    evaluate,
    families,
    quantize,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.cost import file_bytes
from regrow.quantization.formats import SCHEMES, Scheme, find_scheme
from regrow.quantization.grid import fit
from regrow.stages.quantize.choose import choose
from regrow.stages.quantize.pack import quantization_config

WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
}
FAMILIES = ("llama", "phi3", "gemma3_text")
IDS = torch.arange(5, 29)[None]


def tiny(
    place: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **fields: Any
) -> Checkpoint:
    config_fields = {**WIDE, **fields}
    if family == "gemma3_text":
        config_fields["layer_types"] = ["sliding_attention", "full_attention"]
    return write_model(place / family, family, dtype, **config_fields)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


def per_token(x: Tensor, scheme: Scheme) -> Tensor:
    """What an input becomes when each token has a scale of its own."""
    peak = x.abs().amax(-1, keepdim=True)
    if scheme.kind == "float":
        scale = peak / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    scale = peak / 127.5
    return (x / scale).clamp(-128, 127).round() * scale


def reference(checkpoint: Checkpoint, name: str) -> PreTrainedModel:
    """The model with its linear layers rounded here, in plain sight."""
    model = checkpoint.model(torch.float32)
    for module_name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or ".layers." not in module_name:
            continue
        scheme = find_scheme(name).fitting(module.in_features)
        rounded = fit(module.weight, scheme, torch.bfloat16).nearest(module.weight.detach())
        if not scheme.symmetric:  # with zero points transformers unpacks in the dtype on disk
            rounded = rounded.to(torch.bfloat16)
        module.weight.data.copy_(rounded)
        if scheme.dynamic:
            module.register_forward_pre_hook(
                lambda _, inputs, scheme=scheme: (per_token(inputs[0], scheme),)
            )
    return model


def stock(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(IDS).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "name", ["int8", "int8-dynamic", "fp8", "int4", "int4-g128", "int4-g32-asym"]
)
def test_the_stock_reader_sees_what_was_rounded(family: str, name: str, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, family)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(scheme=name, method="rtn"))
    expected = logits(reference(checkpoint, name))
    torch.testing.assert_close(logits(stock(out)), expected, rtol=1e-4, atol=1e-4)
    opened = Checkpoint(out, quantized=True).model(torch.float32)
    torch.testing.assert_close(logits(opened), expected, rtol=1e-4, atol=1e-4)
    dense = logits(checkpoint.model(torch.float32))
    assert (expected - dense).abs().max() > 1e-3  # something was rounded


@pytest.mark.parametrize("name", ["int8", "int4-g32", "int4-g64", "int4-g128"])
def test_bytes_equal_those_that_a_prune_assumes(name: str, tmp_path: Path) -> None:
    """`prune --max-bytes --format int4-g64` counts what quantize will write."""
    checkpoint = tiny(tmp_path)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(scheme=name, method="rtn"))
    quantized = Checkpoint(out, quantized=True)
    shapes = 16 * sum(tensor.endswith("weight_shape") for tensor in quantized.names())
    promised = file_bytes(families.of(checkpoint), checkpoint.config, name)
    assert sum(map(quantized.bytes, quantized.names())) - shapes == promised


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_quantized_experts_are_read_by_transformers(name: str, tmp_path: Path, text: Path) -> None:
    """They lie one by one on disk, and are rounded to nearest; the router stays as it is."""
    fields = {"num_local_experts": 4, "intermediate_size": 64}
    checkpoint = tiny(tmp_path, "mixtral", **fields)
    config = QuantizeConfig(scheme=name, samples=16)
    plain = quantize(
        checkpoint,
        tmp_path / "plain",
        config.model_copy(update={"dequantize": True}),
        data_of(text),
    )
    out = quantize(checkpoint, tmp_path / "out", config, data_of(text))
    if not find_scheme(name).dynamic:
        torch.testing.assert_close(logits(stock(out)), logits(stock(plain)), rtol=2e-2, atol=2e-2)
    shapes = Checkpoint(out, quantized=True).shapes
    assert "model.layers.0.block_sparse_moe.gate.weight" in shapes
    assert any("experts.3.w2.weight_scale" in shape for shape in shapes)


def test_gptq_has_a_lower_kl_than_rounding(tmp_path: Path, text: Path) -> None:
    checkpoint = tiny(tmp_path)
    kl = {}
    for method in ("rtn", "gptq"):
        config = QuantizeConfig(scheme="int4", method=method, samples=64)
        out = quantize(checkpoint, tmp_path / method, config, data_of(text))
        rows = {f["name"]: f["value"] for f in (stage_dir.read(out) or {})["figures"]}
        kl[method] = rows["kl"]
        assert rows["bytes"] < rows["bytes before"]
        assert rows["times smaller"] == rows["bytes before"] / rows["bytes"]
        assert rows["bits per quantized weight"] == pytest.approx(4.25 + 0.25 * 1 / 7, abs=0.2)
        # What is printed is what the stock reader gives.
        assert logits(stock(out)).isfinite().all()
    assert kl["gptq"] < 0.8 * kl["rtn"]


def test_layers_are_calibrated_on_the_rounded_ones_before(tmp_path: Path, text: Path) -> None:
    """Rounding the second layer by hand, on inputs that come through the rounded first one."""
    from regrow.data.sequences import build_sequences, held_out
    from regrow.stages.quantize.methods.gptq import quantize as by_gptq

    checkpoint = tiny(tmp_path, dtype=torch.float32)
    config = QuantizeConfig(samples=16, dequantize=True)
    out = quantize(checkpoint, tmp_path / "out", config, data_of(text))
    rounded, model = load(out), checkpoint.model(torch.float32)
    first = [n for n in checkpoint.names() if n.startswith("model.layers.0.")]
    model.load_state_dict({n: rounded.tensor(n) for n in first}, strict=False)
    blocks = build_sequences(data_of(text), checkpoint.tokenizer(), "calibration", 16)
    grams: list[Tensor] = []
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda _, x: grams.append(x[0].float()))
    numbers = [n for n in range(16) if not held_out(n)]
    with torch.no_grad():
        inputs = {"input_ids": blocks.input_ids[numbers], "use_cache": False}
        model(**inputs, position_ids=blocks.position_ids[numbers])
    x = grams[0][blocks.real[numbers]]
    scheme = SCHEMES["int4-g64"].fitting(160)
    weight = checkpoint.tensor(name + ".weight")
    expected, _ = by_gptq(weight, scheme, torch.bfloat16, x.T @ x / len(x))
    same = (rounded.tensor(name + ".weight") == expected).float().mean()
    assert same > 0.97  # a sum in another order now and then rounds to the neighbour


def test_rules_mix_schemes_and_unquantized_modules(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, tie_word_embeddings=False)
    config = QuantizeConfig(
        scheme="int4",
        method="rtn",
        keep=("embed_tokens", r"layers\.0\."),
        rules={"down_proj": "int8", "lm_head": "int8", "v_proj": "fp8"},
    )
    out = quantize(checkpoint, tmp_path / "out", config)
    schemes = (stage_dir.read(out) or {})["schemes"]
    assert {m.removeprefix("model.layers."): s for m, s in schemes.items()} == {
        **{f"1.self_attn.{p}_proj": "int4-g64" for p in "qko"},
        "1.self_attn.v_proj": "fp8",
        "1.mlp.down_proj": "int8",
        "lm_head": "int8",
        **{f"1.mlp.{p}_proj": "int4-g64" for p in ("gate", "up")},
    }
    model = checkpoint.model(torch.float32)
    for module, name in schemes.items():
        layer, scheme = model.get_submodule(module), find_scheme(name)
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight.copy_(fit(layer.weight, scheme, torch.bfloat16).nearest(layer.weight))
        if scheme.dynamic:
            layer.register_forward_pre_hook(lambda _, x: (per_token(x[0], SCHEMES["fp8"]),))
    torch.testing.assert_close(logits(stock(out)), logits(model), rtol=1e-4, atol=1e-4)


def test_the_quantization_config_is_what_vllm_reads(tmp_path: Path) -> None:
    """Names of formats and groups, and targets by regular expression where schemes are mixed."""
    checkpoint = tiny(tmp_path)
    chosen = choose(checkpoint, families.of(checkpoint), QuantizeConfig())
    config = quantization_config(chosen, ["lm_head"])
    assert config["quant_method"] == "compressed-tensors"
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    by_group = {g["weights"]["group_size"]: g for g in config["config_groups"].values()}
    assert sorted(by_group) == [32, 64]
    assert by_group[32]["targets"] == [r"re:model\.layers[.][0-9]+[.]mlp\.down_proj$"]
    assert all(g["input_activations"] is None for g in by_group.values())
    assert json.dumps(config)
    names = [module for module in chosen if re.match(by_group[32]["targets"][0][3:], module)]
    assert names == [f"model.layers.{n}.mlp.down_proj" for n in range(2)]
    single_scheme = quantization_config(dict.fromkeys(chosen, SCHEMES["fp8"]), [])
    assert single_scheme["format"] == "float-quantized"
    assert single_scheme["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert single_scheme["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_evaluation_opens_quantized_folders(tmp_path: Path, text: Path) -> None:
    checkpoint = tiny(tmp_path)
    out = quantize(
        checkpoint, tmp_path / "out", QuantizeConfig(scheme="int8-dynamic", method="rtn")
    )
    config = EvaluateConfig(
        metrics=("size", "perplexity", "kl"), dtype="float32", heldout_sequences=4
    )
    place = evaluate({"small": out}, tmp_path / "e", data_of(text), checkpoint, config)
    rows = json.loads((place / "evaluation.json").read_text())["figures"]
    dense, small = ({f["name"]: f["value"] for f in rows[k]} for k in ("teacher", "small"))
    assert small["parameters"] == dense["parameters"]
    assert small["bytes"] < 0.8 * dense["bytes"]
    assert 0 < small["kl/heldout"] < 0.1


def test_an_unchanged_quantization_is_skipped_and_a_changed_one_redone(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tiny(tmp_path)
    config = QuantizeConfig(scheme="int8", method="rtn")
    out = quantize(checkpoint, tmp_path / "out", config)
    first = (stage_dir.read(out) or {})["finished"], capsys.readouterr().out
    second = quantize(checkpoint, out, config)
    output = capsys.readouterr()
    assert "complete and unchanged" in output.err
    assert ((stage_dir.read(second) or {})["finished"], output.out) == first
    quantize(checkpoint, out, QuantizeConfig(scheme="fp8", method="rtn"))
    assert (stage_dir.read(out) or {})["config"]["scheme"] == "fp8"
    assert not list(out.glob("work-*"))


def test_tokenizer_and_plan_are_copied(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(method="rtn"))
    assert load(out, quantized=True).tokenizer().get_vocab() == checkpoint.tokenizer().get_vocab()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({}, "gptq calibrates on text: give data, or use the method rtn"),
    "nothing matches": ({"keep": ("lm_haed",)}, "keep: 'lm_haed' matches no module of this model"),
    "no rule": ({"rules": {"w9": "int8"}}, "rules: 'w9' matches no module"),
    "embedding": ({"keep": ()}, "embed_tokens: no program reads a quantized embedding"),
    "all kept": ({"keep": (".",)}, "nothing is left to quantize"),
    "mixed zeros": ({"scheme": "int4-g64-asym"}, "int4-g32-asym fits all layers here"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_quantize_settings_are_refused(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    method = {} if case == "no text" else {"method": "rtn"}
    checkpoint = tiny(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        quantize(checkpoint, tmp_path / "out", QuantizeConfig.model_validate({**method, **fields}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_schemes_that_experts_cannot_have_are_refused(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, "mixtral", num_local_experts=4, intermediate_size=64)
    for name in ("int8-dynamic", "int4-g32-asym"):
        with pytest.raises(
            UserError, match=r"transformers cannot open it in a mixture of experts|"
        ):
            quantize(checkpoint, tmp_path / "o", QuantizeConfig(scheme=name, method="rtn"))


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.jsonl", documents=3)
    with pytest.raises(UserError, match="too little text"):
        quantize(tiny(tmp_path), tmp_path / "out", QuantizeConfig(), data_of(short))


def test_a_missing_extra_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny(tmp_path)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(method="rtn"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'regrow\[quantize\]'"):
        quantize(checkpoint, tmp_path / "b", QuantizeConfig(method="rtn"))
    with pytest.raises(UserError, match=r"pip install 'regrow\[quantize\]' to open it"):
        Checkpoint(out, quantized=True).model(torch.float32)


@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "fp8"])
def test_eight_bits_need_no_text(name: str, tmp_path: Path) -> None:
    """The default method is rtn in 8 bits, and gptq in 4 bits, layer by layer."""
    checkpoint = tiny(tmp_path)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(scheme=name))
    manifest = stage_dir.read(out) or {}
    assert manifest["methods"] == {name: "rtn"}
    plain = quantize(checkpoint, tmp_path / "rtn", QuantizeConfig(scheme=name, method="rtn"))
    for tensor in load(out, quantized=True).names():
        same = load(plain, quantized=True).tensor(tensor)
        assert torch.equal(load(out, quantized=True).tensor(tensor), same)
    mixed = QuantizeConfig(rules={"down_proj": name})
    with pytest.raises(
        UserError, match="gptq calibrates on text: give data, or use the method rtn"
    ):
        quantize(checkpoint, tmp_path / "both", mixed)


def test_each_layer_by_the_method_of_its_scheme(tmp_path: Path, text: Path) -> None:
    checkpoint = tiny(tmp_path)
    config = QuantizeConfig(rules={"down_proj": "int8"}, samples=16, dequantize=True)
    out = quantize(checkpoint, tmp_path / "out", config, data_of(text))
    assert (stage_dir.read(out) or {})["methods"] == {"int4-g64": "gptq", "int8": "rtn"}
    for module, rounds in (("mlp.down_proj", True), ("mlp.up_proj", False)):
        name = f"model.layers.1.{module}.weight"
        weight = checkpoint.tensor(name)
        scheme = find_scheme("int8" if rounds else "int4")
        rounded = fit(weight, scheme, torch.bfloat16).nearest(weight).to(torch.bfloat16)
        assert torch.equal(load(out).tensor(name), rounded) == rounds


def test_dtypes_are_those_of_each_tensor(tmp_path: Path) -> None:
    """Norms in float32 stay so; the first tensor's dtype does not decide for all."""
    checkpoint = tiny(tmp_path, dtype=torch.float16, tie_word_embeddings=False)
    path = checkpoint.folder / "model.safetensors"
    tensors = load_file(path)
    wide = {name: x.float() for name, x in tensors.items() if x.dim() == 1 or "lm_head" in name}
    save_file({**tensors, **wide}, path, metadata={"format": "pt"})
    mixed = load(checkpoint.folder)
    assert mixed.dtype(mixed.names()[0]) == "float32"  # lm_head, in the order of names
    out = Checkpoint(quantize(mixed, tmp_path / "out", QuantizeConfig(scheme="int8")), True)
    for name in out.names():
        if name in wide:
            assert out.dtype(name) == "float32"
        elif name.endswith(("_scale", "embed_tokens.weight")):
            assert out.dtype(name) == "float16"
    assert out.config["dtype"] == "float16"


def test_kl_of_almost_lossless_rounding_is_exact(tmp_path: Path, text: Path) -> None:
    """In bfloat16, against a slow float64 softmax over logits of the same hidden states."""
    from regrow.data.sequences import build_sequences, held_out

    checkpoint = tiny(tmp_path)
    config = QuantizeConfig(scheme="int8", samples=16)
    out = quantize(checkpoint, tmp_path / "out", config, data_of(text))
    rows = {f["name"]: f["value"] for f in (stage_dir.read(out) or {})["figures"]}
    blocks = build_sequences(data_of(text), checkpoint.tokenizer(), "calibration", 16)
    validation = [n for n in range(16) if held_out(n)]
    inputs = {
        "input_ids": blocks.input_ids[validation],
        "position_ids": blocks.position_ids[validation],
    }
    scored = blocks.labels[validation][:, 1:] != -100
    logs = []
    for folder in (checkpoint, Checkpoint(out, quantized=True)):
        model = folder.model(torch.bfloat16)
        with torch.no_grad():
            hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][scored]
            head = model.lm_head.weight.double()
            logs.append((hidden.double() @ head.T).log_softmax(-1))
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert rows["kl"] == pytest.approx(float(kl), rel=0.02)


def test_the_page_says_who_opens_each_scheme() -> None:
    page = (Path(__file__).parents[1] / "docs" / "quantize.md").read_text(encoding="utf-8")
    for scheme in SCHEMES.values():
        shown = "int4-g32-asym" if scheme.name.endswith("-asym") else scheme.name
        (row,) = re.findall(rf"^\| .*`{shown}`.* \| (\w+) \| (\w+) \|$", page, re.MULTILINE)
        assert row == ("yes", "yes" if scheme.vllm_on_cpu else "no"), scheme.name


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_stock_readers_open_every_scheme(name: str, tmp_path: Path) -> None:
    """transformers here; vLLM on a CPU where REGROW_VLLM_PYTHON names a Python that has it."""
    fields = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    checkpoint = tiny(tmp_path, head_dim=64, intermediate_size=1024, **fields)
    out = quantize(checkpoint, tmp_path / "out", QuantizeConfig(scheme=name, method="rtn"))
    expected = logits(reference(checkpoint, name))
    torch.testing.assert_close(logits(stock(out)), expected, rtol=1e-3, atol=1e-3)
    python, opens = os.environ.get("REGROW_VLLM_PYTHON"), SCHEMES[name].vllm_on_cpu
    if python is None:
        return
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""}
    ran = subprocess.run([python, "-c", VLLM, str(out)], env=environment, capture_output=True)
    assert (ran.returncode == 0) == opens, ran.stderr[-2000:]


VLLM = """
import sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    model = LLM(sys.argv[1], max_model_len=256, enforce_eager=True, dtype="bfloat16")
    model.generate(["The lighthouse keeper"], SamplingParams(max_tokens=4, temperature=0))
"""
