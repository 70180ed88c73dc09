"""Frozen first layers: they are not trained, and the teacher's outputs of them are reused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_distillation import CONFIG, OPTIONS, data, held_out, kl_of
from tiny_folders import write_model, write_text
from tiny_models import tiny_model
from tiny_training import MIX, tiny_sequences
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families, plugins
from regrow.checkpoint import Checkpoint, save
from regrow.errors import UserError
from regrow.stages.distill import teacher as teacher_module
from regrow.stages.distill.stage import distill
from regrow.training import frozen_layers
from regrow.training.features import FeatureLosses, LayerMapping
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher

FEATURE_LOSSES = FeatureLosses({"hidden": 0.5}, LayerMapping.of_same(3))


def models(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A student whose first two of three or four blocks and embedding are the teacher's."""
    student, teacher = tiny_model(name, torch.float32, seed=1), tiny_model(name, torch.float32)
    student.get_input_embeddings().load_state_dict(teacher.get_input_embeddings().state_dict())
    for n in range(2):
        student_layer, teacher_layer = student.base_model.layers[n], teacher.base_model.layers[n]
        student_layer.load_state_dict(teacher_layer.state_dict())
    return student.train(), teacher


def step(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[float, dict[str, Tensor]]:
    undo = bind_loss(student, Teacher(teacher), MIX, FEATURE_LOSSES)
    student.zero_grad()
    loss = student(**next(iter(tiny_sequences().batches(8))))["loss"]
    loss.backward()
    undo()
    grads = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads


@pytest.mark.parametrize("name", plugins.names(families.__name__))
def test_shared_layers_run_once_and_give_the_same_result(name: str) -> None:
    student, teacher = models(name)
    loss, all_runs = step(student, teacher)
    frozen_layers.freeze(student, 2)
    frozen_loss, frozen = step(student, teacher)
    assert frozen_layers.same(student, teacher, 2)
    assert not frozen_layers.same(student, teacher, 3)
    shared = frozen_layers.SharedPrefix(student, teacher, 2, all_layers=True)
    runs: list[str] = []
    for n, block in enumerate(student.base_model.layers):
        block.self_attn.register_forward_hook(lambda *_, n=n: runs.append(f"student {n}"))
    shared_loss, shared_runs = step(student, teacher)
    assert set(runs) == {f"student {n}" for n in range(2, len(student.base_model.layers))}
    assert frozen_loss == loss
    assert shared_loss == pytest.approx(loss, rel=1e-6)
    trained = {key for key, p in student.named_parameters() if p.requires_grad}
    assert frozen.keys() == shared_runs.keys() == trained
    assert not any(".0." in key or ".1." in key or "embed" in key for key in shared_runs)
    for key, gradient in shared_runs.items():
        torch.testing.assert_close(frozen[key], all_runs[key])
        torch.testing.assert_close(gradient, all_runs[key], rtol=1e-5, atol=1e-6)
    shared.close()
    runs.clear()
    assert step(student, teacher)[0] == loss
    assert "student 0" in runs


def test_first_layers_with_other_weights_are_not_shared() -> None:
    rope = {"rope_theta": 5.0, "rope_type": "default"}
    for changes in ({"rms_norm_eps": 1e-3}, {"rope_parameters": rope}):
        student, teacher = models("llama")
        other = tiny_model("llama", torch.float32, **changes)
        other.load_state_dict(student.state_dict())
        assert frozen_layers.same(student, teacher, 1)
        assert not frozen_layers.same(other, teacher, 1)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_student_cut_in_later_layers_keeps_its_first_layers(
    tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "text.jsonl")
    teacher = write_model(tmp_path / "teacher", dtype=torch.bfloat16, num_hidden_layers=4)
    cut = teacher.model(torch.bfloat16)
    del cut.base_model.layers[2]
    cut.config.num_hidden_layers = 3
    student = save(cut, tmp_path / "student", teacher)
    ran: list[str] = []
    monkeypatch.setattr(teacher_module, "say", ran.append)
    changes = {"freeze_layers": 2, "adapter": adapter, "learning_rate": 3e-3}
    config = CONFIG.model_copy(update=changes)
    arguments = (student, teacher.folder, data(tmp_path), tmp_path / "out")
    out = distill(*arguments, config, OPTIONS)
    assert "distill: the first 2 layers are the teacher's and run once for both models" in ran
    before, after = Checkpoint(student), Checkpoint(out)
    for name in before.names():
        fixed = ".2." not in name and "model.norm" not in name
        fixed = fixed or (adapter == "lora" and "norm" in name)
        assert torch.equal(before.tensor(name), after.tensor(name)) == fixed, name
    losses = held_out(out)
    assert losses[12] < 0.9 * losses[0]
    assert kl_of(out, tmp_path) == pytest.approx(min(losses[n] for n in losses if n), rel=0.03)
    with pytest.raises(UserError, match="freeze_layers 3: allowed are 0 to 2"):
        distill(*arguments, config.model_copy(update={"freeze_layers": 3}), OPTIONS)
