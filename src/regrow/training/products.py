"""Matrix products of half-precision factors with a result of float32.

CUDA has them. Elsewhere the result is rounded to half precision; `exact` then adds what that
rounding, and that of a factor, left out. Both are small, so half precision holds them well: in
bfloat16 with errors of 2⁻¹⁸ of the result, for products instead of one two or, of a split factor,
three.
"""

from __future__ import annotations

import torch
from torch import Tensor

from regrow.runtime.precision import widen

ADDED_ELEMENTS = 1 << 23  # of a product that is added at once: 32 MB in float32


def product(left_MK: Tensor, right_KN: Tensor, exact: bool) -> Tensor:
    """left @ right, in float32 at least."""
    if _widens(left_MK):
        return torch.mm(left_MK, right_KN, out_dtype=torch.float32)
    rounded_MN = left_MK @ right_KN
    result_MN = widen(rounded_MN)
    if exact and result_MN.dtype != rounded_MN.dtype:
        result_MN.add_(rounded_MN.addmm_(left_MK, right_KN, beta=-1))
    return result_MN


def split(factor: Tensor, dtype: torch.dtype, exact: bool) -> tuple[Tensor, ...]:
    """A float32 factor as one of `dtype` and, if `exact`, what its rounding left out.

    Overwrites the factor if `exact`.
    """
    high = factor.to(dtype)
    if not exact or high.dtype == factor.dtype:
        return (high,)
    return high, factor.sub_(high).to(dtype)


def add_product(sum_MN: Tensor, parts_MK: tuple[Tensor, ...], right_KN: Tensor) -> None:
    """Add left @ right to a float32 sum, left being what `split` gave.

    Rows by rows: what is added takes memory of its own, in both dtypes.
    """
    rows = max(1, ADDED_ELEMENTS // max(1, sum_MN.shape[1]))
    for begin in range(0, len(sum_MN), rows):
        block = slice(begin, begin + rows)
        _add(sum_MN[block], tuple(part_MK[block] for part_MK in parts_MK), right_KN)


def _add(sum_MN: Tensor, parts_MK: tuple[Tensor, ...], right_KN: Tensor) -> None:
    if _widens(right_KN):
        for part_MK in parts_MK:
            sum_MN.add_(torch.mm(part_MK, right_KN, out_dtype=torch.float32))
        return
    high_MK, *low = parts_MK
    rounded_MN = high_MK @ right_KN
    sum_MN.add_(rounded_MN)
    for low_MK in low:
        rounded_MN.addmm_(high_MK, right_KN, beta=-1).addmm_(low_MK, right_KN)
        sum_MN.add_(rounded_MN)


def _widens(factor: Tensor) -> bool:
    if factor.device.type != "cuda" or torch.version.cuda is None or torch.__version__ < "2.8":
        return False
    return factor.dtype in (torch.bfloat16, torch.float16)
