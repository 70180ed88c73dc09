"""The blocks of student and teacher through torch.compile, where that was asked for."""

from __future__ import annotations

import os
import shutil

from transformers import PreTrainedModel

from regrow.errors import UserError
from regrow.options import Options
from regrow.stages.distill.config import DistillConfig
from regrow.training import sharding
from regrow.training.holding import Hold
from regrow.training.objective import AnyTeacher
from regrow.training.prefix import blocks_of
from regrow.training.teacher import Teacher

GRAPHS = 64
"""Kinds of blocks times ways to run them (training, measuring, a last, smaller batch), at most."""


def check_compile(config: DistillConfig, options: Options) -> None:
    """Raise UserError for what cannot be compiled, and for a missing compiler."""
    if not options.torch_compile:
        return
    others = {
        "signals": bool(config.signals),
        f"fake_quantize {config.fake_quantize}": config.fake_quantize is not None,
        f"adapter {config.adapter}": config.adapter != "none",
        "sharding fsdp": sharding.is_sharded(options),
        "deepspeed": options.deepspeed is not None,
    }
    for name, asked in others.items():
        if asked:
            raise UserError(f"torch_compile with {name}: not supported; leave out one of them")
    if options.torch_device().type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))
    ):
        raise UserError("torch_compile needs a C++ compiler, and g++ is not there: install it")


def compile_blocks(
    student: PreTrainedModel, teacher: AnyTeacher, hold: Hold, shared: int = 0
) -> None:
    """Compile the blocks in place; names and weights stay, and so does what is saved.

    All but the first `shared` ones, which the teacher runs for both, and not those of a teacher
    whose weights come from disk as they run.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    models = [student]
    if isinstance(teacher, Teacher) and hold != "disk":
        models.append(teacher.model)
    for model in models:
        for block in blocks_of(model)[shared:]:
            block.compile()
