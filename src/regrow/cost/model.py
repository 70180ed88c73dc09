"""A model of which only the config is known: its sizes, its bytes and its operations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from regrow import families
from regrow.cost import storage
from regrow.cost.operations import FORWARD
from regrow.families import Family

TOP_K_ENTRY = 4
"""Bytes of a token id, and of a log-probability, in a plain top-k cache."""


@dataclass(frozen=True, eq=False)
class ModelSize:
    """A model by its config alone: no weights are read."""

    config: dict[str, Any]

    @cached_property
    def family(self) -> Family:
        """The family's table; raises UserError for a model without one."""
        return families.of_config(self.config)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of units of each dimension, and head_dim."""
        return self.family.sizes(self.config)

    @cached_property
    def parameters(self) -> int:
        """All parameters; tied weights are counted once."""
        return self.family.count(self.config)

    @cached_property
    def active(self) -> int:
        """Parameters that one token uses, with only the experts to which it is routed."""
        return self.family.active(self.config)

    @property
    def tied(self) -> bool:
        """Whether the embedding is also the output head."""
        return not self.family.exists(self.family.tensors[self.family.head], self.config)

    @property
    def table(self) -> int:
        """Parameters of the embedding, and of the head: vocab · hidden."""
        return self.sizes["vocab"] * self.sizes["hidden"]

    @property
    def multiplied(self) -> int:
        """Parameters in a token's matrix products: the head is one of them, a lookup is not."""
        return self.active - (0 if self.tied else self.table)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer, all experts included (the mean over the layers)."""
        tables = self.table * (1 if self.tied else 2)
        return (self.parameters - tables) // self.sizes["layers"]

    def bytes(self, format: str = "bf16") -> int:
        """Bytes of all tensors in a storage format of `quantization.formats`."""
        return storage.file_bytes(self.family, self.config, format)

    def ram(self, format: str, context_length: int) -> int:
        """Bytes to generate at this context length, batch 1: see `storage.ram_bytes`."""
        return storage.ram_bytes(self.family, self.config, format, context_length)

    @property
    def cache_per_token(self) -> int:
        """Bytes of one token in the KV cache."""
        return storage.cache_bytes_per_token(self.family, self.config)

    def forward(self, length: int) -> float:
        """Operations of a forward pass per token, in sequences of `length` tokens.

        2 · (parameters in matrix products) + 4 · layers · heads · head_dim · (length + 1) / 2, the
        mean over the sequence. Sliding windows are not taken into account.
        """
        full = self.sizes
        attention = 4 * full["layers"] * full["heads"] * full["head_dim"]
        return FORWARD * self.multiplied + attention * (length + 1) / 2

    def resized(self, **sizes: int) -> ModelSize:
        """The same model with other sizes, by dimension; head_dim stays."""
        keys = {**self.family.config_keys, "head_dim": "head_dim"}
        changed = {keys[dim]: size for dim, size in {**self.sizes, **sizes}.items()}
        config = {key: value for key, value in self.config.items() if key != "layer_types"}
        return ModelSize({**config, **changed})


def logits_cache_bytes(vocabulary: int, tokens: float, bytes_per_value: int = 4) -> float:
    """Bytes of a teacher cache with all logits: vocabulary · tokens · bytes of a value."""
    return float(vocabulary * tokens * bytes_per_value)


def top_k_cache_bytes(k: int, tokens: float) -> float:
    """Bytes of a plain top-k cache: k ids and k log-probabilities of 4 bytes for each token.

    `regrow cache` packs both and takes less: see the formats of `regrow cache`.
    """
    return float(k * tokens * 2 * TOP_K_ENTRY)


def hidden_cache_bytes(hidden: int, tokens: float) -> float:
    """Bytes of a cache with the teacher's last hidden state in bfloat16: 2 · hidden · tokens."""
    return float(2 * hidden * tokens)
