"""AdamW with float32 state, or with less memory by torchao.

`adamw_8bit` stores the moments in 8 bits, with a scale for each block of 256 (Dettmers et al. 2021,
arXiv 2110.02861). `adamw_bf16` also has weights and gradients in bfloat16; each step rounds the
weights up or down with the probabilities that make the mean exact (stochastic rounding), so that
steps smaller than half a unit in the last place are not lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import is_torchao_available

from regrow.config import Options
from regrow.errors import UserError
from regrow.training import sharding

BLOCK = 256
"""Elements of a moment that share a scale."""


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer: its arguments for the trainer, and its memory for each trained weight."""

    fields: dict[str, Any]
    """Fields of TrainingArguments."""
    dtype: torch.dtype = torch.float32
    """The dtype of weights and gradients."""
    moment_bytes: float = 8.0
    """Bytes of both moments of a weight."""


_TORCHAO = {"optim": "adamw_torch_8bit"}
_TWO_IN_8_BITS = 2 + 2 * 4 / BLOCK
KINDS = {
    "adamw": OptimizerKind({"optim": "adamw_torch_fused"}),
    "adamw_8bit": OptimizerKind(_TORCHAO, moment_bytes=_TWO_IN_8_BITS),
    "adamw_bf16": OptimizerKind(
        {**_TORCHAO, "optim_args": "bf16_stochastic_round=True"}, torch.bfloat16, _TWO_IN_8_BITS
    ),
}
"""The optimizers by name."""


def require(name: str, options: Options, adapter: str, fake_quantize: str | None) -> None:
    """Raise UserError if torchao is missing, or if another setting excludes this optimizer."""
    if name == "adamw":
        return
    if not is_torchao_available():
        raise UserError(
            f"optimizer {name} needs torchao 0.15 or later, which is not installed: "
            "pip install 'regrow[optim]', or set optimizer to adamw"
        )
    excluded = {
        "deepspeed": options.deepspeed is not None,
        "sharding fsdp_offload": sharding.offloads(options),  # torchao's step would be uncompiled
    }
    if KINDS[name].dtype != torch.float32:
        excluded |= {
            # accelerate makes the trained weights float32 before it shards them (1.15).
            sharding.name(options): sharding.is_sharded(options),
            f"adapter {adapter}": adapter != "none",
            f"fake_quantize {fake_quantize}": fake_quantize is not None,
        }
    for other, given in excluded.items():
        if given:
            raise UserError(f"optimizer {name} with {other}: not supported; leave out one of them")


def run_eagerly_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Run torchao's step without compilation where the weights are on the CPU.

    torchao compiles its step for each shape, which takes minutes on a CPU, and a C++ compiler.
    """
    if not type(optimizer).__module__.startswith("torchao."):
        return

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer.param_groups[0]["params"][0].device.type == "cpu":
            torch.compiler.set_stance("force_eager")

    def after(*_: Any) -> None:
        torch.compiler.set_stance("default")

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
