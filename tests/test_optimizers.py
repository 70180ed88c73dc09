"""AdamW with moments in 8 bits, and with bfloat16 weights: against AdamW, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_distill_ranks import weights
from tiny_distillation import CONFIG, OPTIONS, data, figures, held_out, rows_of, write_place
from tiny_job import LENGTH, refused, write_model, write_text
from torch import nn

from regrow.checkpoint import load
from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import open_student
from regrow.training import optimizers
from regrow.training.callbacks import ProgressCallback
from regrow.training.optimizers import KINDS
from regrow.training.trainer import DistillTrainer

SMALLER = ("adamw_8bit", "adamw_bf16")


def _config(optimizer: str, **fields: Any) -> DistillConfig:
    return CONFIG.model_copy(update={"optimizer": optimizer, **fields})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def _distill(place: Path, out: Path, config: DistillConfig, options: Options = OPTIONS) -> Path:
    return distill(place / "pruned", place / "teacher", data(place), out, config, options)


@pytest.fixture(scope="module")
def plain(place: Path) -> dict[int, float]:
    """Held-out KL by step, by AdamW in float32."""
    return held_out(_distill(place, place / "adamw", _config("adamw")))


@pytest.mark.parametrize("name", SMALLER)
def test_learns_like_adamw_and_continues_after_a_kill(
    place: Path, plain: dict[int, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The KL falls as AdamW's does, and a killed run ends with equal weights."""
    pytest.importorskip("torchao")
    dtypes, quantized = set(), []
    save = DistillTrainer._save_optimizer_and_scheduler

    def watch(self: DistillTrainer, folder: str) -> None:
        dtypes.update(parameter.dtype for parameter in self.student.parameters())
        moments = [state["exp_avg"] for state in self.optimizer.optimizer.state.values()]
        quantized.append(sum(type(each).__name__ == "OptimState8bit" for each in moments))
        save(self, folder)

    monkeypatch.setattr(DistillTrainer, "_save_optimizer_and_scheduler", watch)
    whole = _distill(place, place / name, _config(name))
    assert dtypes == {KINDS[name].dtype}
    assert all(quantized)
    found, last = held_out(whole), max(plain)
    fall = plain[0] - plain[last]
    assert fall > 0.05 * plain[0]
    assert found[0] == pytest.approx(plain[0], rel=1e-2)
    assert found[last] == pytest.approx(plain[last], abs=0.1 * fall)

    began = ProgressCallback.on_step_begin

    def stop(self: ProgressCallback, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt
        began(self, args, state, control, **given)

    out = place / f"{name}-killed"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressCallback, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            _distill(place, out, _config(name))
    _distill(place, out, _config(name))
    assert [row["step"] for row in rows_of(out)] == [row["step"] for row in rows_of(whole)]
    expected = weights(whole)
    assert all(torch.equal(value, expected[key]) for key, value in weights(out).items())
    assert figures(out)["held-out KL"] == figures(whole)["held-out KL"]


def test_rates_of_parts_and_projections_also_work(place: Path) -> None:
    """Groups with rates of their own, and the projections of a feature loss."""
    pytest.importorskip("torchao")
    config = _config(
        "adamw_8bit",
        attention_rate=0.5,
        embedding_rate=2.0,
        feature_losses={"embeddings": 1.0},
        tokens=4 * 128,
    )
    out = distill(place / "stranger", place / "teacher", data(place), place / "s", config, OPTIONS)
    found = held_out(out)
    assert found[max(found)] < found[0]


def test_random_weights_are_in_bfloat16_and_rope_is_not(place: Path) -> None:
    teacher = load(place / "teacher")
    model = open_student(place / "config.json", teacher).model(0, dtype=torch.bfloat16)
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16}
    assert {each.dtype for each in model.buffers()} == {torch.float32}


def test_moments_have_the_counted_bytes() -> None:
    torchao = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(torch.randn(64, 256))
    weight.grad = torch.randn_like(weight)
    optimizer = torchao.AdamW8bit([weight])
    optimizers.run_eagerly_on_cpu(optimizer)
    optimizer.step()
    state = optimizer.state[weight]
    tables = 2 * 256 * 4  # one for each moment of a tensor, whatever its size
    stored = sum(
        tensor.nbytes
        for moment in (state["exp_avg"], state["exp_avg_sq"])
        for tensor in (moment.codes, moment.scale, moment.qmap)
    )
    assert stored - tables == KINDS["adamw_8bit"].moment_bytes * weight.numel()


def test_small_steps_are_not_lost_in_bfloat16() -> None:
    """A hundredth of a unit in the last place, 100 times: rounding to nearest would stay at 1."""
    torchao = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = torchao.AdamW8bit(
        [weight], lr=2**-8 * 1e-2, weight_decay=0.0, bf16_stochastic_round=True
    )
    optimizers.run_eagerly_on_cpu(optimizer)
    torch.manual_seed(0)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # The mean of 4,096 weights is 1 - 2⁻⁸, with a standard error of about 2⁻⁸ / 64.
    assert 1 - float(weight.detach().float().mean()) == pytest.approx(2**-8, rel=0.1)


def test_what_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(name: str, adapter: str = "none", scheme: str | None = None, **fields: Any) -> str:
        with pytest.raises(UserError) as caught:
            optimizers.require(name, Options(**fields), adapter, scheme)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    monkeypatch.setattr(optimizers, "is_torchao_available", lambda: True)
    optimizers.require("adamw_8bit", Options(), "lora", "int4")
    assert "with adapter lora" in said("adamw_bf16", "lora")
    assert "with fake_quantize int4" in said("adamw_bf16", scheme="int4")
    optimizers.require("adamw_8bit", Options(sharding="hsdp"), "none", None)
    assert "with sharding fsdp:" in said("adamw_bf16", sharding="fsdp")
    assert "with sharding fsdp_offload" in said("adamw_8bit", sharding="fsdp_offload")
    assert "with deepspeed" in said("adamw_8bit", deepspeed="x.json")


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(optimizers, "is_torchao_available", lambda: False)
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    command = ["distill", model, "--teacher", model, "--data", text, "--sequence-length", LENGTH]
    out = tmp_path / "out"
    said = refused(capsys, *command, "--optimizer", "adamw_8bit", "--out", out)
    assert "optimizer adamw_8bit needs torchao 0.15 or later" in said
    assert "pip install 'regrow[optim]'" in said
    assert not out.exists()
