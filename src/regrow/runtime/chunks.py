"""Tokens whose logits are computed at once, in the output head and the loss of a training step.

The memory that a step will take (`cost.memory`) is found from the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK_ELEMENTS = 1 << 24
"""The number of logits in one chunk: 64 MB in float32. On a CPU, larger chunks are not faster."""
CHUNKS_TOGETHER = 4
"""The number of chunks whose gradients are multiplied at once, in the compute dtype."""

GPU_BYTES = 1 << 31
"""Bytes that the chunks of a step may take on a GPU."""
GPU_TOKENS = 2048
"""Tokens in a chunk on a GPU at most: with more, its products do not get faster."""
GPU_TOGETHER = 2

WORK_BYTES = 10
"""Bytes for each logit of a chunk: two float32 tensors, and one in half precision."""
SLOPE_BYTES = 2
"""Bytes for each logit of the chunks whose gradients are multiplied at once."""


class HeadChunk(NamedTuple):
    """The size of a chunk of the output head."""

    tokens: int
    together: int
    """Chunks whose gradients are multiplied at once."""

    def bytes(self, tokens: int, vocabulary: int) -> int:
        """Temporary bytes for a micro-batch with `tokens` scored tokens."""
        chunk, slopes = min(tokens, self.tokens), min(tokens, self.tokens * self.together)
        return vocabulary * (WORK_BYTES * chunk + SLOPE_BYTES * slopes)


def head_chunk(device: str, vocabulary: int) -> HeadChunk:
    """The chunk for a type of device and a number of token ids."""
    if device != "cuda":
        return HeadChunk(max(16, CHUNK_ELEMENTS // vocabulary), CHUNKS_TOGETHER)
    token = vocabulary * (WORK_BYTES + GPU_TOGETHER * SLOPE_BYTES)
    return HeadChunk(max(16, min(GPU_TOKENS, GPU_BYTES // token)), GPU_TOGETHER)
