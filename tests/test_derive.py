"""Derived tables: equal to the typed ones, proven before they are offered, used by all stages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import write_model, write_text
from tiny_job import LENGTH, Refused, call
from tiny_models import NAMES, SPECIAL, tiny_config
from transformers import AutoModelForCausalLM

from regrow import families
from regrow.errors import UserError, reason_of
from regrow.families import Family, _derive
from regrow.families._derive import find, plans, stock, store, whole
from regrow.families._derive.tiny import shrink
from regrow.plan import Plan
from regrow.stage_dir import NAME as MANIFEST

QUICK = ("llama", "phi3", "gemma3_text", "qwen3_moe")


@pytest.fixture(scope="module", autouse=True)
def own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tables are derived here, and not read from an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGROW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def derived(model_type: str, **fields: Any) -> _derive.Derived:
    return families.derived(tiny_config(model_type, **fields).to_dict())


def facts(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """What a table says about a model of this config."""
    sizes = family.sizes(config)
    rows = {
        name: (row.axes, row.norm, sorted({place.layer for place in family.places(name, config)}))
        for name, row in family.tensors.items()
        if family.exists(row, config)
    }
    return {
        "rows": {n: (axes, norm, layers) for n, (axes, norm, layers) in rows.items() if layers},
        "sizes": sizes,
        "observe": {dim: set(names) for dim, names in family.observe.items()},
        "residual": family.residual,
        "post_norm": family.post_norm,
        "norm_offset": family.norm_offset,
        "scaled_embedding": family.scaled_embedding,
        "heads_divide_hidden": family.heads_divide_hidden,
        "memory": dict(family.memory),
        "layers": {dim: family.layers_of(dim, config) for dim in sizes},
    }


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_a_derived_table_is_the_typed_one(name: str) -> None:
    more = {"mlp_only_layers": [0, 2], "decoder_sparse_step": 1} if name == "qwen3_moe" else {}
    config = tiny_config(name, **more).to_dict()
    typed, found = facts(families.get(name), config), derived(name, **more)
    for what, value in facts(found.family, config).items():
        assert value == typed[what], what
    assert set(found.proven) == set(typed["sizes"]) - {"head_dim"}
    assert not found.odd


OTHERS: dict[str, tuple[dict[str, Any], set[str], str]] = {
    "smollm3": ({}, set(), ""),
    "olmo2": ({}, set(), ""),
    "granite": ({"residual_multiplier": 0.22, "logits_scaling": 8.0}, set(), ""),
    "cohere2": ({}, {"hidden", "repair"}, "is no RMSNorm"),
    "gpt_oss": ({"num_local_experts": 4}, {"experts", "expert_mlp"}, "no criterion can measure"),
}
"""Config fields, what is refused, and a part of the first reason."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(name: str) -> None:
    fields, refused, reason = OTHERS[name]
    found = derived(name, **fields)
    assert set(found.family.refused) == refused, found.family.refused
    assert reason in next(iter(found.family.refused.values()), "")
    assert set(found.proven) == set(found.family.config_keys) - refused


def test_a_single_kv_head_stays() -> None:
    found = derived("arcee", num_key_value_heads=1)
    assert found.family.refused == {"kv_heads": "the model has only one"}
    assert "heads" in found.proven and "hidden" in found.proven


def test_granite_multiplies_what_it_adds_to_the_stream() -> None:
    found = derived("granite", **OTHERS["granite"][0])
    assert found.family.residual_multiplier == pytest.approx(0.22, abs=1e-5)


def test_olmo_has_norms_over_all_heads_and_after_its_parts() -> None:
    family = derived("olmo2").family
    norm = family.tensors["model.layers.{layer}.self_attn.q_norm.weight"]
    assert norm.axes == ("heads",) and norm.norm
    assert family.post_norm["mlp"] == "model.layers.{layer}.post_feedforward_layernorm"
    assert family.residual["mlp"] == "model.layers.{layer}.mlp"


def test_a_hybrid_has_heads_in_some_layers() -> None:
    found = derived("qwen3_5_text", num_hidden_layers=4)
    config = tiny_config("qwen3_5_text", num_hidden_layers=4).to_dict()
    assert found.family.layers_of("heads", config) == [3]
    assert {"layers", "mlp", "heads", "kv_heads", "vocab"} <= set(found.proven)
    q_proj = found.family.tensors["model.layers.{layer}.self_attn.q_proj.weight"]
    assert q_proj.unit == {"heads": 2 * config["head_dim"]}  # queries and their gates


def test_an_error_of_ours_is_no_reason_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake in the code that finds tables stops it, instead of making an axis unproven."""
    tiny = shrink(tiny_config("llama").to_dict())

    def broken(*_: Any) -> Any:
        raise TypeError("a mistake of ours")

    places = {find.prove: "zeroed", find.axes: "of_templates", whole: "distance"}
    for module, name in places.items():
        with monkeypatch.context() as patch:
            patch.setattr(module, name, broken)
            with pytest.raises(TypeError, match="a mistake of ours"):
                find.find(tiny)


def test_an_error_of_a_class_is_a_reason_with_its_name() -> None:
    """Kept with its class and last line: here, of a config class that wants sizes that fit."""
    config = {**tiny_config("llama", head_dim=None).to_dict(), "num_attention_heads": 5}
    try:
        stock.build(config)
    except Exception as error:
        reason = reason_of(error)
    assert "is not a multiple of the number of attention heads (5)" in reason
    ours = ZeroDivisionError("never raised by a class")
    with pytest.raises(ZeroDivisionError):
        reason_of(ours)


def test_a_model_that_mixes_documents_says_where() -> None:
    found = derived("gpt_oss", **OTHERS["gpt_oss"][0])
    reader = "model.layers.{layer}.self_attn"
    assert found.odd == {"documents": f"{reader} also reads the documents before a token's own"}
    assert found.family.mixes == found.odd["documents"]


def test_layers_with_other_shapes_have_no_table() -> None:
    """Gemma 4 has heads of two widths: a row of a table has one shape in all layers."""
    fields = {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
    config = tiny_config("gemma4_text", head_dim=8, global_head_dim=16, **fields).to_dict()
    with pytest.raises(UserError, match="has other shapes in some layers"):
        families.derived(config)


def test_a_wrong_layout_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up of phi3 are two parts; taken for pairs of rows, the cut model is another one."""
    tiny = shrink(tiny_config("phi3").to_dict())
    monkeypatch.setattr(find.axes, "_of_one", lambda dim, rows, usual: [((dim,), rows == usual)])
    found = find.find(tiny)
    assert "mlp" not in found.proven
    assert "computes something else" in found.found.refused["mlp"]


def test_a_norm_without_its_factor_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = shrink(tiny_config("llama").to_dict())
    real = find.norms.find_norms
    monkeypatch.setattr(find.norms, "find_norms", lambda *given: forget(real(*given)))
    found = find.find(tiny)
    assert "hidden" not in found.proven and "mlp" in found.proven


def forget(facts: Any) -> Any:
    facts.norms = frozenset()
    return facts


def test_a_table_is_derived_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a cut model, whose tiny copy is the same."""
    fields = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    config = tiny_config("arcee", **fields).to_dict()
    first = families.derived(config)
    monkeypatch.setattr(_derive, "_known", {})
    monkeypatch.setattr(_derive, "_find", no_more)
    assert families.derived(config) == first
    cut = {**config, "hidden_size": 80, "rms_norm_eps": 2e-14}
    other = families.derived(cut)
    assert other.proven == first.proven
    assert other.family.sizes(cut)["hidden"] == 80


def no_more(tiny: Any) -> Any:
    raise AssertionError("derived again")


def test_a_broken_memory_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    made: list[int] = []

    def remembered() -> int:
        return store.remembered("x", {}, lambda: made.append(1) or 7, lambda x: [x], lambda x: x[0])

    assert (remembered(), remembered(), len(made)) == (7, 7, 1)
    (path,) = (tmp_path / "families").iterdir()
    path.write_text("{")
    assert (remembered(), len(made)) == (7, 2)


def test_zeros_are_where_the_plan_drops_units() -> None:
    config = tiny_config("llama").to_dict()
    family = families.get("llama")
    plan = plans.plan_for(family, config, {"mlp": 40})
    assert isinstance(plan, Plan) and plan.mlp is not None
    tensors = {"model.layers.1.mlp.down_proj.weight": torch.ones(48, 56)}
    (zeroed,) = plans.zeroed(family, tensors, plan).values()
    gone = sorted(set(range(56)) - set(plan.mlp[1]))
    assert (zeroed == 0).all(0).nonzero().flatten().tolist() == gone


REFUSED = {
    "bert": "no table can be derived: its layers are not in a list named layers",
    "gpt2": "no table can be derived: its config has no num_hidden_layers",
    "mamba": "no table can be derived: its config has no num_attention_heads",
    "clip": "clip is no causal language model",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_has_no_table(model_type: str) -> None:
    with pytest.raises(UserError, match=REFUSED[model_type]):
        families.of_config({"model_type": model_type})


def test_sizes_that_contradict_each_other() -> None:
    config = {**tiny_config("smollm3").to_dict(), "vocab_size": "many"}
    with pytest.raises(UserError, match=r"refuses this smollm3 config: .*expected int, got str"):
        families.of_config(config)
    config = {**config, "vocab_size": 64, "num_attention_heads": 3, "num_key_value_heads": 2}
    with pytest.raises(UserError, match="no tiny copy of its config can be built: "):
        families.of_config(config)


LINES = ["Proven by cuts of a tiny random copy of this config"]


def stages(model: Path, place: Path, sizes: list[Any]) -> Path:
    """Profile, prune with repair and distil from the command line; returns the last folder."""
    text = ["--data", write_text(place / "text.jsonl"), "--sequence-length", LENGTH]
    call("profile", model, *text, "--samples", 16, "--gram-tokens", 512, "--out", place / "profile")
    call("prune", model, "--profile", place / "profile", *sizes, "--out", place / "cut")
    call(
        *("distill", place / "cut", "--teacher", model, *text, "--out", place / "better"),
        *("--tokens", 512, "--batch-tokens", 128, "--eval-tokens", 256),
        *("--heldout-sequences", 2),
    )
    return place / "better"


def test_an_unlisted_model_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Profile, prune with repair, distil: the stock reader opens what comes out."""
    model = tmp_path / "model"
    write_model(model, "smollm3", no_rope_layer_interval=2)
    call("inspect", model)
    assert LINES[0] in " ".join(capsys.readouterr().out.split())
    sizes = ["--num-layers", 2, "--intermediate-size", 40, "--hidden-size", 40]
    sizes += ["--multiple-of", 4, "--num-attention-heads", 4]
    better = stages(model, tmp_path, sizes)
    config = json.loads((better / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"]) == (2, 40)
    assert len(config["no_rope_layers"]) == 2
    stock = AutoModelForCausalLM.from_pretrained(better)
    names = set(load_file(better / "model.safetensors"))
    assert names <= set(stock.state_dict())
    manifest = json.loads((tmp_path / "cut" / MANIFEST).read_text())
    assert "repair" in manifest


MORE: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "olmo2": ({}, ["--num-attention-heads", 4, "--intermediate-size", 40]),
    "granite": (OTHERS["granite"][0], ["--hidden-size", 40, "--intermediate-size", 40]),
    "glm4": ({"head_dim": 8}, ["--num-layers", 2, "--num-key-value-heads", 1]),
    "cohere2": ({}, ["--num-layers", 2, "--intermediate-size", 40]),
    "gpt_oss": ({"num_local_experts": 4}, ["--num-layers", 2, "--hidden-size", 40]),
    "exaone4": ({}, ["--hidden-size", 40, "--num-attention-heads", 4]),
    "ministral3": ({"head_dim": 8}, ["--hidden-size", 40]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_models_from_the_command_line(name: str, tmp_path: Path, refused: Refused) -> None:
    fields, sizes = MORE[name]
    write_model(tmp_path / "model", name, **fields)
    better = stages(tmp_path / "model", tmp_path, [*sizes, "--multiple-of", 4])
    AutoModelForCausalLM.from_pretrained(better)
    said = refused("export", better, "--type", "F16", "--out", tmp_path / "x.gguf")
    assert "models cannot be exported: regrow writes GGUF for the types" in said


def test_a_refused_axis_says_why(tmp_path: Path, refused: Refused) -> None:
    write_model(tmp_path / "model", "cohere2")
    said = refused("prune", tmp_path / "model", "--hidden-size", 40, "--out", tmp_path / "out")
    assert "hidden_size 40: it cannot be cut in this cohere2 model: " in said
    assert "is no RMSNorm" in said


def test_special_sizes_stay_those_of_typed_families() -> None:
    assert set(SPECIAL) <= set(NAMES)
