"""One contract for every file in regrow/families, held in float64: a unit that is zero can go."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import SPECIAL, float64_norms, random_plan, tiny_config, tiny_ids, tiny_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from regrow import families, plugins
from regrow.checkpoint import checkpoint
from regrow.config import Options
from regrow.data.sequences import Sequences
from regrow.errors import UserError
from regrow.families import Family, Tensor
from regrow.plan import Plan
from regrow.profile_folder import INFO, SEQUENCES, Profile
from regrow.pruning.cut import cut_config, cut_folder, cut_model
from regrow.pruning.repair import RepairSetup, sequential
from regrow.pruning.repair._validate import validation_kl
from regrow.stage_dir import write_json

logging.disable_progress_bar()
NAMES = plugins.names("regrow.families")
ROUNDING = 1e-13  # relative to the largest logit; measured: 1.5e-15 at most


def variants(family: Family) -> Iterator[dict[str, Any]]:
    """Config fields: head tied or not, and every bias the family can have on or off."""
    conditions = {row.when for row in family.tensors.values() if row.when is not None}
    biases = sorted(key for key in conditions if "bias" in key)
    for tied, bias in itertools.product((True, False), (True, False) if biases else (False,)):
        yield {"tie_word_embeddings": tied, **dict.fromkeys(biases, bias)}


CASES = [(name, variant) for name in NAMES for variant in variants(families.get(name))]
IDS = [f"{name}-{'-'.join(k for k, v in variant.items() if v)}" for name, variant in CASES]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(tiny_ids()).logits
    return found


@torch.no_grad()
def zero(model: Any, plan: Plan) -> Any:
    """Set to zero what writes the units that `plan` drops, by hand, without the family's table."""
    model.get_input_embeddings().weight[:, gone(plan, "hidden")] = 0
    width = plan.before["head_dim"]
    for number, layer in enumerate(model.model.layers):
        rows = slice(None) if number not in plan.kept_layers() else gone(plan, "hidden")
        silence(layer, rows)
        if number in plan.kept_layers():
            for expert, down in enumerate(downs(layer)):
                down[:, gone(plan, "mlp", number) + gone(plan, "expert_mlp", number, expert)] = 0
            for head in gone(plan, "heads", number):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    if plan.experts is not None:
        unroute(model, plan)
    return model


def downs(layer: Any) -> list[torch.Tensor]:
    """The down projections of a layer: of its MLP, or of each expert."""
    sparse = hasattr(layer.mlp, "experts")
    return list(layer.mlp.experts.down_proj) if sparse else [layer.mlp.down_proj.weight]


def silence(layer: Any, rows: slice | list[int]) -> None:
    """Let a layer write nothing to these channels of the residual stream."""
    for weight in (layer.self_attn.o_proj.weight, *downs(layer)):
        weight[rows] = 0
    for name, bias in layer.named_parameters():
        if name.endswith(("o_proj.bias", "down_proj.bias")):
            bias[rows] = 0


def unroute(model: Any, plan: Plan) -> None:
    """Let no router choose the dropped experts: they dislike a channel that is always there."""
    always = plan.hidden[0] if plan.hidden else 0
    model.get_input_embeddings().weight[:, always] = 30
    for number, layer in enumerate(model.model.layers):
        silence(layer, [always])
        if dropped := gone(plan, "experts", number):
            layer.post_attention_layernorm.weight[always] = 1
            layer.mlp.gate.weight[dropped] = 0
            layer.mlp.gate.weight[dropped, always] = -1000


def gone(plan: Plan, dim: str, layer: int | None = None, expert: int | None = None) -> list[int]:
    dropped_expert = expert is not None and expert not in plan.kept_experts(layer or 0)
    kept = None if dropped_expert else plan.kept(dim, layer, expert)
    return [] if kept is None else sorted(set(range(plan.before[dim])) - set(kept))


def check_table(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """The table has exactly the tensors that transformers writes, in their shapes."""
    model = tiny_model(family.model_type, **variant)
    model.save_pretrained(folder)
    saved = checkpoint.load(folder)
    assert family.expected(saved.config) == saved.shapes
    assert family.count(saved.config) == sum(p.numel() for p in model.parameters())
    assert len(saved.shapes) > 10
    in_memory = dict(model.named_parameters())
    for name, parameter in families.as_on_disk(family, in_memory).items():
        assert torch.equal(parameter, saved.tensor(name))
        if parameter.dim() == 2:
            check_reader(family, name, parameter.shape[1], family.sizes(saved.config))
    for layer in range(saved.config["num_hidden_layers"]):
        for name, value in families.in_memory(family, saved.config, layer, saved.tensor):
            assert torch.equal(value, in_memory.pop(name))
    assert not [name for name in in_memory if ".layers." in name]


def check_reader(family: Family, name: str, inputs: int, sizes: dict[str, int]) -> None:
    found = family.find(name)
    assert found is not None
    known = ("hidden", "mlp", "heads", "expert_mlp")
    dims = [dim for dim in known if found.template in family.readers(dim)]
    if name == "model.embed_tokens.weight":
        assert not dims
    else:
        width = sizes["head_dim"] if dims == ["heads"] else 1
        assert len(dims) == 1 and inputs == sizes[dims[0]] * width


def check_defaults(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """`defaults` are what the config class takes, and cover all that the table asks for."""
    kind = type(tiny_config(family.model_type))
    real = {f.name: f.default for f in dataclasses.fields(kind)}
    for key, value in family.defaults.items():
        assert value == real.get(key), key
    asked = {row.when.removeprefix("!") for row in family.tensors.values() if row.when}
    assert asked | {"num_key_value_heads", "head_dim", "rms_norm_eps"} <= set(family.defaults)
    bare = {key: getattr(kind(), key) for key in family.config_keys.values()}
    bare.pop("num_key_value_heads")
    assert family.sizes(bare) == family.sizes(kind().to_dict())


@torch.no_grad()
def check_observe(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """`observe` names what carries a dimension, `residual` the stream that a block adds to."""
    model = tiny_model(family.model_type, **variant)
    sizes = family.sizes(model.config.to_dict())
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda _m, args, kwargs, out, name=name: seen.__setitem__(
                name,
                ((args or tuple(kwargs.values()))[0], out[0] if isinstance(out, tuple) else out),
            ),
            with_kwargs=True,
        )
    logits(model)
    config = model.config.to_dict()
    for dim, templates in family.observe.items():
        layer = family.layers_of(dim, config)[-1]
        for template in templates:
            tensor = seen[template.format(layer=layer)][1 if dim == "hidden" else 0]
            width = {"experts": sizes["hidden"], "heads": sizes["heads"] * sizes["head_dim"]}
            assert tensor.shape[-1] == width.get(dim, sizes.get(dim))
    for dim, name in family.residual.items():
        layer = (family.layers_of(dim, config) or family.layers_of("experts", config))[-1]
        into, sequence = name.format(layer=layer), f"model.layers.{layer}"
        stream = seen[into][0].clone()
        if dim == "heads":
            assert torch.equal(stream, seen[sequence][0])
        else:
            for parameter in model.get_submodule(f"{sequence}.mlp").parameters():
                parameter.zero_()
            logits(model)
            assert torch.equal(stream, seen[sequence][1])


def check_keep_all(family: Family, variant: dict[str, Any], folder: Path) -> None:
    model = tiny_model(family.model_type, **variant)
    config = model.config.to_dict()
    every = {dim: n for dim, n in family.sizes(config).items() if dim not in ("vocab", "head_dim")}
    for plan in (random_plan(config), random_plan(config, "", 0, **every)):
        assert torch.equal(logits(cut_model(model, plan, family=family)), logits(model))


def plans(family: Family, config: dict[str, Any]) -> Iterator[Plan]:
    count, sizes = config["num_hidden_layers"], family.sizes(config)
    inside = {"mlp": 33} if "mlp" in sizes else {}
    hidden = 42
    if "experts" in sizes:  # multiples of what transformers multiplies at once
        inside |= {"expert_mlp": 24, "experts": 3}
        hidden = 40
        yield random_plan(config, expert_mlp=32)
        yield random_plan(config, experts=3)
        yield random_plan(config, experts=2)
    if "mlp" in sizes:
        yield random_plan(config, mlp=41)
    yield random_plan(config, hidden=hidden)
    yield random_plan(config, heads=4)
    yield random_plan(config, kv_heads=1)
    for dropped in range(count):
        yield random_plan(config, layers=[i for i in range(count) if i != dropped])
    kept = [i for i in range(count) if i != 1]
    yield random_plan(
        config, hidden=hidden - hidden % 4, kv_heads=1, heads=2, layers=kept, **inside
    )


def check_removal(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """Units that are zero can be removed, of each dimension and of all at once."""
    config = tiny_config(family.model_type, **variant).to_dict()
    for plan in plans(family, config):
        parent = zero(float64_norms(tiny_model(family.model_type, **variant)), plan)
        student = float64_norms(cut_model(parent, plan, family=family))
        assert student.num_parameters() == family.count(cut_config(config, plan, family))
        assert student.num_parameters() < parent.num_parameters()
        before = logits(parent)
        difference = (logits(student) - before).abs().max() / before.abs().max()
        assert difference < ROUNDING, (plan.after, float(difference))


def check_reload(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """The cut folder opens with the stock reader, equals the cut in memory, and generates."""
    model = tiny_model(family.model_type, **variant)
    model.save_pretrained(folder / "parent")
    saved = checkpoint.load(folder / "parent")
    *_, plan = plans(family, saved.config)
    plan = plan.model_copy(update={"fingerprint": saved.fingerprint})
    cut_folder(saved, plan, folder / "cut", family=family)
    stock = AutoModelForCausalLM.from_pretrained(
        folder / "cut", dtype="auto", **checkpoint.experts_option(torch.float64)
    )
    assert stock.dtype == torch.float64
    assert torch.equal(logits(stock), logits(cut_model(model, plan, family=family)))
    config = json.loads((folder / "cut/config.json").read_text())
    assert config["head_dim"] == plan.before["head_dim"]
    assert checkpoint.load(folder / "cut").shapes == family.expected(config)
    head, embedding = stock.get_output_embeddings(), stock.get_input_embeddings()
    assert (head.weight is embedding.weight) == variant["tie_word_embeddings"]
    check_generates(stock)


def check_generates(model: Any) -> None:
    runs = [
        model.generate(
            tiny_ids(length=9),
            attention_mask=torch.ones(2, 9, dtype=torch.long),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        for use_cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences) and runs[0].sequences.shape == (2, 15)
    for cached, plain in zip(runs[0].logits, runs[1].logits, strict=True):
        torch.testing.assert_close(cached, plain, rtol=1e-5, atol=1e-5)


def check_repair(family: Family, variant: dict[str, Any], folder: Path) -> None:
    """Repair brings the cut model nearer to the dense one: the stream is what the table says."""
    model = tiny_model(family.model_type, torch.float32, rms_norm_eps=1e-6, **variant)
    assert repair_gain(family, model, folder) < 0.9


def repair_gain(family: Family, model: Any, folder: Path) -> float:
    """KL to the dense model with sequential repair, over that without; for a cut of heads."""
    model.save_pretrained(folder / "model")
    config = model.config.to_dict()
    config["model_type"] = family.model_type if family.model_type in NAMES else "llama"
    plan = random_plan(config, heads=4).model_copy(update={"model_type": family.model_type})
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 60, (64, 32), generator=draw)
    positions = torch.arange(32).expand(64, 32).clone()
    (folder / "profile").mkdir()
    write_json(folder / "profile" / INFO, {"samples": 64, "grams": []})
    real = torch.ones_like(ids, dtype=torch.bool)
    Sequences(ids, positions, ids.clone(), real).save(folder / "profile" / SEQUENCES)
    setup = RepairSetup(
        checkpoint.Checkpoint(folder / "model"),
        family,
        Profile(folder / "profile"),
        plan,
        folder / "work",
        Options(device="cpu", batch_size=16),
        tokens=64 * 32,
    )
    (without, repaired), _ = validation_kl(setup, (None, sequential.repair(setup)))
    assert without > 0
    return repaired / without


Check = Callable[[Family, dict[str, Any], Path], None]
CHECKS: list[Check] = [check_table, check_defaults, check_observe]
CHECKS += [check_keep_all, check_removal, check_reload, check_repair]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=IDS)
def test_contract(name: str, variant: dict[str, Any], check: Check, tmp_path: Path) -> None:
    check(families.get(name), variant, tmp_path)


def test_special_sizes_are_of_families_that_there_are() -> None:
    assert set(SPECIAL) <= set(NAMES)
    assert len(CASES) >= 2 * len(NAMES)


def broken(name: str, template: str = "", row: Tensor | None = None, **fields: Any) -> Family:
    family = families.get(name)
    tensors = dict(family.tensors)
    if template:
        tensors.pop(template)
        if row is not None:
            tensors[template] = row
    return dataclasses.replace(family, tensors=tensors, **fields)


LAYER = "model.layers.{layer}."
FUSED = (("kv_heads", "heads", "kv_heads"), "hidden")
OTHER_DEFAULT = {**families.get("qwen3").defaults, "head_dim": 64}
OTHER_STREAM = dict.fromkeys(("mlp", "heads"), LAYER + "input_layernorm")
MIXTRAL = families.get("mixtral")
MOE, GATE_UP = LAYER + "block_sparse_moe.", LAYER + "mlp.experts.gate_up_proj"
BROKEN = {
    "wrong dimension": (
        broken("mistral", LAYER + "self_attn.k_proj.weight", Tensor(("heads", "hidden"))),
        check_table,
    ),
    "axes swapped": (
        broken("qwen3", LAYER + "mlp.down_proj.weight", Tensor(("mlp", "hidden"))),
        check_table,
    ),
    "missing tensor": (broken("qwen2", LAYER + "self_attn.v_proj.bias"), check_table),
    "tied head counted": (
        broken("llama", "lm_head.weight", Tensor(("vocab", "hidden"))),
        check_table,
    ),
    "fused parts in another order": (
        broken("phi3", LAYER + "self_attn.qkv_proj.weight", Tensor(FUSED)),
        check_removal,
    ),
    "norm without its factor": (
        broken("llama", "model.norm.weight", Tensor(("hidden",))),
        check_removal,
    ),
    "offset that is not there": (broken("llama", norm_offset=1.0), check_removal),
    "no offset": (broken("gemma3_text", norm_offset=0.0), check_removal),
    "embedding not scaled": (broken("gemma3_text", scaled_embedding=False), check_removal),
    "layer types stay behind": (broken("gemma3_text", per_layer_config={}), check_removal),
    "wrong default": (broken("qwen3", defaults=OTHER_DEFAULT), check_defaults),
    "wrong module observed": (
        broken("llama", observe={"mlp": (LAYER + "mlp.gate_proj",)}),
        check_observe,
    ),
    "experts' parts in another order": (
        broken("mixtral", memory={**MIXTRAL.memory, GATE_UP: MIXTRAL.memory[GATE_UP][::-1]}),
        check_table,
    ),
    "router that keeps its rows": (
        broken("mixtral", MOE + "gate.weight", Tensor(("hidden", "experts"))),
        check_table,
    ),
    "experts in every layer": (broken("qwen3_moe", dense_layers=None), check_table),
    "dense layers stay behind": (broken("qwen3_moe", per_layer_config={}), check_removal),
    "expert channels of another axis": (
        broken("mixtral", MOE + "experts.{expert}.w1.weight", Tensor(("hidden", "expert_mlp"))),
        check_table,
    ),
    "norm after a part that is not named": (broken("gemma3_text", post_norm={}), check_repair),
    "stream of the wrong block": (broken("gemma3_text", residual=OTHER_STREAM), check_observe),
}


@pytest.mark.parametrize(("family", "check"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_table_fails(family: Family, check: Check, tmp_path: Path) -> None:
    variant = next(iter(variants(family)))
    check(families.get(family.model_type), variant, tmp_path / "whole")
    with pytest.raises((AssertionError, UserError, StrictDataclassError)):
        check(family, variant, tmp_path / "broken")


LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {"hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 4}),
        ("qwen2", {}),
        ("phi3", {"rope_parameters": LONG}),
    ],
)
@pytest.mark.parametrize("multiple_of", [1, 16, 32])
def test_advice_about_heads_is_accepted(
    model_type: str, fields: dict[str, Any], multiple_of: int
) -> None:
    """Whatever is asked for, each number that an error advises passes; it names what was asked."""
    family, config = families.get(model_type), tiny_config(model_type, **fields).to_dict()
    before, seen = family.sizes(config), 0
    group = before["heads"] // before["kv_heads"]
    for kv_heads in range(1, before["kv_heads"] + 1):
        for heads in range(1, before["heads"] + 1):
            sizes = {**before, "kv_heads": kv_heads, "heads": heads}
            try:
                families.check_sizes(family, config, sizes, multiple_of)
                continue
            except UserError as error:
                message = str(error)
            alone = heads == kv_heads * group != before["heads"]
            key = "num_key_value_heads" if alone else "num_attention_heads"
            assert message.startswith(f"{key} {kv_heads if alone else heads} with "), message
            _, _, advice = message.partition("; ")
            first, _, second = advice.partition(", or give num_attention_heads ")
            counts = [int(n) for n in re.findall(r"\d+", first)]
            tried = [{"kv_heads": n, "heads": n * group} if alone else {"heads": n} for n in counts]
            tried += [{"heads": int(n)} for n in re.findall(r"\d+", second)]
            for change in tried:
                families.check_sizes(family, config, {**sizes, **change}, multiple_of)
            assert tried or "no number of heads fits" in first, message
            seen += len(tried)
    assert seen > 0


@pytest.mark.parametrize(("multiplier", "helps"), [(1.0, True), (0.22, False)])
def test_a_multiplied_residual_is_refused_because_repair_would_do_harm(
    multiplier: float, helps: bool, tmp_path: Path
) -> None:
    """Granite has Llama's tensors, and multiplies what each part adds to the residual stream."""
    granite = dataclasses.replace(families.get("llama"), model_type="granite")
    model = tiny_model("granite", torch.float32, residual_multiplier=multiplier, rms_norm_eps=1e-6)
    assert (repair_gain(granite, model, tmp_path) < 0.9) == helps
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["model_type"] = "llama"
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    if helps:
        families.of(checkpoint.Checkpoint(tmp_path / "model"))
        return
    with pytest.raises(UserError, match=r"residual_multiplier 0.22 in config.json .* only 1"):
        families.of(checkpoint.Checkpoint(tmp_path / "model"))


def test_an_unknown_family_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'gemma3'.*did you mean 'gemma3_text'.*docs/add-a-family"):
        families.get("gemma3")


def test_import_is_quick_and_needs_no_torch() -> None:
    program = "import sys, regrow.plan, regrow.families; regrow.families.get('llama'); "
    subprocess.run(
        [sys.executable, "-c", program + "assert 'torch' not in sys.modules"], check=True
    )
