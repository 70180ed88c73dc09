"""What a training step scores, what it computes in, and what it leaves alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tiny_models import NAMES, tiny_model
from tiny_training import (
    MIX,
    Largest,
    T,
    Watch,
    arguments,
    pair,
    tiny_sequences,
    train,
)

from regrow.data.sequences import IGNORED, Sequences
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import final_hidden
from regrow.training.trainer import DistillTrainer


def test_position_t_is_scored_by_label_t_plus_1() -> None:
    student, teacher = pair(torch.float64)
    ids = torch.randint(4, 384, (1, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[0, 6] = 77
    log_q, log_p = (m(ids).logits[0, 5].log_softmax(-1) for m in (student, teacher.model))
    bind_loss(student, teacher, LossWeights({"forward_kl": 1.0, "cross_entropy": 0.0}))
    outputs = student(input_ids=ids, position_ids=torch.arange(9)[None], labels=labels)
    assert int(outputs["tokens"]) == 1
    kl = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(outputs["loss"], kl, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(outputs["parts"]["cross_entropy"], -log_q[77], rtol=1e-6, atol=1e-9)


def test_padding_and_prompts_count_for_nothing() -> None:
    """A padded block with a prompt gives what its answer alone gives, and no gradient beyond."""
    student, teacher = pair(torch.float64)
    bind_loss(student, teacher, MIX)
    sequence = tiny_sequences(3).select(range(2, 3))
    once = student(**next(sequence.batches(1)))
    padded = {name: torch.cat([x, x], 1) for name, x in next(sequence.batches(1)).items()}
    padded["labels"][:, T:] = IGNORED
    padded["position_ids"][:, T:] = torch.arange(T)
    twice = student(**padded)
    assert int(once["tokens"]) == int(twice["tokens"]) > 0
    torch.testing.assert_close(once["loss"], twice["loss"])
    padded["input_ids"][:, T:] = 9
    torch.testing.assert_close(student(**padded)["loss"], once["loss"])


@pytest.mark.parametrize("model_type", NAMES)
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    """Hidden states of a packed block are those of each document alone."""
    model = tiny_model(model_type, torch.float64)
    sequences = tiny_sequences(2, length=40)
    with torch.no_grad():
        packed = final_hidden(model, next(sequences.batches(2)))
        for row in range(2):
            starts = [*(sequences.position_ids[row] == 0).nonzero().flatten().tolist(), 40]
            for begin, end in pairwise(starts):
                alone = model.base_model(
                    sequences.input_ids[row : row + 1, begin:end], use_cache=False
                )
                expected = alone.last_hidden_state[0, : min(end, 39) - begin]
                torch.testing.assert_close(packed[row, begin:end], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_with_nothing_to_score_gives_zero(tmp_path: Path) -> None:
    sequences = tiny_sequences()
    nothing = torch.full_like(sequences.labels, IGNORED)
    sequences = Sequences(sequences.input_ids, sequences.position_ids, nothing, sequences.real)
    before = {name: p.clone() for name, p in pair()[0].named_parameters()}
    trainer, watch = train(tmp_path, 4, 2, sequences)
    assert trainer.state.log_history[0]["loss"] == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not watch.gradients[name].any()


def test_the_teacher_gets_no_gradient(tmp_path: Path) -> None:
    student, teacher = pair()
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    names = set(student.state_dict())
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=tiny_sequences(),
    )
    undo = bind_loss(student, teacher, MIX)
    trainer.train()
    assert set(student.state_dict()) == names
    assert not any(module is teacher.model for module in student.modules())
    assert student.training
    assert not any(module.training for module in teacher.model.modules())
    for name, parameter in teacher.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad
    undo()
    assert student(input_ids=torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 384)
    weights = sum(p.numel() * 4 for p in student.parameters())
    written = tmp_path / "checkpoint-1" / "model.safetensors"
    assert weights <= written.stat().st_size < weights + 10_000
    teacher.model.train()
    with pytest.raises(AssertionError, match="eval mode"):
        teacher.hidden(next(tiny_sequences().batches(1)))


def test_bfloat16_compute_over_float32_master_weights(tmp_path: Path) -> None:
    student, teacher = pair()
    computed: set[torch.dtype] = set()
    layer: Any = student.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, bf16=True, max_steps=2),
        train_dataset=tiny_sequences(),
    )
    watch = Watch()
    trainer.add_callback(watch)
    bind_loss(student, teacher, MIX)
    trainer.train()
    assert computed == {torch.bfloat16}
    assert watch.recorded == [{torch.float32}] * 2
    assert {gradient.dtype for gradient in watch.gradients.values()} == {torch.float32}


def largest_of_step(rows: int, vocabulary: int) -> tuple[int, torch.Size]:
    """Elements of the largest tensor of a whole step, beside weights, gradients and optimizer."""
    student, teacher = pair(vocab_size=vocabulary)
    optimizer = torch.optim.AdamW(student.parameters())
    batch = next(tiny_sequences(rows, 64, vocabulary=vocabulary).batches(rows))
    batch["labels"] = batch["input_ids"].clone()
    bind_loss(student, teacher, MIX)
    shapes = {p.shape for model in (student, teacher.model) for p in model.parameters()}
    with Largest(shapes | {shape[::-1] for shape in shapes}) as largest:
        outputs = student(**batch)
        (outputs["loss"] / outputs["tokens"]).backward()
        optimizer.step()
    return largest.elements, largest.shape


def test_no_tensor_of_a_step_grows_with_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four times as many (token × vocabulary) pairs: the largest tensor at most doubles."""
    monkeypatch.setattr("regrow.runtime.chunks.CHUNK_ELEMENTS", 1 << 13)
    monkeypatch.setattr("regrow.runtime.chunks.CHUNKS_TOGETHER", 2)
    small, big = largest_of_step(2, 1024), largest_of_step(4, 2048)
    assert small[0] < 128 * 1024 / 2, small
    assert big[0] <= 2 * small[0], (small, big)
