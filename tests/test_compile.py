"""Blocks through torch.compile: the same numbers, the same file, and what does not go with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from tiny_distillation import CONFIG, OPTIONS, data, held_out, kl_of, write_place
from tiny_training import MIX, pair, tiny_sequences
from torch import Tensor

from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import check_compile, compile_layers
from regrow.training.objective import bind_loss

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler warns about its own parts

COMPILED = OPTIONS.model_copy(update={"torch_compile": True})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    """How many were made; those that fell back to plain torch are none."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def gradient(compiled: bool) -> Tensor:
    student, teacher = pair()
    if compiled:
        compile_layers(student, teacher, "whole")
    undo = bind_loss(student, teacher, MIX)
    batch = next(tiny_sequences().batches(4))
    student.train()(**{name: batch[name] for name in ("input_ids", "position_ids", "labels")})[
        "loss"
    ].backward()
    undo()
    gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return torch.cat(gradients)


def test_compiled_layers_give_the_same_gradient() -> None:
    plain = gradient(compiled=False)
    assert graphs() == 0
    compiled = gradient(compiled=True)
    assert graphs() >= 2  # of a student's block, and of a teacher's
    assert float((compiled - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.parametrize(
    ("frozen", "checkpointing"),
    [
        (1, False),
        pytest.param(0, False, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_a_distillation_with_compiled_layers_is_as_good_as_without(
    place: Path, frozen: int, checkpointing: bool
) -> None:
    """With the shared block left alone where one is frozen, and with activations made again."""
    config = CONFIG.model_copy(update={"tokens": 512, "freeze_layers": frozen})
    options = COMPILED.model_copy(update={"gradient_checkpointing": checkpointing})
    arguments = (place / "pruned", place / "teacher", data(place))
    plain = distill(*arguments, place / f"plain{frozen}", config, OPTIONS)
    assert graphs() == 0
    compiled = distill(*arguments, place / f"compiled{frozen}{checkpointing}", config, options)
    assert graphs() > 0
    assert torch._dynamo.utils.counters["recompile_limit"] == {}
    weights = [load_file(folder / "model.safetensors") for folder in (plain, compiled)]
    assert weights[0].keys() == weights[1].keys()
    # Fused products round less often: not the same numbers, but as near to those in float32.
    before, after = kl_of(place / "pruned", place), kl_of(compiled, place)
    assert held_out(compiled)[0] == pytest.approx(before, rel=0.03)
    assert held_out(compiled)[4] == pytest.approx(after, rel=0.03)
    assert after == pytest.approx(kl_of(plain, place), rel=0.02)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"feature_losses": {"hidden": 1.0}}, {}, "feature_losses"),
        ({"fake_quantize": "int8"}, {}, "fake_quantize int8"),
        ({"adapter": "lora"}, {}, "adapter lora"),
        ({}, {"deepspeed": "zero.json"}, "deepspeed"),
    ],
)
def test_options_that_exclude_compilation_are_refused(
    fields: dict[str, Any], options: dict[str, str], message: str
) -> None:
    config = DistillConfig.model_validate(fields)
    check_compile(config, Options.model_validate(options))
    compiled_options = Options.model_validate({**options, "torch_compile": True, "device": "cpu"})
    with pytest.raises(UserError, match=f"torch_compile with {message}: not supported"):
        check_compile(config, compiled_options)


def test_a_missing_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"torch_compile needs a C\+\+ compiler"):
        check_compile(CONFIG, COMPILED)
