"""Layers through torch.compile: names and weights stay as they are."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from regrow.config import ReconstructMachine
from regrow.errors import UserError

COMPILED_GRAPHS = 64
"""An upper bound for kinds of layers × modes of running them (train, eval, smaller last batch)."""


def require_compiler(machine: ReconstructMachine) -> None:
    """Raise UserError if torch_compile is set and a CPU has no C++ compiler."""
    if not machine.torch_compile or machine.torch_device().type != "cpu":
        return
    compilers = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if not any(map(shutil.which, compilers)):
        raise UserError("torch_compile needs a C++ compiler, and there is no g++: install it")


def allow_graphs() -> None:
    """Let torch keep a graph for each kind of layer; beyond a limit it runs layers eagerly."""
    import torch._dynamo

    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, COMPILED_GRAPHS)


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Compile the forward method of a layer; its hooks stay outside of the graph.

    Another layer of the same kind uses the same graph.
    """
    allow_graphs()
    module.forward = torch.compile(module.forward)
    try:
        yield
    finally:
        del module.forward
