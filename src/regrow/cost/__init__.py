"""Estimates a model's cost: parameters, operations and seconds, bytes on disk and in memory.

There is one module for each question: `operations` and `storage` for one model, `model` for a model
of which only the config is known, `memory` and `activations` for the memory of a training step,
`devices` and `jobs` for hours and money on named devices, `steps` for the tokens of a step.
"""

from regrow.cost.operations import (
    BACKWARD,
    FORWARD,
    active,
    forward_flops,
    forward_seconds,
    matmul_rate,
    parameters,
    seconds_for,
    training_operations,
)
from regrow.cost.storage import (
    cache_bytes_per_token,
    fallbacks,
    file_bytes,
    ram_bytes,
    role_of,
    stored,
)

__all__ = [
    "BACKWARD",
    "FORWARD",
    "active",
    "cache_bytes_per_token",
    "fallbacks",
    "file_bytes",
    "forward_flops",
    "forward_seconds",
    "matmul_rate",
    "parameters",
    "ram_bytes",
    "role_of",
    "seconds_for",
    "stored",
    "training_operations",
]
