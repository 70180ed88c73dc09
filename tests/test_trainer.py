"""The training step: what is scored, what the gradient is, and what is left alone."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from test_head import Largest
from tiny_models import SPECIAL, tiny_model
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from regrow.data import Blocks
from regrow.data.blocks import IGNORED
from regrow.errors import UserError
from regrow.progress import Progress
from regrow.training.head import Mix
from regrow.training.teacher import Teacher, final_hidden
from regrow.training.trainer import DistillTrainer, Journal, Pace, bind_loss

MIX = Mix({"forward_kl": 0.75, "cross_entropy": 0.25}, temperature=2.0)
T = 24


def blocks_of(n: int = 8, length: int = T, seed: int = 0, vocabulary: int = 384) -> Blocks:
    """Blocks of two documents each, of which very different numbers of tokens are scored."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, vocabulary, (n, length), generator=draw)
    positions, labels = torch.empty_like(ids), torch.full_like(ids, IGNORED)
    for row in range(n):
        first = 5 + row % 7
        positions[row] = torch.cat([torch.arange(first), torch.arange(length - first)])
        scored = torch.rand(length, generator=draw) < (row % 4) / 3  # none at all in every fourth
        scored[0] = scored[first] = False
        labels[row][scored] = ids[row][scored]
    return Blocks(ids, positions, labels, torch.ones_like(ids, dtype=torch.bool))


def pair(dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[PreTrainedModel, Teacher]:
    """A tiny student, and a wider teacher."""
    overrides = {"num_hidden_layers": 2, **overrides}
    student = tiny_model("llama", dtype, seed=1, **overrides)
    return student, Teacher(tiny_model("llama", dtype, seed=2, **{"hidden_size": 60, **overrides}))


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "dataloader_pin_memory": False,
        "average_tokens_across_devices": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**given, **fields})


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer was about to use, and asks a question each step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.seen: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.gradients = {
            name.removeprefix("module."): parameter.grad.clone() for name, parameter in named
        }
        self.seen.append({parameter.dtype for parameter in given["model"].parameters()})


def train(
    folder: Path,
    batch_size: int,
    accumulation: int,
    blocks: Blocks | None = None,
    mix: Mix = MIX,
    **fields: Any,
) -> tuple[DistillTrainer, Watch]:
    """Train the pair's student for `max_steps`; returns the trainer and the last gradients."""
    student, teacher = pair()
    fields |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = DistillTrainer(
        model=student, args=arguments(folder, **fields), train_dataset=blocks or blocks_of()
    )
    watch = Watch()
    trainer.add_callback(watch)
    undo = bind_loss(student, teacher, mix)
    trainer.train()
    undo()
    return trainer, watch


def slow_gradients(blocks: Blocks, mix: Mix = MIX) -> dict[str, Tensor]:
    """∂/∂weights of Σ loss ÷ scored tokens in float64: each document alone, full logits."""
    student, teacher = pair(torch.float64)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, positions, labels in zip(
        blocks.input_ids, blocks.position_ids, blocks.labels, strict=True
    ):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for begin, end in zip(starts[:-1], starts[1:], strict=True):
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


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error (Frobenius) over the tensors."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name].double() - exact).norm() / exact.norm())
        for name, exact in expected.items()
    )


@pytest.fixture(scope="module")
def exact() -> dict[str, Tensor]:
    return {name: value.double() for name, value in slow_gradients(blocks_of()).items()}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_gradient_is_the_same_however_the_step_is_split(
    tmp_path: Path, exact: dict[str, Tensor], batch_size: int, accumulation: int
) -> None:
    _, watch = train(tmp_path, batch_size, accumulation)
    assert error(watch.gradients, exact) < 1e-5


def test_logged_loss_is_the_mean_per_scored_token(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, 2, 4)
    student, teacher = pair(torch.float64)
    undo = bind_loss(student, teacher, MIX)
    batch = next(iter(blocks_of().batches(8)))
    with torch.no_grad():
        outputs = student(**batch)
    undo()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] == pytest.approx(float(outputs["loss"] / outputs["tokens"]), rel=1e-3)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    """One process of a distributed run: the same step, this rank's share of the blocks."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    trainer, watch = train(Path(folder) / str(rank), 1, 8 // world, max_steps=1, ddp_backend="gloo")
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save((watch.gradients, weights), Path(folder) / f"{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # at once: gloo's threads can hang in an orderly end


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_gradient_and_the_weights_of_one_process(
    tmp_path: Path, exact: dict[str, Tensor], world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server has no other
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_trainer"])  # imports once, for all ranks
    torch.multiprocessing.start_processes(
        _rank, (world, free_port(), str(tmp_path)), world, start_method="forkserver"
    )
    alone, _ = train(tmp_path / "alone", 8, 1)
    for rank in range(world):
        gradients, weights = torch.load(tmp_path / f"{rank}.pt")
        assert error(gradients, exact) < 1e-5
        for name, parameter in alone.model.named_parameters():
            torch.testing.assert_close(weights[name], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_position_t_is_scored_by_label_t_plus_1() -> None:
    student, teacher = pair(torch.float64)
    ids = torch.randint(4, 384, (1, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, IGNORED)
    labels[0, 6] = 77
    log_q, log_p = (m(ids).logits[0, 5].log_softmax(-1) for m in (student, teacher.model))
    bind_loss(student, teacher, Mix({"forward_kl": 1.0, "cross_entropy": 0.0}))
    outputs = student(input_ids=ids, position_ids=torch.arange(9)[None], labels=labels)
    assert int(outputs["tokens"]) == 1
    kl = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(outputs["loss"], kl, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(outputs["parts"]["cross_entropy"], -log_q[77], rtol=1e-6, atol=1e-9)


def test_padding_and_prompts_count_for_nothing() -> None:
    """A padded block with a prompt gives what its answer alone gives, and no gradient beyond."""
    student, teacher = pair(torch.float64)
    bind_loss(student, teacher, MIX)
    block = blocks_of(3).select(range(2, 3))
    once = student(**next(block.batches(1)))
    padded = {name: torch.cat([x, x], 1) for name, x in next(block.batches(1)).items()}
    padded["labels"][:, T:] = IGNORED
    padded["position_ids"][:, T:] = torch.arange(T)
    twice = student(**padded)
    assert int(once["tokens"]) == int(twice["tokens"]) > 0
    torch.testing.assert_close(once["loss"], twice["loss"])
    padded["input_ids"][:, T:] = 9
    torch.testing.assert_close(student(**padded)["loss"], once["loss"])


@pytest.mark.parametrize("model_type", sorted(SPECIAL))
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    """Hidden states of a packed block are those of each document alone."""
    model = tiny_model(model_type, torch.float64)
    blocks = blocks_of(2, length=40)
    with torch.no_grad():
        packed = final_hidden(model, next(blocks.batches(2)))
        for row in range(2):
            starts = [*(blocks.position_ids[row] == 0).nonzero().flatten().tolist(), 40]
            for begin, end in zip(starts[:-1], starts[1:], strict=True):
                alone = model.base_model(
                    blocks.input_ids[row : row + 1, begin:end], use_cache=False
                )
                expected = alone.last_hidden_state[0, : min(end, 39) - begin]
                torch.testing.assert_close(packed[row, begin:end], expected, rtol=1e-5, atol=1e-6)


def test_a_batch_with_nothing_to_score_gives_zero(tmp_path: Path) -> None:
    blocks = blocks_of()
    blocks.labels[:] = IGNORED
    before = {name: p.clone() for name, p in pair()[0].named_parameters()}
    trainer, watch = train(tmp_path, 4, 2, blocks)
    assert trainer.state.log_history[0]["loss"] == 0.0
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not watch.gradients[name].any()


def test_the_teacher_stays_out(tmp_path: Path) -> None:
    student, teacher = pair()
    before = {name: p.clone() for name, p in teacher.model.named_parameters()}
    names = set(student.state_dict())
    trainer = DistillTrainer(
        model=student,
        args=arguments(tmp_path, save_strategy="steps", save_steps=1),
        train_dataset=blocks_of(),
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
        teacher.hidden(next(blocks_of().batches(1)))


def test_bfloat16_compute_over_float32_master_weights(tmp_path: Path) -> None:
    student, teacher = pair()
    computed: set[torch.dtype] = set()
    layer: Any = student.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda module, inputs, output: computed.add(output.dtype))
    trainer = DistillTrainer(
        model=student, args=arguments(tmp_path, bf16=True, max_steps=2), train_dataset=blocks_of()
    )
    watch = Watch()
    trainer.add_callback(watch)
    bind_loss(student, teacher, MIX)
    trainer.train()
    assert computed == {torch.bfloat16}
    assert watch.seen == [{torch.float32}] * 2
    assert {gradient.dtype for gradient in watch.gradients.values()} == {torch.float32}


def test_held_out_figures_are_means_over_all_scored_tokens(tmp_path: Path) -> None:
    """Not means of batch means: 5 blocks in batches of 2, with unequal numbers of tokens."""
    student, teacher = pair(torch.float64)
    blocks = blocks_of(5, seed=4)
    trainer = DistillTrainer(
        model=student, args=arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=blocks
    )
    undo = bind_loss(student, teacher, Mix(MIX.weights))
    metrics = trainer.evaluate()
    with torch.no_grad():
        outputs = student(**next(blocks.batches(5)))
    undo()
    for name, part in outputs["parts"].items():
        assert metrics[f"eval_{name}"] == pytest.approx(float(part / outputs["tokens"]), rel=1e-9)


def test_journal_has_a_row_for_each_step(tmp_path: Path) -> None:
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
        train_dataset=blocks_of(),
        eval_dataset=blocks_of(4, seed=9),
    )
    journal = tmp_path / "metrics.jsonl"
    trainer.add_callback(Journal(journal, "03-distill", 2 * T))
    progress = Progress("distill", 4 * 2 * T, "tokens")
    trainer.add_callback(Pace(2 * T, progress))
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


def test_a_loss_that_is_no_number_names_the_step(tmp_path: Path) -> None:
    student, teacher = pair()
    trainer = DistillTrainer(
        model=student, args=arguments(tmp_path, max_steps=3), train_dataset=blocks_of()
    )

    class Spoil(TrainerCallback):
        def on_step_end(self, *_: Any, **given: Any) -> None:
            with torch.no_grad():
                next(given["model"].parameters()).fill_(float("nan"))

    trainer.add_callback(Spoil())
    bind_loss(student, teacher, MIX)
    with pytest.raises(UserError, match="the loss became nan at step 2"):
        trainer.train()


def largest_of_step(rows: int, vocabulary: int) -> tuple[int, torch.Size]:
    """Elements of the largest tensor of a whole step, beside weights, gradients and optimizer."""
    student, teacher = pair(vocab_size=vocabulary)
    optimizer = torch.optim.AdamW(student.parameters())
    batch = next(blocks_of(rows, 64, vocabulary=vocabulary).batches(rows))
    batch["labels"] = batch["input_ids"].clone()
    bind_loss(student, teacher, MIX)
    shapes = {p.shape for model in (student, teacher.model) for p in model.parameters()}
    with Largest(shapes | {shape[::-1] for shape in shapes}) as seen:
        outputs = student(**batch)
        (outputs["loss"] / outputs["tokens"]).backward()
        optimizer.step()
    return seen.elements, seen.shape


def test_no_tensor_of_a_step_grows_with_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four times as many (token × vocabulary) pairs: the largest tensor at most doubles."""
    monkeypatch.setattr("regrow.training.head.CHUNK_ELEMENTS", 1 << 15)
    small, big = largest_of_step(2, 1024), largest_of_step(4, 2048)
    assert small[0] < 128 * 1024 / 2, small
    assert big[0] <= 2 * small[0], (small, big)
