"""The gradient of a step however it is split, and what the trainer logs."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tiny_training import (
    MIX,
    T,
    arguments,
    pair,
    start_ranks,
    tiny_sequences,
    train,
)
from torch import Tensor
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

from regrow.data.sequences import IGNORED, Sequences
from regrow.errors import UserError
from regrow.runtime.progress import Progress
from regrow.training import objective
from regrow.training.callbacks import MetricsWriter, ProgressCallback
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.trainer import DistillTrainer


def slow_gradients(
    sequences: Sequences, mix: LossWeights = MIX, **overrides: Any
) -> dict[str, Tensor]:
    """∂/∂weights of Σ loss ÷ scored tokens in float64: each document alone, full logits."""
    student, teacher = pair(torch.float64, **overrides)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, positions, labels in zip(
        sequences.input_ids, sequences.position_ids, sequences.labels, strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in pairwise(starts):
            document = ids[None, begin:end]
            log_q, log_p, log_q_1 = (
                (model(document).logits[0] / t).log_softmax(-1)
                for model, t in (
                    (student, mix.temperature),
                    (teacher.model, mix.temperature),
                    (student, 1.0),
                )
            )
            for t in range(begin, end - 1):
                label = int(labels[t + 1])
                if label == IGNORED:
                    continue
                at = t - begin
                kl = (log_p[at].exp() * (log_p[at] - log_q[at])).sum()
                total = total + mix.weights["forward_kl"] * mix.temperature**2 * kl
                total = total - mix.weights["cross_entropy"] * log_q_1[at, label]
                count += 1
    (total / count).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error (Frobenius) over the tensors."""
    assert actual.keys() == expected.keys()
    return max(
        float((actual[name].double() - exact).norm() / exact.norm())
        for name, exact in expected.items()
    )


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    return {name: value.double() for name, value in slow_gradients(tiny_sequences()).items()}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gradient_is_the_same_however_the_step_is_split(
    tmp_path: Path, exact: dict[str, Tensor], batch_size: int, accumulation: int
) -> None:
    _, watch = train(tmp_path, batch_size, accumulation)
    assert error(watch.gradients, exact) < 1e-5


def test_logged_loss_is_the_mean_per_scored_token(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, 2, 4)
    student, teacher = pair(torch.float64)
    student.train()  # in eval mode it would be measured at temperature 1
    undo = bind_loss(student, teacher, MIX)
    batch = next(iter(tiny_sequences().batches(8)))
    with torch.no_grad():
        outputs = student(**batch)
    undo()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(float(outputs["loss"] / outputs["tokens"]), rel=1e-3)


def _train_share(rank: int, folder: str, share: str) -> None:
    """One rank's share of the same step, by every split into micro-batches."""
    sequences, accumulation = int(share), 1
    while accumulation <= sequences:
        name = f"{rank}-{accumulation}"
        trainer, watch = train(
            Path(folder) / name, sequences // accumulation, accumulation, ddp_backend="gloo"
        )
        weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
        assert len(watch.storages) < len(weights) / 4  # gradients are views of DDP's buckets
        torch.save((watch.gradients, weights), Path(folder) / f"{name}.pt")
        accumulation *= 2


def _saved_by_time(rank: int, folder: str) -> None:
    """Two runs, in each of which the clock of one rank alone asks for a checkpoint."""
    for late in (0, 1):
        student, teacher = pair()
        out = Path(folder) / f"late-{late}"
        fields = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 1}
        trainer = DistillTrainer(
            model=student,
            args=arguments(out, max_steps=3, ddp_backend="gloo", **fields),
            train_dataset=tiny_sequences(),
            save_seconds=0 if rank == late else math.inf,
        )
        bind_loss(student, teacher, MIX)
        trainer.train()


def test_the_clock_of_the_first_rank_decides_when_all_write_a_checkpoint(tmp_path: Path) -> None:
    start_ranks(2, _saved_by_time, str(tmp_path))
    for late, steps in ((0, {1, 2, 3}), (1, {3})):
        saved = {int(path.name.split("-")[1]) for path in (tmp_path / f"late-{late}").iterdir()}
        assert saved == steps


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradient_and_the_weights_of_one_process(
    tmp_path: Path, exact: dict[str, Tensor], world: int
) -> None:
    start_ranks(world, _train_share, str(tmp_path), str(8 // world))
    alone, _ = train(tmp_path / "alone", 8, 1)
    files = sorted(tmp_path.glob("*.pt"))
    assert len(files) == world * {2: 3, 4: 2}[world]
    for path in files:
        gradients, weights = torch.load(path)
        assert error(gradients, exact) < 1e-5
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_checkpointed_activations_give_the_gradient_and_leave_the_head_alone(
    tmp_path: Path, exact: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {"head": 0, "block": 0}
    loss, sequence = objective.head_loss, LlamaMLP.forward

    def counted_loss(*arguments: Any, **options: Any) -> Any:
        runs["head"] += 1
        return loss(*arguments, **options)

    def counted_sequence(self: LlamaMLP, x: Tensor) -> Tensor:
        runs["block"] += self.training
        return sequence(self, x)

    monkeypatch.setattr(objective, "head_loss", counted_loss)
    monkeypatch.setattr(LlamaMLP, "forward", counted_sequence)
    fields = {"activation_checkpointing_kwargs": {"use_reentrant": False}}
    _, watch = train(tmp_path, 4, 2, activation_checkpointing=True, **fields)
    assert error(watch.gradients, exact) < 1e-5
    assert runs == {"head": 2, "block": 2 * 2 * 2}  # two micro-batches of two blocks, twice each


def test_held_out_figures_are_means_over_all_scored_tokens(tmp_path: Path) -> None:
    """Not means of batch means: 5 blocks in batches of 2, with unequal numbers of tokens."""
    student, teacher = pair(torch.float64)
    sequences = tiny_sequences(5, seed=4)
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, per_device_eval_batch_size=2),
        eval_dataset=sequences,
    )
    undo = bind_loss(student, teacher, LossWeights(MIX.weights))
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = student(**next(sequences.batches(5)))
    undo()
    for name, part in outputs["parts"].items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(part / outputs["tokens"]), rel=1e-9)


@pytest.mark.parametrize("weights", [{"cross_entropy": 1.0}, {"reverse_kl": 0.5, "jsd": 0.5}])
def test_the_forward_kl_is_measured_when_it_does_not_teach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: dict[str, float]
) -> None:
    """By evaluation alone: no step computes it, nor runs a teacher that nothing reads."""
    student, teacher = pair(torch.float64)
    batch = next(tiny_sequences(5, seed=4).batches(5))
    trainer = DistillTrainer(
        model=student, args=arguments(tmp_path), eval_dataset=tiny_sequences(5, seed=4)
    )
    bind_loss(student, teacher, LossWeights({"forward_kl": 1.0}))
    expected = trainer.evaluate()
    bind_loss(student, teacher, LossWeights({"forward_kl": 1.0}, temperature=3.0))
    assert trainer.evaluate() == expected  # the true KL, whatever softens it in training
    undo = bind_loss(student, teacher, LossWeights(weights))
    measured = trainer.evaluate()
    assert list(measured) == ["eval_forward_kl", *(f"eval_{name}" for name in weights)]
    assert measured["eval_forward_kl"] == pytest.approx(expected["eval_forward_kl"], rel=1e-12)
    evaluated = student(**batch)
    student.train()
    if list(weights) == ["cross_entropy"]:
        monkeypatch.setattr(teacher, "hidden", lambda *_, **__: pytest.fail("the teacher runs"))
    trained = student(**batch)
    undo()
    assert list(trained["parts"]) == list(weights)
    torch.testing.assert_close(trained["loss"], evaluated["loss"])


def test_metrics_have_a_row_for_each_step(tmp_path: Path) -> None:
    student, teacher = pair()
    trainer = DistillTrainer(
        model=student,
        args=arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            per_device_train_batch_size=2,
        ),
        train_dataset=tiny_sequences(),
        eval_dataset=tiny_sequences(4, seed=9),
    )
    journal = tmp_path / "metrics.jsonl"
    trainer.add_callback(MetricsWriter((journal,), "03-distill", 2 * T))
    progress = Progress("distill", 4 * 2 * T, "tokens")
    trainer.add_callback(ProgressCallback(2 * T, progress))
    bind_loss(student, teacher, MIX)
    trainer.train()
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    assert [row["tokens"] for row in losses] == [48, 96, 144, 192]
    assert {row["stage"] for row in rows} == {"03-distill"}
    assert all(row["seconds"] >= 0 and row["learning_rate"] == 0.05 for row in losses)
    heldout = [row for row in rows if "heldout_kl" in row]
    assert [row["step"] for row in heldout] == [2, 4]
    assert all("heldout_cross_entropy" in row and "eval_loss" not in row for row in heldout)
    assert progress.done == 192


def test_metrics_rows_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    """Rows of a run killed before its first checkpoint, a torn one too; other stages' rows stay."""
    journal = tmp_path / "metrics.jsonl"
    old = [{"stage": name, "step": n, "loss": 9.0} for n in range(3) for name in ("x", "y")]
    text = "".join(json.dumps(row) + "\n" for row in old)
    journal.write_text(text + '{"stage": "x", "ste')
    student, teacher = pair()
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_on_start=True),
        train_dataset=tiny_sequences(),
        eval_dataset=tiny_sequences(4),
    )
    trainer.add_callback(MetricsWriter((journal,), "x", T))
    bind_loss(student, teacher, MIX)
    trainer.train()
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [row for row in rows if row["stage"] == "y"] == [
        row for row in old if row["stage"] == "y"
    ]
    kinds = [(row["step"], "loss" in row) for row in rows if row["stage"] == "x"]
    assert kinds == [(0, False), (1, True), (1, False), (2, True), (2, False)]


@pytest.mark.parametrize(("warmup", "total"), [(1, 1), (1, 6), (3, 6), (6, 6)])
def test_warm_up_reaches_the_peak_in_its_last_step_and_no_rate_is_zero(
    tmp_path: Path, warmup: int, total: int
) -> None:
    """Linear over the warm-up, then a cosine that would end one step after the last."""
    student, teacher = pair()
    trainer = DistillTrainer(
        model=student,
        args=arguments(
            tmp_path,
            max_steps=total,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1},
            warmup_steps=warmup,
        ),
        train_dataset=tiny_sequences(),
    )
    rates = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **given: Any) -> None:
            rates.append(given["optimizer"].param_groups[0]["lr"] / 0.05)

    trainer.add_callback(Rates())
    bind_loss(student, teacher, MIX)
    trainer.train()
    rising = [(step + 1) / warmup for step in range(warmup)]
    rest = total - warmup
    falling = [0.55 + 0.45 * math.cos(math.pi * n / (rest + 1)) for n in range(1, rest + 1)]
    assert rates == pytest.approx(rising + falling, rel=1e-6)
    assert rates[warmup - 1] == pytest.approx(1.0)


def test_a_loss_that_is_nan_is_reported_with_its_step(tmp_path: Path) -> None:
    student, teacher = pair()
    trainer = DistillTrainer(
        model=student, args=arguments(tmp_path, max_steps=3), train_dataset=tiny_sequences()
    )

    class Spoil(TrainerCallback):
        def on_step_end(self, *_: Any, **given: Any) -> None:
            with torch.no_grad():
                next(given["model"].parameters()).fill_(float("nan"))

    trainer.add_callback(Spoil())
    bind_loss(student, teacher, MIX)
    with pytest.raises(UserError, match="the loss became nan at step 2"):
        trainer.train()
