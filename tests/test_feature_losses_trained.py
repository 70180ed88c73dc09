"""Feature losses in training: the balance, learned projections, resuming, ranks, what is logged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_cuda import CPU, CUDA, FakeCuda
from tiny_feature_losses import NAMES
from tiny_training import MIX, Watch, arguments, pair, start_ranks, tiny_sequences
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from regrow.training.features import (
    DECAY,
    MAIN,
    FeatureLosses,
    LayerMapping,
    LossBalancer,
    at_depths,
    give_attentions,
    needs_of,
)
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher
from regrow.training.trainer import DistillTrainer

STEPS = 4


def strangers(
    balance: bool, weight: float = 0.5, *names: str
) -> tuple[PreTrainedModel, Teacher, FeatureLosses]:
    """A student of another width and depth than its teacher, and every feature loss."""
    student, teacher = pair(num_hidden_layers=3)
    weights = dict.fromkeys(names or NAMES, weight)
    match = LayerMapping.by_depth(3, 3)
    match.project((48, 60), needs_of(weights), seed=0)
    match = match.read_at(at_depths(match.outputs, 3, (0.5,)))
    for model in (student, teacher.model):
        give_attentions(model)
    return student, teacher, FeatureLosses(weights, match, LossBalancer() if balance else None)


def train(
    folder: Path,
    balance: bool = True,
    split: tuple[int, int] = (4, 2),
    until: int = STEPS,
    resume: Path | None = None,
    **fields: Any,
) -> tuple[DistillTrainer, FeatureLosses, Watch]:
    student, teacher, feature_losses = strangers(balance)
    fields = {
        "per_device_train_batch_size": split[0],
        "gradient_accumulation_steps": split[1],
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 2,
        **fields,
    }
    trainer = DistillTrainer(
        model=student,
        args=arguments(folder, **fields),
        train_dataset=tiny_sequences(8 * STEPS),
        feature_losses=feature_losses,
    )
    trainer.add_callback(watch := Watch())
    if until < STEPS:
        trainer.add_callback(_Stop(until))
    undo = bind_loss(student, teacher, MIX, feature_losses)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    undo()
    return trainer, feature_losses, watch


class _Stop(Watch):
    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def state_of(trainer: DistillTrainer, feature_losses: FeatureLosses) -> dict[str, Tensor]:
    """Student and projections."""
    student = {name: p.detach() for name, p in trainer.student.named_parameters()}
    return {
        **student,
        **{name: p.detach() for name, p in feature_losses.mapping.projections.items()},
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One uninterrupted run with balance."""
    folder = tmp_path_factory.mktemp("whole")
    trainer, feature_losses, _ = train(folder)
    return {
        "folder": folder,
        "weights": state_of(trainer, feature_losses),
        "sums": feature_losses.balancer.sums if feature_losses.balancer else {},
        "log": trainer.state.log_history,
        "names": {name for name, _ in trainer.student.named_parameters()},
    }


def test_balance_factors_equal_hand_computed_values() -> None:
    """Weight × mean of the main loss ÷ mean of the feature loss; nothing before the first step."""
    balance = LossBalancer()
    assert balance.factor("hidden") == 0
    balance.update({MAIN: 2.0, "hidden": 8.0, "attention": 0.0})
    assert balance.factor("hidden") == pytest.approx(0.25)
    assert balance.factor("attention") == 0
    balance.update({MAIN: 1.0, "hidden": 1.0, "attention": 0.5})
    old, new = DECAY * (1 - DECAY), 1 - DECAY
    expected = (old * 2.0 + new * 1.0) / (old * 8.0 + new * 1.0)
    assert balance.factor("hidden") == pytest.approx(expected)
    balance.update({})  # a step in which nothing was scored
    assert balance.factor("hidden") == pytest.approx(expected)


@pytest.mark.parametrize("balanced", [False, True])
def test_factors_reach_the_loss(balanced: bool) -> None:
    student, teacher, feature_losses = strangers(balanced, 0.5)
    if feature_losses.balancer is not None:
        feature_losses.balancer.update(
            {MAIN: 3.0, **{name: 1.0 + n for n, name in enumerate(NAMES)}}
        )
    bind_loss(student, teacher, MIX, feature_losses)
    with torch.no_grad():
        outputs = student(**next(tiny_sequences().batches(8)))
    factors = {name: 3.0 / (1 + n) if balanced else 1.0 for n, name in enumerate(NAMES)}
    more = sum(0.5 * factors[name] * outputs["parts"][name] for name in NAMES)
    torch.testing.assert_close(outputs["loss"], outputs["main"] + more)


def test_every_feature_loss_is_logged(uninterrupted: dict[str, Any]) -> None:
    rows = [row for row in uninterrupted["log"] if "loss" in row]
    assert len(rows) == STEPS
    student, teacher, feature_losses = strangers(balance=True)
    bind_loss(student, teacher, MIX, feature_losses)
    student.train()
    with torch.no_grad():
        outputs = student(**next(tiny_sequences(8 * STEPS).batches(8)))
    for name in ("forward_kl", "cross_entropy", *NAMES):
        expected = float(outputs["parts"][name] / outputs["tokens"])
        assert rows[0][name] == pytest.approx(expected, rel=1e-4), name


def test_student_and_projections_learn(uninterrupted: dict[str, Any]) -> None:
    first, *_, last = [row for row in uninterrupted["log"] if "loss" in row]
    for name in NAMES:
        assert last[name] < first[name], name


def test_a_step_is_the_same_however_it_is_split(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    trainer, feature_losses, _ = train(tmp_path, split=(8, 1), save_strategy="no")
    for name, value in state_of(trainer, feature_losses).items():
        torch.testing.assert_close(value, uninterrupted["weights"][name], rtol=1e-2, atol=1e-4)
    assert feature_losses.balancer is not None
    assert feature_losses.balancer.sums == pytest.approx(uninterrupted["sums"], rel=1e-3)


def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """To the bit: weights, projections, their optimizer state, the balance."""
    train(tmp_path, until=2)
    trainer, feature_losses, _ = train(tmp_path, resume=tmp_path / "checkpoint-2")
    assert trainer.state.global_step == STEPS
    for name, value in state_of(trainer, feature_losses).items():
        assert torch.equal(value, uninterrupted["weights"][name]), name
    assert feature_losses.balancer is not None
    assert feature_losses.balancer.sums == uninterrupted["sums"]


def test_projections_are_trained_but_not_saved_with_the_model(
    uninterrupted: dict[str, Any],
) -> None:
    from safetensors import safe_open

    _, _, fresh = strangers(balance=False)
    assert len(fresh.mapping.projections) == 3
    for name, weight in fresh.mapping.projections.items():
        assert not torch.equal(weight, uninterrupted["weights"][name])
        assert name not in uninterrupted["names"]
    with safe_open(uninterrupted["folder"] / "checkpoint-4" / "model.safetensors", "pt") as file:
        assert set(file.keys()) <= uninterrupted["names"]
    state = torch.load(uninterrupted["folder"] / "checkpoint-4" / "feature_losses.pt")
    assert set(state) == {*fresh.mapping.projections, "balance"}


def test_gradient_of_the_projections_by_finite_differences() -> None:
    _, _, feature_losses = strangers(False, 0.5, "hidden", "hidden_cosine", "embeddings")
    student, teacher = pair(torch.float64, num_hidden_layers=3)
    for weight in feature_losses.projections():
        weight.data = weight.data.double()
    bind_loss(student, teacher, MIX, feature_losses)
    batch = next(tiny_sequences(4).batches(4))
    student(**batch)["loss"].backward()
    draw = torch.Generator().manual_seed(0)
    for weight in feature_losses.projections():
        step = torch.randn(weight.shape, generator=draw, dtype=torch.float64)
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                weight.add_(sign * 1e-6 * step)
                ends.append(float(student(**batch)["loss"]))
        with torch.no_grad():
            weight.add_(1e-6 * step)
        assert weight.grad is not None
        slope = float((weight.grad * step).sum())
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


def test_projections_are_on_the_device_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step mixes no devices, and the optimizer has the projections that were moved."""
    given = arguments(tmp_path)
    assert given.device == CPU  # which sets up what else depends on the device
    monkeypatch.setattr(TrainingArguments, "device", CUDA)
    with FakeCuda() as fake:
        student, teacher, feature_losses = strangers(False, 0.5, "hidden", "embeddings")
        teacher.model.to(CUDA)
        trainer = DistillTrainer(
            model=student,
            args=given,
            train_dataset=tiny_sequences(),
            feature_losses=feature_losses,
        )
        student.to(CUDA)
        optimizer = trainer.create_optimizer()
        bind_loss(student, teacher, MIX, feature_losses)
        batch = {key: value.to(CUDA) for key, value in next(tiny_sequences().batches(8)).items()}
        loss = student(**batch)["loss"]
        assert fake.is_there(loss)
        loss.backward()
        assert len(feature_losses.projections()) == 3
        trained = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for projection in feature_losses.projections():
            assert fake.is_there(projection)
            assert projection.grad is not None
            assert id(projection) in trained


def _train_share(rank: int, folder: str) -> None:
    trainer, feature_losses, _ = train(
        Path(folder) / str(rank), split=(2, 2), save_strategy="no", ddp_backend="gloo"
    )
    assert feature_losses.balancer is not None
    state = state_of(trainer, feature_losses), feature_losses.balancer.sums
    torch.save(state, Path(folder) / f"{rank}.pt")


def test_ranks_train_what_one_process_trains(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    start_ranks(2, _train_share, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
        torch.testing.assert_close(value, uninterrupted["weights"][name], rtol=1e-2, atol=1e-4)
    assert first[1] == second[1] == pytest.approx(uninterrupted["sums"], rel=1e-3)


def test_without_projections_no_file_is_written(tmp_path: Path) -> None:
    student, teacher, feature_losses = strangers(False, 0.5, "logit_lens")
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=tiny_sequences(),
        feature_losses=feature_losses,
    )
    bind_loss(student, teacher, MIX, feature_losses)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    assert not (tmp_path / "checkpoint-1" / "feature_losses.pt").exists()
