"""Mixtures of experts: the cut by hand, dense layers among sparse ones, and the whole job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import write_model, write_text
from tiny_job import call, refused
from tiny_models import MIXTURES, logits, random_plan, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.checkpoint import experts_option
from regrow.errors import UserError
from regrow.plan import Plan, compose
from regrow.profile_folder import Profile
from regrow.pruning.cut import check, cut_config, cut_folder, cut_model
from regrow.pruning.prune import prove_reload
from regrow.stages.distill import student as student_module
from regrow.stages.distill.student import Student

TEXT = ("--sequence-length", 32)


@torch.no_grad()
def plan_of(config: dict[str, Any], **sizes: Any) -> Plan:
    return random_plan(config, **{"experts": 3, "expert_mlp": 24, "hidden": 40, **sizes})


@pytest.mark.parametrize("name", MIXTURES)
def test_the_stacked_parameters_by_hand(name: str) -> None:
    """What transformers holds in memory after the cut, indexed in what it held before."""
    model = tiny_model(name)
    config = model.config.to_dict()
    kept_layers = list(range(1, config["num_hidden_layers"]))
    plan = plan_of(config, layers=kept_layers)
    assert plan.experts and plan.expert_mlp and plan.hidden
    with_experts = families.get(name).layers_of("experts", config)
    assert set(plan.experts) == set(kept_layers) & set(with_experts)
    old, new = model.state_dict(), cut_model(model, plan).state_dict()
    d = plan.before["expert_mlp"]
    for layer, experts in plan.experts.items():
        before, after = (f"model.layers.{n}.mlp." for n in (layer, kept_layers.index(layer)))
        router = old[before + "gate.weight"][experts][:, plan.hidden]
        assert torch.equal(new[after + "gate.weight"], router)
        for number, expert in enumerate(experts):
            channels = plan.expert_mlp[layer][expert]
            gate, up = old[before + "experts.gate_up_proj"][expert].split(d)
            both = torch.cat([gate[channels], up[channels]])[:, plan.hidden]
            assert torch.equal(new[after + "experts.gate_up_proj"][number], both)
            down = old[before + "experts.down_proj"][expert][plan.hidden][:, channels]
            assert torch.equal(new[after + "experts.down_proj"][number], down)


def test_fewer_experts_than_the_softmax_knew() -> None:
    """Without norm_topk_prob the weights of the kept experts rise, as in any model of so many."""
    model: Any = tiny_model("qwen3_moe", norm_topk_prob=False, output_router_logits=True)
    student: Any = cut_model(model, random_plan(model.config.to_dict(), experts=2))
    x = torch.randn(7, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, weight, _ = student.model.layers[1].mlp.gate(x)
    torch.testing.assert_close(weight.sum(-1), torch.ones(7).double())
    assert student.config.output_router_logits and not student.config.norm_topk_prob
    assert student.config.num_experts_per_tok == 2


def test_dense_layers_are_listed_when_layers_go() -> None:
    config = tiny_config(
        "qwen3_moe", num_hidden_layers=7, decoder_sparse_step=2, mlp_only_layers=[3]
    ).to_dict()
    family = families.get("qwen3_moe")
    assert family.layers_of("experts", config) == [1, 5]
    assert family.layers_of("mlp", config) == [0, 2, 3, 4, 6]
    new = cut_config(config, random_plan(config, layers=[0, 1, 3, 5, 6]), family)
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [0, 2, 4])
    assert family.layers_of("experts", new) == [1, 3]
    same = cut_config(config, random_plan(config, mlp=40), family)
    assert (same["decoder_sparse_step"], same["mlp_only_layers"]) == (2, [3])
    with_experts = type(AutoConfig.for_model("qwen3_moe")).from_dict(new)
    state = AutoModelForCausalLM.from_config(with_experts).state_dict()
    assert [n for n in range(5) if f"model.layers.{n}.mlp.gate.weight" in state] == [1, 3]


def test_both_names_of_the_number_of_experts(tmp_path: Path) -> None:
    """Published checkpoints say num_experts, transformers 5 writes num_local_experts."""
    saved = write_model(tmp_path / "model", "qwen3_moe", torch.float64)
    assert "num_experts" not in saved.config and saved.config["num_local_experts"] == 5
    fields = json.loads((saved.folder / "config.json").read_text())
    fields["num_experts"] = fields.pop("num_local_experts")
    (saved.folder / "config.json").write_text(json.dumps(fields))
    published = Checkpoint(saved.folder)
    family = families.of(published)
    plan = random_plan(published.config, published.fingerprint, experts=3)
    cut_folder(published, plan, tmp_path / "cut", family=family)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["num_experts"] == 3 and "num_local_experts" not in config
    both = cut_config({**fields, "num_local_experts": 5}, plan, family)
    assert both["num_experts"] == both["num_local_experts"] == 3
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", dtype="auto", **experts_option(torch.float64)
    )
    model = published.model(torch.float64)
    assert torch.equal(logits(stock), logits(cut_model(model, plan)))


def test_a_large_cut_is_proven_by_the_stock_classes_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write_model(tmp_path / "model", "mixtral")
    monkeypatch.setattr("regrow.pruning.prune.RUN_BYTES", 0)
    prove_reload(checkpoint.folder)


@pytest.mark.parametrize("name", MIXTURES)
def test_two_cuts_are_one_composed(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=4)
    config = model.config.to_dict()
    first = random_plan(config, "a", 1, experts=3, expert_mlp=32, layers=[0, 1, 3])
    child = cut_model(model, first)
    then = {"experts": 2, "expert_mlp": 16, "hidden": 24, "layers": [0, 1]}
    for sizes in (then, {"experts": 2}, {"expert_mlp": 8}, {"layers": [1, 2]}):
        second = random_plan(child.config.to_dict(), "b", 2, **sizes)
        whole = compose(first, second)
        check(whole, families.get(name), config)
        assert torch.equal(logits(cut_model(child, second)), logits(cut_model(model, whole)))
        assert Plan.model_validate_json(whole.model_dump_json()) == whole


def edited(**fields: Any) -> Plan:
    return plan_of(tiny_config("qwen3_moe").to_dict()).model_copy(update=fields)


def channels(layer: int, expert: int, ids: list[int] | None) -> dict[int, dict[int, list[int]]]:
    chosen: dict[int, dict[int, list[int]]] = edited().model_dump()["expert_mlp"]
    first = list(chosen[layer])[expert]
    if ids is None:
        del chosen[layer][first]
    else:
        chosen[layer][first] = ids
    return chosen


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": {1: [0, 1, 2]}}, r"experts must list exactly the kept layers.*\[3\]"),
        ({"experts": {n: [0, 1, 2] for n in range(4)}}, r"experts must list.*\[0, 2\]"),
        ({"experts": {1: [0, 1], 3: [0, 1]}}, "experts.1 keeps 2 units, but after.experts is 3"),
        ({"experts": {1: [0, 1, 5], 3: [0, 1, 2]}}, "experts.1 names 5; allowed are 0 to 4"),
        ({"experts": None}, "experts keeps 5 units"),
        ({"expert_mlp": channels(1, 0, None)}, r"expert_mlp.1 must list exactly the kept experts"),
        ({"expert_mlp": channels(3, 1, [0])}, r"expert_mlp\.3\.\d keeps 1 units"),
        ({"expert_mlp": None}, "expert_mlp keeps 40 units"),
    ],
)
def test_a_plan_that_contradicts_itself(fields: dict[str, Any], message: str) -> None:
    config = tiny_config("qwen3_moe").to_dict()
    check(edited(), families.get("qwen3_moe"), config)
    with pytest.raises(UserError, match=message) as error:
        check(edited(**fields), families.get("qwen3_moe"), config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("mixtral", {"experts": 1}, "num_experts 1: the router chooses 2.*keep 2 or more"),
        ("mixtral", {"expert_mlp": 44}, "moe_intermediate_size 44.*multiple of 8; use 40 or 48"),
        ("mixtral", {"hidden": 42}, "hidden_size 42.*multiple of 8"),
        ("mixtral", {"mlp": 8}, "intermediate_size 8.*mixtral.*are moe_intermediate_size"),
        ("llama", {"experts": 2}, "num_experts 2: this llama model has none"),
        ("llama", {"expert_mlp": 8}, "moe_intermediate_size 8.*none: its MLP.*intermediate_size"),
        ("qwen3_moe", {"experts": 6}, "num_experts 6: allowed are 1 to 5"),
    ],
)
def test_sizes_that_cannot_be(name: str, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        families.check_sizes(families.get(name), tiny_config(name).to_dict(), sizes)


def test_an_mlp_that_no_layer_has_is_not_cut() -> None:
    config = tiny_config("qwen3_moe", decoder_sparse_step=1).to_dict()
    with pytest.raises(UserError, match="intermediate_size 32: this qwen3_moe model has none"):
        families.check_sizes(families.get("qwen3_moe"), config, {"mlp": 32})


@pytest.fixture(scope="module", params=MIXTURES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, text, and a profile of the model by several criteria."""
    folder = tmp_path_factory.mktemp(request.param)
    text = write_text(folder / "text.jsonl")
    write_model(folder / "model", request.param, torch.bfloat16)
    call("profile", folder / "model", "--data", text, *TEXT, "--samples", 16, "--gram-tokens", 512,
         "--criteria", "activation_l2", "block_influence", "routed_output",
         "--out", folder / "profile")  # fmt: skip
    return folder


def test_from_profile_to_distilled_student(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = place / "model", ("--data", place / "text.jsonl", *TEXT)
    call("prune", model, "--profile", place / "profile", "--num-experts", 3,
         "--moe-intermediate-size", 24, "--multiple-of", 8, "--expert-criterion", "routed_output",
         "--out", tmp_path / "cut")  # fmt: skip
    plan = Plan.read(tmp_path / "cut/plan.json")
    scores = Profile(place / "profile").scores("routed_output", "experts")
    assert plan.experts is not None
    for layer, kept in plan.experts.items():
        assert kept == sorted(scores[str(layer)].argsort(descending=True)[:3].tolist())
    inside = Profile(place / "profile").scores("activation_l2", "expert_mlp")
    assert plan.expert_mlp is not None
    for layer, experts in plan.expert_mlp.items():
        for expert, units in experts.items():
            best = inside[str(layer)][expert].argsort(descending=True)[:24]
            assert units == sorted(best.tolist())
    manifest = json.loads((tmp_path / "cut/manifest.json").read_text())
    readers = [name for name in manifest["repair"] if not name.endswith("o_proj.weight")]
    assert all(name.endswith("mlp.down_proj.weight") for name in readers)  # of dense layers
    assert len(manifest["repair"]) - len(readers) == Checkpoint(model).config["num_hidden_layers"]
    call("distill", tmp_path / "cut", "--teacher", model, *text, "--tokens", 512, "--batch-tokens",
         128, "--eval-tokens", 256, "--heldout-sequences", 2,
         "--out", tmp_path / "distilled")  # fmt: skip
    call("evaluate", tmp_path / "distilled", "--against", model, *text, "--heldout-sequences", 4,
         "--new-tokens", 4, "--prefill-tokens", 16, "--decode-tokens", 2, "--repeats", 1,
         "--out", tmp_path / "evaluation")  # fmt: skip
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "distilled", dtype=torch.float32)
    assert stock.config.num_local_experts == 3
    found, before = Checkpoint(tmp_path / "distilled"), Checkpoint(tmp_path / "cut")
    assert found.shapes == before.shapes
    layer = min(plan.experts)
    (gate,) = (n for n in found.names() if f".{layer}." in n and n.endswith(".gate.weight"))
    assert not torch.equal(found.tensor(gate).float(), before.tensor(gate).float())


@pytest.mark.parametrize("name", MIXTURES)
def test_a_student_takes_back_what_it_was_saved_as(name: str, tmp_path: Path) -> None:
    """As Trainer does to resume, and to end with its best checkpoint."""
    saved = write_model(tmp_path / "model", name)
    student = Student(saved).model(seed=0)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    found = student.load_state_dict(load_file(saved.folder / "model.safetensors"), strict=False)
    assert not found.missing_keys and not found.unexpected_keys
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    student.load_state_dict(before)
    plain = saved.model(torch.float32)
    plain.register_load_state_dict_post_hook(student_module._require_all_used)
    with pytest.raises(AssertionError, match="unused tensors of a checkpoint"):
        plain.load_state_dict(load_file(saved.folder / "model.safetensors"), strict=False)


def test_experts_are_cut_without_grams_and_heads_are_repaired(place: Path, tmp_path: Path) -> None:
    text = ("--data", place / "text.jsonl", *TEXT)
    for name, samples in (("profile", 8), ("larger", 96)):
        call("profile", place / "model", *text, "--samples", samples, "--gram-tokens", 0,
             "--out", tmp_path / name)  # fmt: skip
    call("prune", place / "model", "--profile", tmp_path / "profile", "--num-experts", 3,
         "--out", tmp_path / "cut")  # fmt: skip
    call("prune", place / "model", "--profile", tmp_path / "larger", "--num-key-value-heads", 1,
         "--multiple-of", 4, "--out", tmp_path / "heads")  # fmt: skip
    repaired = json.loads((tmp_path / "heads/manifest.json").read_text())["repair"]
    layers = Checkpoint(place / "model").config["num_hidden_layers"]
    assert sum(name.endswith("o_proj.weight") for name in repaired) == layers
    assert not any("experts" in name for name in repaired)


def test_a_share_of_the_parameters_is_searched_for(place: Path, tmp_path: Path) -> None:
    share = 0.75 if place.name.startswith("mixtral") else 0.85
    call("prune", place / "model", "--profile", place / "profile", "--data", place / "text.jsonl",
         *TEXT, "--keep-params", share, "--multiple-of", 8, "--out", tmp_path / "cut")  # fmt: skip
    table = json.loads((tmp_path / "cut/candidates.json").read_text())
    assert len(table) >= 2
    assert any(row["sizes"].keys() & {"experts", "expert_mlp"} for row in table)
    (chosen,) = (row for row in table if row["chosen"])
    assert chosen["kl"] == min(row["kl"] for row in table) > 0


def test_inspect_tells_what_a_token_runs_through(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("inspect", place / "model")
    said = capsys.readouterr().out
    checkpoint = Checkpoint(place / "model")
    family = families.of(checkpoint)
    assert f"{family.active(checkpoint.config):,} of them for each token" in said
    assert "--num-experts" in said and "--moe-intermediate-size" in said
    assert ("--intermediate-size" in said.split()) == ("mlp" in family.config_keys)


def test_too_few_experts_are_refused_at_once(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--profile", place / "profile", "--num-experts", 1, "--out", tmp_path / "cut")
    said = refused(capsys, "prune", place / "model", *given)
    assert "num_experts 1: the router chooses 2" in said
    assert not (tmp_path / "cut").exists()
