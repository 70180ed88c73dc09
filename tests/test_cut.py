"""What a cut does to tensors, configs and memory; the contract per family is test_families.py."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import float64_norms, logits, random_plan, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from regrow import families
from regrow.checkpoint import Checkpoint, checkpoint
from regrow.errors import UserError
from regrow.pruning.cut import cut, cut_config, cut_folder, cut_model

logging.disable_progress_bar()
GATE = "model.layers.{}.mlp.gate_proj.weight"
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama", dtype=torch.bfloat16, tie_word_embeddings=False).save_pretrained(folder)
    return checkpoint.load(folder)


def test_rows_and_columns_by_hand() -> None:
    """The cut against indexing written out for one fused and one plain tensor."""
    model = tiny_model("phi3")
    plan = random_plan(model.config.to_dict(), layers=[0, 2], mlp=9, heads=2, kv_heads=1, hidden=24)
    old, new = model.state_dict(), cut_model(model, plan).state_dict()
    assert plan.hidden and plan.mlp and plan.heads and plan.kv_heads
    for number, layer in enumerate([0, 2]):
        gate_up = old[f"model.layers.{layer}.mlp.gate_up_proj.weight"]
        rows = plan.mlp[layer] + [56 + unit for unit in plan.mlp[layer]]
        cut_gate_up = new[f"model.layers.{number}.mlp.gate_up_proj.weight"]
        assert torch.equal(cut_gate_up, gate_up[rows][:, plan.hidden])
        q, k, v = old[f"model.layers.{layer}.self_attn.qkv_proj.weight"].split([48, 16, 16])
        (kv,) = plan.kv_heads[layer]
        parts = [q[8 * head : 8 * head + 8] for head in plan.heads[layer]]
        parts += [k[8 * kv : 8 * kv + 8], v[8 * kv : 8 * kv + 8]]
        qkv = new[f"model.layers.{number}.self_attn.qkv_proj.weight"]
        assert torch.equal(qkv, torch.cat(parts)[:, plan.hidden])


def test_eps_is_scaled_with_hidden() -> None:
    """With an eps that matters: exact where no other norm shares it (llama has no qk-norm)."""
    model: Any = float64_norms(tiny_model("llama", rms_norm_eps=0.5))
    plan = random_plan(model.config.to_dict(), hidden=24)
    gone = [i for i in range(48) if i not in (plan.hidden or [])]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
    student = float64_norms(cut_model(model, plan))
    assert student.config.rms_norm_eps == 1.0
    torch.testing.assert_close(logits(student), logits(model), rtol=1e-11, atol=1e-11)


def test_norms_are_scaled_in_more_than_bfloat16() -> None:
    model = tiny_model("gemma3_text", dtype=torch.bfloat16)
    plan = random_plan(model.config.to_dict(), hidden=36)
    student = cut_model(model, plan)
    for name in ("model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"):
        kept = model.state_dict()[name].double()[..., plan.hidden]
        offset = 1.0 if "norm" in name else 0.0
        exact = (kept + offset) * (48 / 36) ** 0.5 - offset
        got = student.state_dict()[name]
        assert got.dtype == torch.bfloat16
        assert ((got.double() - exact).abs() <= exact.abs() * 2**-8).all()
        # bfloat16 arithmetic would round twice and miss the nearest value in a third of the cases
        assert (got != exact.to(torch.bfloat16)).double().mean() < 1e-3
    last = model.state_dict()["model.norm.weight"][plan.hidden]
    assert torch.equal(student.state_dict()["model.norm.weight"], last)  # tied: the factors cancel


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_cut_copy_shares_no_memory_with_its_parent(attention: str) -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16).train()
    model.set_attn_implementation(attention)
    model.generation_config.temperature = 0.25
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    student = cut_model(model, random_plan(model.config.to_dict(), mlp=20))
    assert student.dtype == torch.bfloat16 and not student.training and model.training
    assert student.config._attn_implementation == attention
    assert student.generation_config.temperature == 0.25
    assert type(student) is type(model)
    assert all(p.requires_grad and p.device == model.device for p in student.parameters())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_the_copy_has_the_dtype_of_the_weights_not_of_the_config() -> None:
    model = tiny_model("mistral", dtype=torch.bfloat16).float()
    assert model.config.dtype == torch.bfloat16
    student = cut_model(model, random_plan(model.config.to_dict(), hidden=20))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}


def test_replace_gets_the_parents_name_and_the_cut_tensor(
    saved: Checkpoint, tmp_path: Path
) -> None:
    plan = random_plan(saved.config, saved.fingerprint, layers=[0, 2], mlp=20)
    shapes: dict[str, tuple[int, ...]] = {}

    def double(name: str, tensor: Tensor) -> Tensor:
        shapes[name] = tuple(tensor.shape)
        return tensor * 2 if name == DOWN.format(2) else tensor

    cut_folder(saved, plan, tmp_path / "plain")
    cut_folder(saved, plan, tmp_path / "doubled", double)
    plain, doubled = (checkpoint.load(tmp_path / name) for name in ("plain", "doubled"))
    assert shapes[DOWN.format(2)] == (48, 20) and GATE.format(1) not in shapes
    for name in plain.names():
        factor = 2 if name == DOWN.format(1) else 1  # layer 2 of the parent is 1 of the student
        assert torch.equal(doubled.tensor(name), plain.tensor(name) * factor)
    model = AutoModelForCausalLM.from_pretrained(saved.folder, dtype="auto")
    in_memory = cut_model(model, plan, double).state_dict()
    assert torch.equal(in_memory[DOWN.format(1)], doubled.tensor(DOWN.format(1)))


def test_a_replacement_of_another_shape_fails_an_assertion(
    saved: Checkpoint, tmp_path: Path
) -> None:
    plan = random_plan(saved.config, saved.fingerprint, mlp=20)
    with pytest.raises(AssertionError, match="lm_head"):
        cut_folder(saved, plan, tmp_path / "out", lambda name, tensor: tensor[:1])


def test_tensors_are_read_one_at_a_time(saved: Checkpoint) -> None:
    """When the next tensor is read, the one before is gone, if the taker let it go."""
    plan = random_plan(saved.config, mlp=20, hidden=24)
    alive: list[weakref.ref[Tensor]] = []

    def read() -> Iterator[tuple[str, Tensor]]:
        for name in saved.names():
            assert sum(ref() is not None for ref in alive) <= 1  # the loop variable of `cut`
            tensor = saved.tensor(name)
            alive.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    num_read = 0
    for _name, tensor in cut(read(), plan, families.get("llama"), saved.config):
        num_read += tensor.numel()
        del tensor
    assert num_read == families.get("llama").count(saved.config, plan.after)
    assert len(alive) == len(saved.names())


def test_dropped_layers_are_not_read(saved: Checkpoint, tmp_path: Path) -> None:
    read: list[str] = []

    class Counting(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            read.append(name)
            return super().tensor(name)

    counting = Counting(saved.folder)
    plan = random_plan(saved.config, saved.fingerprint, layers=[2])
    cut_folder(counting, plan, tmp_path / "out")
    assert {name.split(".")[2] for name in read if ".layers." in name} == {"2"}
    assert len(read) == len(set(read)) == 12


def follow(layers: list[int], model_type: str = "qwen2", **config: Any) -> dict[str, Any]:
    parent = {**tiny_config(model_type, num_hidden_layers=6, layer_types=None).to_dict(), **config}
    if config.get("layer_types", "") is None:
        del parent["layer_types"]
    plan = random_plan(parent, layers=layers)
    return cut_config(parent, plan, families.get(model_type))


def test_per_layer_config_follows_the_kept_layers() -> None:
    new = follow(
        [1, 3, 4],
        layer_types=["a", "b", "c", "d", "e", "f"],
        no_rope_layers=[1, 1, 1, 0, 1, 1],
        mlp_only_layers=[0, 3, 4],
        max_window_layers=4,
    )
    assert new["num_hidden_layers"] == 3
    assert new["layer_types"] == ["b", "d", "e"]
    assert new["no_rope_layers"] == [1, 0, 1]
    assert new["mlp_only_layers"] == [1, 2]
    assert new["max_window_layers"] == 2


def test_all_other_config_fields_stay() -> None:
    parent = {**tiny_config("llama").to_dict(), "a_key_of_the_future": {"x": [1]}}
    new = cut_config(parent, random_plan(parent, mlp=20), families.get("llama"))
    assert new == {**parent, "intermediate_size": 20}
    assert new["a_key_of_the_future"] is not parent["a_key_of_the_future"]


def test_sizes_that_were_implied_are_written() -> None:
    """head_dim = hidden / heads and no KV heads must not follow the new widths."""
    parent = {**tiny_config("llama", num_key_value_heads=6).to_dict(), "head_dim": None}
    del parent["num_key_value_heads"], parent["rms_norm_eps"]
    plan = random_plan(parent, kv_heads=4, hidden=24)
    new = cut_config(parent, plan, families.get("llama"))
    assert (new["head_dim"], new["num_attention_heads"], new["num_key_value_heads"]) == (8, 4, 4)
    assert new["rms_norm_eps"] == 2e-6


FULL, SLIDING = "full_attention", "sliding_attention"
PERIODS: list[tuple[list[int], list[str], bool]] = [
    ([0, 1, 2, 3], [SLIDING, SLIDING, FULL, SLIDING], True),
    ([0, 3, 5], [SLIDING, SLIDING, FULL], True),
    ([1, 2, 3, 5], [SLIDING, FULL, SLIDING, FULL], False),
    ([0, 1, 3, 4], [SLIDING] * 4, False),
]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("layers", "types", "periodic"), PERIODS)
def test_a_sliding_period_becomes_a_list(
    layers: list[int], types: list[str], periodic: bool, listed: bool
) -> None:
    """Old Gemma 3 configs have only the period; it goes when it no longer tells the truth."""
    fields = {"layer_types": [SLIDING, SLIDING, FULL] * 2} if listed else {"layer_types": None}
    new = follow(layers, "gemma3_text", sliding_window_pattern=3, **fields)
    assert new["layer_types"] == types
    assert ("sliding_window_pattern" in new, "_sliding_window_pattern" in new) == (periodic,) * 2
    assert AutoConfig.for_model(**new).layer_types == types


def test_a_plan_for_another_model_is_refused(saved: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="made for the model 0000"):
        cut_folder(saved, random_plan(saved.config, "0000", mlp=20), tmp_path / "out")
    plan = random_plan(tiny_config("qwen2").to_dict(), saved.fingerprint, mlp=20)
    with pytest.raises(UserError, match="made for a qwen2 model, not for a llama"):
        cut_folder(saved, plan, tmp_path / "out")
    plan = random_plan(saved.config, saved.fingerprint, heads=4, hidden=46)
    with pytest.raises(UserError, match=r"hidden_size 46.*multiple of 4; use 44"):
        cut_folder(saved, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_do_not_fit_the_table_are_refused(saved: Checkpoint) -> None:
    family, shapes = families.get("llama"), saved.shapes
    family.check_tensors(saved.config, shapes)
    with pytest.raises(UserError, match=r"model.layers.3.*no tensor of a llama"):
        family.check_tensors(saved.config, {**shapes, GATE.format(3): (56, 48)})
    with pytest.raises(UserError, match=r"shape \(56, 47\).*must be \(56, 48\)"):
        family.check_tensors(saved.config, {**shapes, GATE.format(1): (56, 47)})
    gone = ("model.norm.weight", "model.layers.2.mlp.up_proj.weight")
    remaining = {name: shape for name, shape in shapes.items() if name not in gone}
    with pytest.raises(UserError, match=r"layers.2.mlp.up_proj.weight is missing \(2 in all\)"):
        family.check_tensors(saved.config, remaining)
    odd = [("model.odd.weight", torch.zeros(2))]
    with pytest.raises(UserError, match="no tensor of a llama"):
        list(cut(odd, random_plan(saved.config, mlp=20), family, saved.config))


def test_a_tied_config_with_a_separate_head_is_refused(saved: Checkpoint, tmp_path: Path) -> None:
    """transformers would load both values; dropping one would change the model in silence."""
    folder = tmp_path / "odd"
    tensors = {name: saved.tensor(name) for name in saved.names()}
    tied = {**saved.config, "tie_word_embeddings": True}
    checkpoint.write(folder, tied, tensors, tensors.items())
    with pytest.raises(UserError, match="tie_word_embeddings to false"):
        checkpoint.load(folder)
    with pytest.raises(UserError, match="tie_word_embeddings to false"):
        cut_model(AutoModelForCausalLM.from_pretrained(folder), random_plan(tied, mlp=20))
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    checkpoint.write(tmp_path / "same", tied, same, same.items())
    twice = checkpoint.load(tmp_path / "same")
    cut_folder(twice, random_plan(twice.config, twice.fingerprint, mlp=20), tmp_path / "out")
    assert "lm_head.weight" not in checkpoint.load(tmp_path / "out").names()


def test_tokenizer_files_are_copied_and_shards_stay_small(
    saved: Checkpoint, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    model = AutoModelForCausalLM.from_pretrained(saved.folder, dtype="auto")
    model.save_pretrained(parent, max_shard_size=40_000)
    (parent / "tokenizer.json").write_text('{"version": "1.0"}')
    shards = checkpoint.load(parent)
    plan = random_plan(shards.config, shards.fingerprint, hidden=24)
    cut_folder(shards, plan, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"version": "1.0"}'
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    count = families.get("llama").count(shards.config, plan.after)
    assert index["metadata"]["total_size"] == 2 * count
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(stock), logits(cut_model(model, plan)))
