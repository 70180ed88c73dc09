"""Which weights of a matrix become zero: a share of them, or all but N of M in a row.

Shapes: R rows, C columns, G groups of K scores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

GROUPS = (2, 4, 8, 16, 32)
"""The possible M of N:M."""


@dataclass(frozen=True)
class Sparsity:
    """A share of zeros, or N:M: of M consecutive weights of a row, N stay."""

    share: float
    """Share of the weights that become zero."""
    keep: int = 0
    """N of N:M; 0 without such a pattern."""
    of: int = 0
    """M of N:M; 0 without such a pattern."""

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.of else f"{self.share:g}"

    def zeros(self, score_RC: Tensor, per_row: bool) -> Tensor:
        """True at the weights with the lowest scores, which become zero.

        A share applies to each row, or to the whole matrix. The number of columns must be a
        multiple of M.
        """
        if self.of:
            assert score_RC.shape[1] % self.of == 0, (score_RC.shape, self.of)
            groups = score_RC.reshape(-1, self.of)
            return lowest(groups, self.of - self.keep).view_as(score_RC)
        groups = score_RC if per_row else score_RC.reshape(1, -1)
        return lowest(groups, round(self.share * groups.shape[1])).view_as(score_RC)


def parse(pattern: str) -> Sparsity:
    """The sparsity of a text N:M; raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern.strip())
    keep, of = map(int, match.groups()) if match else (0, 0)
    if of not in GROUPS or not 0 < keep < of:
        allowed = ", ".join(map(str, GROUPS))
        raise ValueError(
            f"{pattern!r} is no N:M: of M consecutive weights N stay, with M one of {allowed} and "
            "N from 1 to M − 1, such as 2:4"
        )
    return Sparsity(1 - keep / of, keep, of)


def lowest(score_GK: Tensor, count: int) -> Tensor:
    """True at the `count` lowest scores of each group; of equal scores, at the first ones."""
    if count == 0:
        return torch.zeros_like(score_GK, dtype=torch.bool)
    limit_G1 = score_GK.kthvalue(count, 1, keepdim=True).values
    below_GK, same_GK = score_GK < limit_G1, score_GK == limit_G1
    missing_G1 = count - below_GK.sum(1, keepdim=True)
    return below_GK | (same_GK & (same_GK.cumsum(1) <= missing_G1))
