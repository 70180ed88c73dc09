"""Distillation with rounded weights: what is computed is what rounding gives afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from tiny_distillation import CONFIG, OPTIONS, data, figures, kl_of
from tiny_folders import write_model, write_text
from tiny_models import random_plan, tiny_ids, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from regrow import DistillConfig, QuantizeConfig, UserError, quantize
from regrow.pruning.config import PruneConfig
from regrow.quantization.fake_quantize import bind_rounding, grid_of
from regrow.quantization.formats import find_scheme
from regrow.stages.distill.stage import distill
from regrow.stages.prune.stage import prune

SCHEME = "int4-g32"
ROUND = QuantizeConfig(scheme=SCHEME, method="rtn")
AWARE = CONFIG.model_copy(update={"fake_quantize": SCHEME})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As for any distillation, but of widths that groups of 32 fit."""
    place = tmp_path_factory.mktemp("place")
    write_text(place / "text.jsonl")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "head_dim": 16}
    teacher = write_model(place / "teacher", dtype=torch.bfloat16, num_hidden_layers=2, **sizes)
    plan = random_plan(teacher.config, teacher.fingerprint, mlp=64)
    plan.write(place / "plan.json")
    prune(teacher, place / "pruned", PruneConfig(plan=str(place / "plan.json"), repair=False))
    return place


@pytest.fixture(scope="module")
def aware(place: Path) -> Path:
    return distill(
        place / "pruned", place / "teacher", data(place), place / "aware", AWARE, OPTIONS
    )


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_forward_pass_is_that_of_rounded_weights(name: str) -> None:
    model, twin = (tiny_model(name, torch.float32, tie_word_embeddings=False) for _ in range(2))
    for path, module in twin.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            grid = grid_of(module.weight, find_scheme(SCHEME))
            module.weight.data = grid.nearest(module.weight.data)
    settle = bind_rounding(model, find_scheme(SCHEME))
    assert torch.equal(model(tiny_ids()).logits, twin(tiny_ids()).logits)
    model(tiny_ids()).logits.square().sum().backward()
    twin(tiny_ids()).logits.square().sum().backward()
    for (path, fake), rounded in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(fake.grad, rounded.grad, msg=path)  # straight through
    settle()
    assert all("forward" not in vars(module) for module in model.modules())
    for (path, fake), rounded in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(fake, rounded), path


def test_the_grid_stays_while_the_weights_move() -> None:
    model = tiny_model("llama", torch.float32)
    linear = model.model.layers[0].mlp.down_proj
    grid = grid_of(linear.weight, find_scheme(SCHEME))
    settle = bind_rounding(model, find_scheme(SCHEME))
    linear.weight.data *= 1.3
    settle()
    assert torch.equal(linear.weight, grid.nearest(linear.weight))
    assert not torch.equal(
        grid_of(1.3 * linear.weight, find_scheme(SCHEME)).scale_RG, grid.scale_RG
    )


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_rounding_the_student_gives_what_was_trained(aware: Path, place: Path, method: str) -> None:
    """What is written lies on the grid, in float32; quantizing keeps it, to the bit."""
    trained = load_file(aware / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    config = ROUND.model_copy(update={"method": method, "samples": 8})
    out = quantize(aware, place / f"rounded-{method}", config, data(place), OPTIONS)
    small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    small(tiny_ids())  # unpacks the weights
    for path, module in small.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            assert torch.equal(module.weight, trained[f"{path}.weight"]), path


def test_rounding_to_another_grid_is_warned_about(
    aware: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = "was trained for rounding to int4-g32; rounding it to int8 loses the gain of that"
    quantize(aware, place / "other", QuantizeConfig(scheme="int8", method="rtn"))
    assert message in capsys.readouterr().err
    quantize(aware, place / "same", ROUND)
    assert "was trained for rounding" not in capsys.readouterr().err


def test_held_out_figures_are_those_of_the_rounded_student(aware: Path, place: Path) -> None:
    out = quantize(aware, place / "rounded", ROUND)
    assert kl_of(out, place) == pytest.approx(figures(aware)["held-out KL"], rel=0.03)  # bf16


def test_training_on_the_grid_beats_rounding_after_training(aware: Path, place: Path) -> None:
    """At equal tokens and equal bits."""
    folders = (place / "pruned", place / "teacher", data(place))
    plain = distill(*folders, place / "plain", CONFIG, OPTIONS)
    kls = [
        kl_of(quantize(folder, place / f"{folder.name}-4", ROUND), place)
        for folder in (aware, plain)
    ]
    assert kls[0] < kls[1]
    assert kl_of(plain, place) < kls[1]


def test_bad_fake_quantize_settings_are_refused(tmp_path: Path, place: Path) -> None:
    with pytest.raises(
        ValidationError, match="fp8 also rounds inputs; give int8 or a kind of int4"
    ):
        DistillConfig(fake_quantize="fp8")
    with pytest.raises(ValidationError, match="no scheme named 'int5'"):
        DistillConfig(fake_quantize="int5")
    mixture = write_model(tmp_path / "m", "mixtral", num_local_experts=4, head_dim=8)
    with pytest.raises(UserError, match=r"int4-g32: not for a mixture of experts \(mixtral\)"):
        distill(mixture, mixture, data(place), tmp_path / "out", AWARE, OPTIONS)
