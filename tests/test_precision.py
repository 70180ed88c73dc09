"""The data type of products, and all stages on a machine that has none in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import call, command, recipe_fields, write_job, write_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from regrow import load
from regrow.cost import matmul_rate
from regrow.errors import UserError
from regrow.runtime import precision

CPU = torch.device("cpu")


def test_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "auto"):
        monkeypatch.setenv(precision.PRECISION, value)
        for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
            monkeypatch.setattr(precision, "_has_bfloat16", lambda device, has=has: has)
            assert precision.half(CPU) == dtype


def test_a_gpu_before_ampere_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a GPU says that it supports bfloat16, which it emulates."""
    monkeypatch.delenv(precision.PRECISION)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert precision.half(torch.device("cuda")) == torch.float32


def test_the_variable_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv(precision.PRECISION, name)
        assert precision.half(CPU) == getattr(torch, name)
    monkeypatch.setenv(precision.PRECISION, "float16")
    with pytest.raises(UserError, match="REGROW_PRECISION=float16: give bfloat16 or float32"):
        precision.half(CPU)


class Products(TorchDispatchMode):
    """Collects the data types of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default:
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def test_times_are_told_for_the_type_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 a CPU without such products is a hundred times as slow as the stages are."""
    for name in ("bfloat16", "float32"):
        monkeypatch.setenv(precision.PRECISION, name)
        with Products() as products:
            assert matmul_rate.__wrapped__() > 0
        assert products.dtypes == {getattr(torch, name)}


def test_stages_compute_in_float32_and_store_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(precision.PRECISION, "float32")
    place = write_job(tmp_path)
    recipe = write_recipe(
        place / "recipe.yaml", recipe_fields(place / "model", place / "text.jsonl")
    )
    call("run", recipe, "--out", place / "run")
    stages = place / "run" / "stages"
    for name in ("02-prune-repaired", "03-distill"):
        assert load(stages / name).main_dtype == "bfloat16"
    distilled = json.loads((stages / "03-distill" / "manifest.json").read_text())
    assert "float32" in distilled["figures"][0]["convention"]
    call(*command("evaluate", place, place / "model", place / "evaluation"))
    figures = json.loads((place / "evaluation" / "evaluation.json").read_text())
    by_name = {row["name"]: row["convention"] for row in figures["figures"]["model"]}
    assert all("; float32" in by_name[name] for name in ("perplexity/heldout", "peak_memory"))


def test_a_repaired_weight_is_rounded_before_the_next_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a later layer is solved for is what the written model will give."""
    from regrow.pruning.repair import sequential

    monkeypatch.setenv(precision.PRECISION, "float32")
    put, kept = sequential.Sequential._put, []

    def noted(self: sequential.Sequential, module: torch.nn.Linear, *given: object) -> None:
        put(self, module, *given)  # type: ignore[arg-type]
        kept.append(module.weight.detach().clone())

    monkeypatch.setattr(sequential.Sequential, "_put", noted)
    place = write_job(tmp_path)
    call(*command("prune", place, place / "model", place / "small"))
    assert kept and all(weight.dtype == torch.float32 for weight in kept)
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in kept)
