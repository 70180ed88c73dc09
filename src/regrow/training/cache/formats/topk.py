"""Stores the k most likely ids with their probabilities, and the mass of all others as one bucket.

Codes are even steps in √p: an error of d√p adds 4 (d√p)² / 2 nats of KL at every p, so even steps
have the least error. With b bits, p ∝ code², code 1 … 2^b − 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regrow.errors import UserError
from regrow.training.cache.formats import log_probabilities
from regrow.training.cache.sparse import Sparse
from regrow.training.cache.store import bit_width, pack, packed_bytes, unpack
from regrow.training.head import Head


@dataclass(frozen=True)
class Format:
    """Stores k ids of ceil(log2 V) bits and k + 1 codes of `bits` bits; the last is the tail."""

    STATES: ClassVar[bool] = False
    vocab_size: int
    k: int = 18
    bits: int = 8

    def check(self) -> None:
        """Raise UserError for a k that leaves no tail."""
        if not 1 <= self.k < self.vocab_size:
            raise UserError(
                f"k {self.k}: give 1 to {self.vocab_size - 1}, fewer than the teacher's "
                f"{self.vocab_size} tokens"
            )

    def bytes_per_token(self) -> float:
        """The bytes of the ids and of the codes, each rounded up to whole bytes."""
        ids = packed_bytes(self.k, bit_width(self.vocab_size))
        return ids + packed_bytes(self.k + 1, self.bits)

    def encode(self, hidden_NH: Tensor, head: Head, key: bytes) -> dict[str, Tensor]:
        """Return `ids` and `codes`, uint8 [N, bytes]; the most likely id is first."""
        ids, codes = [], []
        for log_p_NV in log_probabilities(hidden_NH, head, self.vocab_size):
            top_NK, ids_NK = log_p_NV.topk(self.k, dim=-1)
            log_p_NV.scatter_(-1, ids_NK, -torch.inf)
            tail_N1 = log_p_NV.logsumexp(-1, keepdim=True)
            root = torch.cat([top_NK, tail_N1], -1).mul(0.5).exp_()
            steps = (1 << self.bits) - 1
            codes.append((root * steps).round_().clamp_(1, steps).long())
            ids.append(ids_NK)
        width = bit_width(self.vocab_size)
        return {"ids": pack(torch.cat(ids), width), "codes": pack(torch.cat(codes), self.bits)}

    def decode(self, stored: dict[str, Tensor]) -> Sparse:
        """Return the probabilities of the k + 1 buckets, which sum to 1."""
        ids_NK = unpack(stored["ids"], self.k, bit_width(self.vocab_size))
        squares = unpack(stored["codes"], self.k + 1, self.bits).float().square_()
        p = squares / squares.sum(-1, keepdim=True)
        return Sparse(self.vocab_size, ids_NK, p[:, :-1], tail_N=p[:, -1])
