"""A student made fresh from a config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tiny_distillation import (
    CONFIG,
    data,
    write_place,
)

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import open_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def test_a_fresh_student_does_not_take_over_the_teachers_plan(place: Path, tmp_path: Path) -> None:
    teacher = Checkpoint(place / "pruned")
    assert open_student(place / "config.json", teacher).carried("plan.json") is None
    assert open_student(place / "pruned", teacher).carried("plan.json") is not None


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
        ({"model_type": "t5"}, "no config of a causal"),
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
    with pytest.raises(UserError, match="no config for a fresh student"):
        distill(tmp_path / "none.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        distill(tmp_path / "bad.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
