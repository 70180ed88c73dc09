"""Grids and methods against slow float64 versions of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization.utils import calculate_qparams
from torch import Tensor

from regrow import plugins
from regrow.calibration import compensate
from regrow.errors import UserError
from regrow.quantization.formats import SCHEMES, Scheme, find_scheme
from regrow.quantization.grid import Grid, fake_quantize, fit
from regrow.stages.quantize import METHODS
from regrow.stages.quantize.methods import gptq
from regrow.stages.quantize.pack import _scheme, layout, packed

BF16 = torch.bfloat16
EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=list(SCHEMES))


def weight(rows: int = 6, columns: int = 128, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * 0.1 + 0.02
    found[1, : columns // 2] = 0  # whole groups of zeros
    return found


def gram(columns: int = 128, tokens: int = 300, seed: int = 1) -> Tensor:
    """Second moment of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / 8 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    x *= torch.rand(columns, generator=generator) * 3
    return x.T @ x / tokens


def slow_nearest(w: Tensor, grid: Grid) -> Tensor:
    """Each weight against every value of its grid, in float64."""
    scheme = grid.scheme
    if scheme.kind == "float":
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        codes = codes[codes.isfinite()]
    else:
        codes = torch.arange(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1)).double()
    found = torch.empty(w.shape, dtype=torch.float64)
    size = scheme.group or w.shape[1]
    for r in range(w.shape[0]):
        for c in range(w.shape[1]):
            scale = grid.scale_RG[r, c // size].double()
            zero = 0 if grid.zero_RG is None else grid.zero_RG[r, c // size].double()
            values = (codes - zero) * scale
            found[r, c] = values[(values - w[r, c].double()).abs().argmin()]
    return found


@EVERY
def test_rounding_finds_the_nearest_value(scheme: Scheme) -> None:
    w = weight()
    q, grid = plugins.load(METHODS, "rtn").quantize(w, scheme, BF16)
    slow = slow_nearest(w, grid)
    assert ((q.double() - w).abs() - (slow - w).abs()).abs().max() < 1e-8  # ties go either way
    assert (q.double() - slow).abs().gt(1e-8).float().mean() < 0.01


@EVERY
def test_scales_are_those_of_compressed_tensors(scheme: Scheme) -> None:
    w = weight()
    grouped = w.unflatten(1, (scheme.groups(128), -1))
    arguments = _scheme(scheme, ["Linear"]).weights
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), arguments)
    grid = fit(w, scheme, torch.float32)
    some = grouped.abs().amax(-1) > 0  # only its scale of a group of zeros differs: its eps
    torch.testing.assert_close(grid.scale_RG[some], scale[some])
    if grid.zero_RG is not None:
        assert torch.equal(grid.zero_RG[some], zero[some])


INTEGERS = pytest.mark.parametrize(
    "scheme", [s for s in SCHEMES.values() if s.kind == "int"], ids=lambda scheme: scheme.name
)


@INTEGERS
@pytest.mark.parametrize("method", plugins.names(METHODS))
def test_weights_on_a_grid_stay_there(scheme: Scheme, method: str) -> None:
    """However they came there, by whichever method they are rounded again."""
    q, _ = gptq.quantize(weight(), scheme, BF16, gram())
    again, grid = plugins.load(METHODS, method).quantize(q, scheme, BF16, gram(seed=9))
    assert (again - q).abs().max() < 1e-6
    assert (grid.nearest(q) - q).abs().max() < 1e-6
    importance = gram().diagonal()
    assert (fit(q, scheme, BF16, importance).nearest(q) - q).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["int4-g32", "int4-g64", "int4-g64-asym"])
def test_a_grid_is_recognised_after_rounding_to_16_bits(name: str) -> None:
    q, grid = gptq.quantize(weight(), SCHEMES[name], BF16, gram())
    found = fit(q.bfloat16(), SCHEMES[name], BF16)
    assert (found.nearest(q.bfloat16()) - q).abs().max() < 1e-6
    assert (found.scale_RG == grid.scale_RG).float().mean() > 0.9  # else a group without step 1


@INTEGERS
def test_weights_with_few_values_off_the_grid_get_a_new_grid(scheme: Scheme) -> None:
    q, grid = plugins.load(METHODS, "rtn").quantize(weight(), scheme, BF16)
    size = q.shape[1] // grid.scale_RG.shape[1]
    q[:, ::size] += 0.3 * grid.scale_RG.float()
    plain = fit(q, scheme, BF16)
    low = q.unflatten(1, (-1, size)).amin(-1).clamp_max(0)
    high = q.unflatten(1, (-1, size)).amax(-1).clamp_min(0)
    reach = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    some = reach > 0
    some[1] = False  # one weight alone lies on a grid of its own
    assert torch.equal(plain.scale_RG[some], (reach / (2**scheme.bits - 1)).to(BF16)[some])


def test_importance_lowers_the_weighted_error() -> None:
    w, h = weight(), gram().diagonal()
    for name in ("int4-g32", "int4-g64-asym", "fp8"):
        errors = [
            ((grid.nearest(w) - w).square() * h).sum()
            for grid in (fit(w, SCHEMES[name], BF16, h), fit(w, SCHEMES[name], BF16))
        ]
        assert errors[0] <= errors[1]
    assert errors[0] < errors[1] or name == "fp8"


def slow_obq(w: Tensor, grid: Grid, h: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in a fixed order, in float64, inverting anew at each column.

    After w_c is rounded, the columns F that remain are re-solved for the least error of the output:
    δ_F = −(w_c − q_c)/[H_F∪c⁻¹]_cc · [H_F∪c⁻¹]_Fc.
    """
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(len(h))
    w = w.double().clone()
    order = h.diagonal().argsort(descending=True, stable=True).tolist()
    for place, c in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(h[left][:, left])
        q = slow_nearest_column(w[:, c], grid, c)
        error = (w[:, c] - q) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        w[:, c] = q
    return w


def slow_nearest_column(w_R: Tensor, grid: Grid, c: int) -> Tensor:
    size = grid.scheme.group or 10**9
    scale = grid.scale_RG[:, c // size].double()
    zero = 0 if grid.zero_RG is None else grid.zero_RG[:, c // size].double()
    return ((w_R / scale + zero).clamp(-8, 7).round() - zero) * scale


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_gptq_is_obq_in_a_fixed_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compensate, "BLOCK", 24)  # no divisor of 64: blocks and groups do not agree
    w, h = weight(columns=64).double(), gram(64).double()
    grid = fit(w, SCHEMES[name], BF16)
    fast = gptq.compensate(w, grid, h, 0.01)
    slow = slow_obq(w, grid, h, 0.01)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)


@EVERY
def test_gptq_is_never_worse_than_rounding(scheme: Scheme) -> None:
    better = 0
    for seed in range(3):
        w, h = weight(seed=seed), gram(seed=seed + 5)
        plain, _ = plugins.load(METHODS, "rtn").quantize(w, scheme, BF16)
        solved, grid = gptq.quantize(w, scheme, BF16, h)
        old, new = (gptq.error(w, q, h) for q in (plain, solved))
        assert (new <= old).all()
        better += int((new < 0.9 * old).sum())
        assert (grid.nearest(solved) - solved).abs().max() < 1e-6  # on the grid that is returned
    assert better >= 10


@pytest.mark.parametrize("name", ["int4-g64", "int4-g64-asym"])
def test_a_row_that_got_worse_is_rounded_to_nearest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, w, h = SCHEMES[name], weight(), gram()
    good, grid = gptq.quantize(w, scheme, BF16, h)
    solve = gptq.compensate

    def spoilt(*given: Any) -> Tensor:
        found = solve(*given)
        found[2] = 0
        return found

    monkeypatch.setattr(gptq, "compensate", spoilt)
    found, mixed = gptq.quantize(w, scheme, BF16, h)
    plain = fit(w, scheme, BF16)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[2], plain.nearest(w)[2])
    assert torch.equal(mixed.scale_RG[2], plain.scale_RG[2])
    assert torch.equal(found[others], good[others])
    assert torch.equal(mixed.scale_RG[others], grid.scale_RG[others])
    assert (mixed.nearest(found) - found).abs().max() < 1e-6


def test_gptq_of_dead_inputs_and_without_text() -> None:
    w, h = weight(), gram()
    h[:, 5] = h[5] = 0
    solved, _ = gptq.quantize(w, SCHEMES["int4-g64"], BF16, h)
    assert solved.isfinite().all()
    plain, _ = plugins.load(METHODS, "rtn").quantize(w, SCHEMES["int4-g64"], BF16)
    assert torch.equal(gptq.quantize(w, SCHEMES["int4-g64"], BF16)[0], plain)
    assert torch.equal(gptq.quantize(w, SCHEMES["int4-g64"], BF16, 0 * h)[0], plain)


@EVERY
@pytest.mark.parametrize("name", plugins.names(METHODS))
def test_packing_loses_nothing(scheme: Scheme, name: str) -> None:
    """What compressed-tensors unpacks is the weight that the method gave; sizes are as foretold."""
    from compressed_tensors.compressors import BaseCompressor

    method = plugins.load(METHODS, name)
    w = weight(rows=11)  # no multiple of 8: zero points are packed along the rows
    q, grid = method.quantize(w, scheme, BF16, gram() if method.NEEDS_GRAM else None, 0.01)
    stored = packed(q, grid)
    assert {n: (tuple(t.shape), t.dtype) for n, t in stored.items()} == layout(
        tuple(w.shape), scheme, BF16
    )
    told = _scheme(scheme, ["Linear"])
    compressor = BaseCompressor.get_value_from_registry(told.format)
    wide = {n: t.float() if n == "weight_scale" else t for n, t in stored.items()}
    assert torch.equal(compressor.decompress(wide, told)["weight"], q)


def test_fake_quantization_passes_gradients_straight() -> None:
    w = weight().requires_grad_()
    scheme = SCHEMES["int4-g64"]
    grid = fit(w.detach(), scheme, BF16)
    q = fake_quantize(w, grid)
    assert torch.equal(q.detach(), grid.nearest(w.detach()))
    factor = torch.randn(w.shape, generator=torch.Generator().manual_seed(3))
    (q * factor).sum().backward()
    assert torch.equal(w.grad, factor)


def test_scheme_names_and_fallbacks_are_as_documented() -> None:
    assert find_scheme("int4") is SCHEMES["int4-g64"]
    with pytest.raises(UserError, match=r"no scheme named 'int5'.*there are: int4, int8"):
        find_scheme("int5")
    expected = {1184: "int4-g32", 128: "int4-g128", 192: "int4-g64", 100: "int8"}
    for columns, name in expected.items():
        assert SCHEMES["int4-g128"].fitting(columns).name == name
        ends = name + "-asym" if name != "int8" else name
        assert SCHEMES["int4-g128-asym"].fitting(columns).name == ends
    assert SCHEMES["int4-g64"].type.bytes(2, 128) == 2 * (128 * 4 + 2 * 16) / 8
    assert SCHEMES["int4-g64-asym"].type.bytes(2, 128) == 2 * (128 * 4 + 2 * 20) / 8
    assert SCHEMES["fp8"].type.bytes(2, 128) == 2 * (128 * 8 + 16) / 8
