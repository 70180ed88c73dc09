"""Stores ids drawn from the teacher's distribution, an unbiased estimate of it (arXiv:2503.16870).

An id's share of the n draws is an unbiased estimate of its probability; the gradient is also
unbiased. `multinomial` draws are independent. `systematic` draws are evenly spaced in the
cumulative distribution from a random start, one per token (Carpenter et al., 1999): an id gets
⌊np⌋ or ⌈np⌉ of them, with the same expectation and far less noise.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.training.cache.formats import log_probabilities
from regrow.training.cache.sparse import Sparse
from regrow.training.cache.store import bit_width, pack, packed_bytes, unpack
from regrow.training.head import Head

LARGEST = 255


@dataclass(frozen=True)
class Format:
    """Stores per token the drawn ids (ceil(log2 V) bits each), their counts, number and entropy."""

    STATES: ClassVar[bool] = False
    vocab_size: int
    draws: int = 40
    sampling: Literal["systematic", "multinomial"] = "systematic"
    seed: int = 0

    def check(self) -> None:
        """Raise UserError for more draws than a byte can count."""
        if not 1 <= self.draws <= LARGEST:
            raise UserError(f"draws {self.draws}: give 1 to {LARGEST}")

    def bytes_per_token(self) -> float:
        """The bytes per token if all draws are different ids."""
        bits = bit_width(self.vocab_size) + bit_width(self.draws)
        return packed_bytes(self.draws, bits) + 3

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """Return `unique` [N] ids per token, `entropy` [N] in nats, packed `ids` and `counts`."""
        points_ND = self._points(len(hidden_NH), key).to(hidden_NH.device)
        drawn, entropy, done = [], [], 0
        for log_p_NV in log_probabilities(hidden_NH, head, self.vocab_size):
            p_NV = log_p_NV.exp()
            entropy.append(-(p_NV * log_p_NV.clamp_min(-1e30)).sum(-1))
            below_NV = p_NV.double().cumsum(-1)
            below_NV /= below_NV[:, -1:].clone()
            points = points_ND[done : done + len(p_NV)]
            drawn.append(torch.searchsorted(below_NV, points, right=True))
            done += len(p_NV)
        ids, counts, unique = _runs(torch.cat(drawn).clamp_(max=self.vocab_size - 1).cpu())
        return {
            "unique": unique.to(torch.uint8),
            "entropy": torch.cat(entropy).half().cpu(),
            "ids": pack(ids[None], bit_width(self.vocab_size))[0],
            "counts": pack(counts[None] - 1, bit_width(self.draws))[0],
        }

    def decode(self, stored: dict[str, Tensor]) -> Sparse:
        """Return each id's share of the draws; shorter rows are padded with shares of 0."""
        unique_N = stored["unique"].long()
        total = int(unique_N.sum())
        ids = unpack(stored["ids"][None], total, bit_width(self.vocab_size))[0]
        counts = unpack(stored["counts"][None], total, bit_width(self.draws))[0] + 1
        there_NK = torch.arange(int(unique_N.max())) < unique_N[:, None]
        ids_NK, share_NK = torch.zeros_like(there_NK, dtype=torch.int64), torch.zeros_like(there_NK)
        ids_NK[there_NK] = ids
        share_NK = share_NK.float().masked_scatter_(there_NK, counts / self.draws)
        return Sparse(self.vocab_size, ids_NK, share_NK, entropy_N=stored["entropy"].float())

    def _points(self, tokens: int, key: bytes) -> Tensor:
        """The points at which the cumulative distribution is inverted.

        Shape [tokens, draws], ascending in [0, 1).
        """
        seed = hashlib.sha256(f"{self.seed}/".encode() + key).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        fields = {"generator": generator, "dtype": torch.float64}
        if self.sampling == "multinomial":
            return torch.rand(tokens, self.draws, **fields).sort(-1).values  # type: ignore[call-overload]
        start = torch.rand(tokens, 1, **fields)  # type: ignore[call-overload]
        found: Tensor = (start + torch.arange(self.draws, dtype=torch.float64)) / self.draws
        return found


def _runs(drawn_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct ids of each ascending row, the count of each, and the number of ids per row."""
    new_ND = torch.ones_like(drawn_ND, dtype=torch.bool)
    new_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]
    starts = new_ND.flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], torch.tensor([drawn_ND.numel()])])
    return drawn_ND[new_ND], ends - starts, new_ND.sum(-1)
