"""A student made fresh from a config.json, or by initialize."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file
from tiny_distillation import (
    CONFIG,
    data,
    write_place,
)
from transformers import GenerationConfig

from regrow import PruneConfig, SparsifyConfig, prune, sparsify, stage_dir
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import open_student
from regrow.stages.initialize.stage import initialize
from regrow.training.rates import FIXED, has_random_weights, usual_rate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def test_a_fresh_student_does_not_take_over_the_teachers_plan(place: Path, tmp_path: Path) -> None:
    teacher = Checkpoint(place / "pruned")
    assert open_student(place / "config.json", teacher).cut is None
    cut = open_student(place / "pruned", teacher).cut
    assert cut is not None
    assert (cut / "plan.json").exists()


def test_a_fresh_student_generates_as_its_teacher(place: Path, tmp_path: Path) -> None:
    """Its folder has the teacher's generation config, where the teacher has one."""
    teacher = Path(shutil.copytree(place / "teacher", tmp_path / "teacher"))
    config = GenerationConfig(eos_token_id=[0, 3], do_sample=True, temperature=0.3, top_p=0.9)
    config.save_pretrained(teacher)
    out = distill(place / "config.json", teacher, data(place), tmp_path / "out", CONFIG)
    fields = json.loads((out / "generation_config.json").read_text())
    assert (fields["eos_token_id"], fields["temperature"], fields["top_p"]) == ([0, 3], 0.3, 0.9)


def test_random_weights_have_the_rate_of_a_config(place: Path, tmp_path: Path) -> None:
    """Also as a ticket, or after a cut; not after a training."""
    first = initialize(place / "teacher", tmp_path / "first")
    rewound = SparsifyConfig(method="magnitude", rewind_to=str(first))
    ticket = sparsify(place / "teacher", tmp_path / "ticket", rewound)
    plan = PruneConfig(plan=str(place / "plan.json"), allow_sibling=True, repair=False)
    cut = prune(first, tmp_path / "cut", plan)
    config = CONFIG.model_copy(update={"learning_rate": None, "tokens": 256})
    given = (place / "teacher", data(place))
    trained = distill(first, *given, tmp_path / "trained", config)
    again = distill(trained, *given, tmp_path / "again", config)
    rates = [(stage_dir.read(out) or {})["config"]["learning_rate"] for out in (trained, again)]
    assert rates == [FIXED, usual_rate(Checkpoint(trained))]
    assert rates[1] < FIXED / 5
    models = (first, ticket, cut, trained, place / "teacher")
    found = [has_random_weights(Checkpoint(each)) for each in models]
    assert found == [True, True, True, False, False]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_each_weight_keeps_its_dtype(adapter: str, place: Path, tmp_path: Path) -> None:
    """A student in bfloat16 with norms in float32, in a file that begins with one of the norms."""
    student = Path(shutil.copytree(place / "pruned", tmp_path / "student"))
    weights = {
        name: weight.float() + 1e-4 if "norm" in name else weight.bfloat16()
        for name, weight in load_file(student / "model.safetensors").items()
    }
    save_file(weights, student / "model.safetensors", {"format": "pt"})
    stored = Checkpoint(student)
    assert (stored.dtype(stored.names()[0]), stored.main_dtype) == ("float32", "bfloat16")
    config = CONFIG.model_copy(update={"adapter": adapter})
    out = distill(student, place / "teacher", data(place), tmp_path / "out", config)
    written = load_file(out / "model.safetensors")
    assert {name: weight.dtype for name, weight in written.items()} == {
        name: weight.dtype for name, weight in weights.items()
    }
    for name, weight in written.items():
        if "norm" in name:
            assert not torch.equal(weight, weight.bfloat16().float())
            assert torch.equal(weight, weights[name]) is (adapter == "lora")


def test_a_fresh_student_follows_from_its_seed(place: Path) -> None:
    student = open_student(place / "config.json", Checkpoint(place / "teacher"))
    first, again, other = (student.model(seed).state_dict() for seed in (1, 1, 2))
    weight = "model.layers.0.mlp.down_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[weight], other[weight])
    assert {value.dtype for value in first.values()} == {torch.float32}
    parameters = student.model(1).parameters()
    assert student.parameters == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 100 is too small"),
        ({"model_type": "lama"}, "lama"),
        ({"model_type": "t5"}, "config of a t5, which is no causal language model"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 47}, "47"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized"),
    ],
)
def test_configs_that_no_student_can_be_made_of(
    place: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fields = json.loads((place / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(UserError, match=message) as caught:
        distill(tmp_path / "config.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_config_and_no_json(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json for a student"):
        distill(tmp_path / "none.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        distill(tmp_path / "bad.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
