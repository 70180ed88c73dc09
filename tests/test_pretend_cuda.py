"""The pretended device refuses what CUDA refuses, and counts bytes as they come and go."""

from __future__ import annotations

import pytest
import torch
from pretend_cuda import CPU, CUDA, FakeCuda, MixedDevicesError
from torch import nn


def test_it_refuses_to_mix_devices() -> None:
    with FakeCuda() as fake:
        there, here = torch.ones(3, 3, device="cuda"), torch.ones(3, 3)
        assert (there.device, here.device) == (CUDA, CPU)
        with pytest.raises(MixedDevicesError, match="add"):
            there + here
        with pytest.raises(MixedDevicesError, match="on the CPU"):
            nn.Linear(3, 3)(there)
        assert (there @ there).device == (there + 1).device == here.to(there.device).device == CUDA
        assert (there.to(CPU) + here).device == CPU
        assert there.device == CUDA and here.device == CPU
        layer = nn.Linear(3, 3).to(CUDA)
        assert layer(there).device == layer.weight.T.device == CUDA
        assert fake.where["matmul"] == {"cuda"}


def test_it_counts_bytes() -> None:
    with FakeCuda() as fake:
        first = torch.empty(1000, dtype=torch.uint8, device="cuda")
        second = first.clone()
        del first
        assert (fake.allocated(), fake.peak) == (1000, 2000)
        del second
        assert fake.allocated() == 0
