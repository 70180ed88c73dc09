"""The hidden-state signal against plain hooks on the blocks, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_distillation import CONFIG, OPTIONS, data, figures, rows_of, write_place
from tiny_models import random_plan, tiny_model
from tiny_training import blocks_of
from torch import Tensor
from transformers import PreTrainedModel

from regrow.errors import UserError
from regrow.plan import Plan
from regrow.stages.distill import distill
from regrow.stages.prune.cut import cut_model
from regrow.training.head import Mix
from regrow.training.signals.hidden import Hidden, LayerMap
from regrow.training.teacher import Teacher, scored
from regrow.training.trainer import bind_loss

KL = Mix({"forward_kl": 1.0})
KEPT = [0, 2, 3, 5]
# What stands before each kept layer in the teacher: blocks 1, 2 and 4.
PAIRS = ((0, 1), (1, 2), (2, 4))


def family(model_type: str, **after: int | list[int]) -> tuple[PreTrainedModel, Teacher, Plan]:
    """A student cut from a teacher of six layers, shaken a little."""
    sliding = [*["sliding_attention"] * 2, "full_attention"] * 2
    special = {"layer_types": sliding} if model_type == "gemma3_text" else {}
    model = tiny_model(model_type, torch.float64, seed=4, num_hidden_layers=6, **special)
    plan = random_plan(model.config.to_dict(), layers=KEPT, **after)
    student = cut_model(model, plan)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in student.parameters():
            shape = parameter.shape
            parameter.add_(0.02 * torch.randn(shape, generator=draw, dtype=torch.float64))
    return student, Teacher(model), plan


def block_outputs(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, output: found.append(output))
        for layer in model.base_model.layers
    ]
    model.base_model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    )
    for handle in handles:
        handle.remove()
    return found


def slow(
    student: PreTrainedModel, teacher: Teacher, plan: Plan, batch: dict[str, Tensor]
) -> Tensor:
    """Token by token."""
    ours, theirs = block_outputs(student, batch), block_outputs(teacher.model, batch)
    channels = list(range(plan.before["hidden"])) if plan.hidden is None else plan.hidden
    total = torch.zeros((), dtype=torch.float64)
    for b, row in enumerate(scored(batch)):
        for t in row.nonzero().flatten().tolist():
            for s, taught in PAIRS:
                want = theirs[taught][b, t, channels].detach()
                error = (ours[s][b, t] - want).square().sum() / want.square().sum()
                total = total + error / len(PAIRS)
    return total


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("after", [{}, {"hidden": 36}, {"mlp": 20}])
def test_value_and_gradient(model_type: str, after: dict[str, int]) -> None:
    student, teacher, plan = family(model_type, **after)
    batch = next(blocks_of(4).batches(4))
    undo = bind_loss(student, teacher, KL)
    plain = student(**batch)["loss"]
    undo()
    expected = slow(student, teacher, plan, batch)
    (plain + 3.0 * expected).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    student.zero_grad()
    undo = bind_loss(student, teacher, KL, Hidden(3.0, LayerMap.of(plan)))
    found = student(**batch)
    undo()
    assert LayerMap.of(plan).layers == PAIRS
    torch.testing.assert_close(found["parts"]["hidden"], expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found["loss"], plain + 3.0 * expected, rtol=1e-12, atol=0)
    found["loss"].backward()
    for name, parameter in student.named_parameters():
        # The models' own norms are in float32, and round what comes back through them.
        difference = (parameter.grad - gradients[name]).norm()
        assert float(difference) <= 1e-6 * float(gradients[name].norm()), name


def test_nothing_to_learn_from_oneself_and_none_scored() -> None:
    model = tiny_model("llama", torch.float64, seed=4, num_hidden_layers=3)
    plan = random_plan(model.config.to_dict())
    student = cut_model(model, plan)
    undo = bind_loss(student, Teacher(model), KL, Hidden(1.0, LayerMap.of(plan)))
    batch = next(blocks_of(4).batches(4))
    assert float(student(**batch)["parts"]["hidden"]) == 0
    batch["labels"].fill_(-100)
    found = student(**batch)
    found["loss"].backward()
    assert float(found["loss"].detach()) == 0
    undo()


def test_parts_of_a_batch_add_up() -> None:
    """So that accumulation and ranks share one mean."""
    student, teacher, plan = family("llama")
    undo = bind_loss(student, teacher, KL, Hidden(2.0, LayerMap.of(plan)))
    whole = student(**next(blocks_of(8).batches(8)))["loss"]
    parts = [student(**batch)["loss"] for batch in blocks_of(8).batches(2)]
    undo()
    torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=0)


def test_through_the_stage(tmp_path: Path) -> None:
    """It is measured, and comes down with the signal; the KL alone leaves it where it is."""
    place = write_place(tmp_path / "place")
    ends = []
    for weight in (1e-6, 20.0):
        config = CONFIG.model_copy(update={"hidden_weight": weight})
        out = tmp_path / str(weight)
        distill(place / "pruned", place / "teacher", data(place), out, config, OPTIONS)
        rows = [row["heldout_hidden"] for row in rows_of(out) if "heldout_hidden" in row]
        ends.append(rows[-1] / rows[0])
        assert figures(out)["held-out KL"] > 0
    assert ends[1] < 0.95 < ends[0], ends


def test_a_student_of_another_descent_is_refused(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    config = CONFIG.model_copy(update={"hidden_weight": 1.0})
    for student in ("stranger", "config.json"):
        with pytest.raises(UserError, match="of a student that was cut from"):
            distill(place / student, place / "teacher", data(place), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
