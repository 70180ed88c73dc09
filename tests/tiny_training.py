"""A tiny distillation step: blocks, a student and its teacher, a trainer that is watched, ranks."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from tiny_models import tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from regrow.data.sequences import IGNORED, Sequences
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher
from regrow.training.trainer import DistillTrainer

MIX = LossWeights({"forward_kl": 0.75, "cross_entropy": 0.25}, temperature=2.0)

T = 24


def tiny_sequences(n: int = 8, length: int = T, seed: int = 0, vocabulary: int = 384) -> Sequences:
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
    return Sequences(ids, positions, labels, torch.ones_like(ids, dtype=torch.bool))


def pair(dtype: torch.dtype = torch.float32, **overrides: Any) -> tuple[PreTrainedModel, Teacher]:
    """A tiny student, and a wider teacher."""
    overrides = {"num_hidden_layers": 2, **overrides}
    student = tiny_model("llama", dtype, seed=1, **overrides)
    return student, Teacher(tiny_model("llama", dtype, seed=2, **{"hidden_size": 60, **overrides}))


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
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
    return TrainingArguments(**{**settings, **fields})


class Watch(TrainerCallback):
    """Keeps the gradients that the optimizer was about to use, and asks a question each step."""

    def __init__(self) -> None:
        self.gradients: dict[str, Tensor] = {}
        self.recorded: list[Any] = []
        self.storages: set[int] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        named = given["model"].named_parameters()
        self.gradients = {
            name.removeprefix("module."): parameter.grad.clone() for name, parameter in named
        }
        self.storages = {p.grad.untyped_storage().data_ptr() for p in given["model"].parameters()}
        self.recorded.append({parameter.dtype for parameter in given["model"].parameters()})


def train(
    folder: Path,
    batch_size: int,
    accumulation: int,
    sequences: Sequences | None = None,
    mix: LossWeights = MIX,
    **fields: Any,
) -> tuple[DistillTrainer, Watch]:
    """Train the pair's student for `max_steps`; returns the trainer and the last gradients."""
    student, teacher = pair()
    fields |= {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = DistillTrainer(
        model=student, args=arguments(folder, **fields), train_dataset=sequences or tiny_sequences()
    )
    watch = Watch()
    trainer.add_callback(watch)
    undo = bind_loss(student, teacher, mix)
    trainer.train()
    undo()
    return trainer, watch


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(world: int, work: Callable[..., None], *work_arguments: str) -> None:
    """Run `work(rank, *given)` in `world` processes, with the environment that torchrun gives.

    They fork from a server that has the test modules imported already, once for all.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_trainer", "test_distill_ranks", "test_sharding", "test_ranks"]
    )
    arguments = (world, free_port(), work, work_arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server has no other
        running = torch.multiprocessing.start_processes(
            _rank, arguments, world, join=False, start_method="forkserver"
        )
        end = time.monotonic() + 120
        while not running.join(timeout=5):
            if time.monotonic() > end:
                for process in running.processes:
                    process.kill()
                pytest.fail("the ranks wait for each other")


def _rank(rank: int, world: int, port: int, work: Callable[..., None], work_arguments: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    work(rank, *work_arguments)
    torch.distributed.barrier()
    os._exit(0)  # at once: gloo's threads can hang in an orderly end


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    def __init__(self, ignored: set[torch.Size]) -> None:
        super().__init__()
        self.elements, self.shape, self.ignored = 0, torch.Size(), ignored

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if (
                isinstance(tensor, Tensor)
                and tensor.shape not in self.ignored
                and tensor.numel() > self.elements
            ):
                self.elements, self.shape = tensor.numel(), tensor.shape
        return result
