"""plan.json: readable, refused when wrong, composed over two rounds; which sizes can be met."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny_models import random_plan, tiny_config, tiny_ids, tiny_model
from transformers import AutoConfig

from regrow import families
from regrow.checkpoint import checkpoint
from regrow.errors import UserError
from regrow.plan import Plan, compose
from regrow.pruning.cut import cut_config, cut_model

CONFIG = tiny_config("qwen2").to_dict()
SIZES = families.get("qwen2").sizes(CONFIG)
FULL: dict[str, Any] = {"layers": 3, "hidden": 40, "mlp": 5, "heads": 4, "kv_heads": 2}


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = random_plan(CONFIG, "f00d", layers=[0, 2, 3], mlp=5, heads=4)
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    plan.check(SIZES)


def test_the_file_has_a_line_per_layer_in_order(tmp_path: Path) -> None:
    units = {layer: [0, 2] for layer in (10, 2, 1)}
    sizes = {"layers": 3, "mlp": 2}
    before = {"layers": 11, "mlp": 4}
    plan = Plan(
        model_type="llama",
        fingerprint="f",
        before=before,
        after=sizes,
        layers=[1, 2, 10],
        mlp=units,
    )
    plan.write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    assert '"mlp": {\n    "1": [0, 2],\n    "2": [0, 2],\n    "10": [0, 2]\n  }' in text
    assert '\n  "layers": [1, 2, 10],\n' in text
    assert "hidden" not in json.loads(text)


def edited(**fields: Any) -> Plan:
    return random_plan(CONFIG, **FULL).model_copy(update=fields)


def with_layer(dim: str, ids: list[int]) -> dict[int, list[int]]:
    chosen: dict[int, list[int]] = random_plan(CONFIG, **FULL).model_dump()[dim]
    return {**chosen, list(chosen)[1]: ids}


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "widths differ": ({"mlp": with_layer("mlp", [0, 1, 2, 3])}, r"keeps 4 units.*after.mlp is 5"),
    "id out of range": ({"mlp": with_layer("mlp", [0, 1, 2, 3, 56])}, r"names 56.*0 to 55"),
    "negative id": ({"mlp": with_layer("mlp", [-1, 1, 2, 3, 4])}, r"names -1"),
    "id twice": ({"hidden": [*range(39), 38]}, r"hidden must ascend, without an id twice"),
    "not ascending": ({"layers": [1, 0, 3]}, r"layers must ascend"),
    "count is not after": ({"hidden": [*range(41)]}, r"keeps 41 units, but after.hidden is 40"),
    "a layer without its list": ({"mlp": {0: [0, 1, 2, 3, 4]}}, r"mlp must list exactly the kept"),
    "dropped without a list": ({"hidden": None}, r"keeps 48 units, but after.hidden is 40"),
    "uneven groups": ({"heads": with_layer("heads", [0, 1, 2, 3])}, r"\{0: 3, 1: 1\}"),
    "vocab": ({"after": {**SIZES, **FULL, "vocab": 100}}, r"after.vocab is 100"),
    "dimension missing": ({"after": {"layers": 3}}, r"must name the dimensions"),
    "other parent": ({"before": {**SIZES, "mlp": 64}}, r"before.mlp is 64, but the model has 56"),
    "unknown dimension": ({"before": {**SIZES, "experts": 8}}, r"before.experts is 8.* None"),
    "later format": ({"format": 2}, r"reads format 1"),
}


@pytest.mark.parametrize(("fields", "message"), EDITS.values(), ids=EDITS.keys())
def test_an_inconsistent_plan_is_refused(fields: dict[str, Any], message: str) -> None:
    edited().check(SIZES)
    with pytest.raises(UserError, match=message) as error:
        edited(**fields).check(SIZES)
    assert "\n" not in str(error.value)


def test_a_query_head_needs_its_kv_head() -> None:
    plan = random_plan(CONFIG, kv_heads=1, heads=2)
    lone = {layer: [0, 5] for layer in plan.kept_layers()}
    with pytest.raises(UserError, match=r"key/value head [01] is not kept"):
        plan.model_copy(update={"heads": lone}).check(SIZES)


def test_query_heads_follow_their_kv_heads() -> None:
    plan = random_plan(CONFIG, kv_heads=1)
    for layer in plan.kept_layers():
        (kv,) = plan.kv_heads[layer] if plan.kv_heads else []
        assert plan.kept("heads", layer) == [3 * kv, 3 * kv + 1, 3 * kv + 2]
    assert random_plan(CONFIG).kept("heads", 0) is None


def test_broken_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(UserError, match="no plan at"):
        Plan.read(path)
    path.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        Plan.read(path)
    random_plan(CONFIG, mlp=5).write(path)
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "hiden": [1]}))
    with pytest.raises(UserError, match=r"plan.json\.hiden: unknown key.*'hidden'"):
        Plan.read(path)
    path.write_text(json.dumps({**fields, "mlp": {"0": ["x"]}}))
    with pytest.raises(UserError, match=r"plan.json\.mlp\.0\.0"):
        Plan.read(path)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / str(seed))
    first, second = (checkpoint.load(tmp_path / name) for name in "01")
    plan = random_plan(first.config, first.fingerprint, mlp=8)
    plan.check_fingerprint(first)
    with pytest.raises(UserError, match="make a plan for this model"):
        plan.check_fingerprint(second)


STEPS: list[dict[str, Any]] = [
    {"layers": [0, 2, 3]},
    {"hidden": 42},
    {"mlp": 30},
    {"heads": 4},
    {"kv_heads": 1},
    {"layers": [0, 1, 3], "hidden": 36, "mlp": 41, "heads": 4},
]


@pytest.mark.parametrize("second", range(len(STEPS)))
@pytest.mark.parametrize("first", range(len(STEPS)))
def test_two_cuts_equal_their_composed_plan(first: int, second: int) -> None:
    model = tiny_model("qwen2", seed=3)
    one = random_plan(model.config.to_dict(), "first", seed=first, **STEPS[first])
    middle = cut_model(model, one)
    wanted = {dim: smaller(dim, one.after[dim]) for dim in STEPS[second]}
    two = random_plan(middle.config.to_dict(), "second", seed=second + 7, **wanted)
    both = compose(one, two)
    both.check(families.get("qwen2").sizes(model.config.to_dict()))
    assert (both.fingerprint, both.parents) == ("first", ("second",))
    in_turn, at_once = cut_model(middle, two), cut_model(model, both)
    assert in_turn.num_parameters() == at_once.num_parameters()
    for name, tensor in in_turn.state_dict().items():
        torch.testing.assert_close(at_once.state_dict()[name], tensor, rtol=1e-14, atol=0)
    assert in_turn.config.to_dict() | eps_of(at_once) == at_once.config.to_dict()
    torch.testing.assert_close(at_once(tiny_ids()).logits, in_turn(tiny_ids()).logits)


def smaller(dim: str, size: int) -> int | list[int]:
    """A next size that two KV heads or one can meet."""
    if dim == "layers":
        return sorted(random.Random(5).sample(range(size), size - 1))
    return {"hidden": size - 6, "mlp": size - 9, "heads": max(size - 2, 2), "kv_heads": 1}[dim]


def eps_of(model: Any) -> dict[str, Any]:
    return {"rms_norm_eps": pytest.approx(model.config.rms_norm_eps, rel=1e-14)}


def test_three_plans_compose_in_any_grouping() -> None:
    plan_a = random_plan(CONFIG, "a", seed=1, mlp=40, layers=[0, 2, 3])
    left = {**CONFIG, "intermediate_size": 40, "num_hidden_layers": 3}
    plan_b = random_plan(left, "b", seed=2, mlp=30, kv_heads=1)
    last = {**left, "intermediate_size": 30, "num_key_value_heads": 1, "num_attention_heads": 3}
    three = random_plan(
        {**last, "head_dim": 8}, "c", seed=3, mlp=20, heads=2, layers=[0, 2], hidden=40
    )
    first = compose(compose(plan_a, plan_b), three)
    assert first == compose(plan_a, compose(plan_b, three))
    assert first.parents == ("b", "c") and first.kept_layers() == [0, 3]


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(UserError, match="do not follow each other"):
        compose(random_plan(CONFIG, mlp=40), random_plan(CONFIG, mlp=30))


REFUSED: list[tuple[str, dict[str, int], int, str]] = [
    ("llama", {"layers": 4}, 1, r"num_hidden_layers 4: allowed are 1 to 3"),
    ("llama", {"hidden": 0}, 1, r"hidden_size 0: allowed are 1 to 48"),
    ("qwen2", {"mlp": -8}, 1, r"intermediate_size -8: allowed are 1 to 56"),
    ("qwen2", {"mlp": 57}, 1, r"intermediate_size 57"),
    ("qwen2", {"heads": 5}, 1, r"num_attention_heads 5 with 2 key/value.*allowed: 2, 4, 6"),
    ("qwen2", {"heads": 6, "kv_heads": 1}, 1, r"at most 3; allowed: 1, 2, 3"),
    ("qwen2", {"head_dim": 4}, 1, r"head_dim 4: it cannot be cut; this model has 8"),
    ("qwen2", {"mlp": 50}, 32, r"multiple of 32; use 32$"),
    ("qwen2", {"mlp": 50}, 64, r"multiple of 64; leave it at 56"),
    ("qwen2", {"hidden": 30}, 32, r"hidden_size 30.*use 32"),
    ("qwen2", {"heads": 2}, 32, r"num_attention_heads 2.*multiple of 4; use 4"),
    ("qwen2", {"heads": 2}, 256, r"multiple of 32; leave it at 6"),
    ("llama", {"hidden": 40}, 1, r"hidden_size 40.*multiple of 6; use 36 or 42"),
    ("llama", {"heads": 4, "kv_heads": 2, "hidden": 42}, 1, r"multiple of 4; use 40 or 44"),
    ("gemma3_text", {"hidden": 32}, 32, r"multiple of 96; leave it at 48"),
]


@pytest.mark.parametrize(("model_type", "sizes", "multiple_of", "message"), REFUSED)
def test_impossible_sizes_are_refused(
    model_type: str, sizes: dict[str, int], multiple_of: int, message: str
) -> None:
    config = tiny_config(model_type).to_dict()
    with pytest.raises(UserError, match=message) as error:
        families.check_sizes(families.get(model_type), config, sizes, multiple_of)
    assert "\n" not in str(error.value)


def test_a_width_that_stays_is_never_refused() -> None:
    """SmolLM2's 576 columns are no multiple of 256; that is no fault of a cut elsewhere."""
    config = tiny_config("llama").to_dict()
    families.check_sizes(families.get("llama"), config, {"mlp": 32, "hidden": 48, "heads": 6}, 32)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "phi3"])
def test_allowed_sizes_are_those_that_transformers_loads(model_type: str) -> None:
    """Every pair of hidden and heads, against the config class itself."""
    rope: dict[str, Any] = {}
    if model_type == "phi3":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **factors}}
    config = tiny_config(model_type, **rope).to_dict()
    outcomes = set()
    for hidden in range(24, 49):
        for heads, kv_heads in [(6, 2), (4, 2), (2, 2), (3, 1), (2, 1)]:
            sizes = {"hidden": hidden, "heads": heads, "kv_heads": kv_heads}
            allowed = is_allowed(model_type, config, sizes)
            assert allowed == loads(model_type, config, sizes), sizes
            outcomes.add(allowed)
    assert outcomes == ({True} if model_type == "mistral" else {True, False})


def is_allowed(model_type: str, config: dict[str, Any], sizes: dict[str, int]) -> bool:
    try:
        families.check_sizes(families.get(model_type), config, sizes)
    except UserError:
        return False
    return True


def loads(model_type: str, config: dict[str, Any], sizes: dict[str, int]) -> bool:
    new = cut_config(config, random_plan(config, "", 0, **sizes), families.get(model_type))
    try:
        AutoConfig.for_model(**new)
    except StrictDataclassError:
        return False
    return True
