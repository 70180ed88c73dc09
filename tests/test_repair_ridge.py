"""The ridge regression of a layer, by tokens and by sums, against least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from regrow.pruning.repair import _ridge
from regrow.pruning.repair._ridge import Observations, refit

IN, OUT = 24, 40
RIDGES = (1e-2, 1e-1, 1.0)


def drawn(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """A weight [out, in], inputs [tokens, in] with large and small channels, noisy targets."""
    weight, true = (_normal(OUT, IN, seed) for seed in (100, 101))
    x, noise = _normal(tokens, IN, 2 * seed), _normal(tokens, OUT, 2 * seed + 1)
    x *= torch.logspace(-1, 1, IN, dtype=torch.float64)
    return tuple(each.to(dtype) for each in (weight, x, x @ (weight + 0.3 * true).T + 3 * noise))


def _normal(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def observed(weight: Tensor, x: Tensor, t: Tensor, batch: int = 7) -> Observations:
    seen = Observations(weight)
    for some_x, some_t in zip(x.split(batch), t.split(batch), strict=True):
        seen.add(some_x, some_t)
    return seen


def slow(weight: Tensor, x: Tensor, t: Tensor, ridge: float) -> Tensor:
    """argmin |W' x − t|² + λ |W' − W|², as least squares with the penalty as more rows."""
    root = (ridge * x.square().sum() / x.shape[1]).sqrt() * torch.eye(IN, dtype=x.dtype)
    left, right = torch.cat([x, root]), torch.cat([t - x @ weight.T, torch.zeros(IN, OUT).double()])
    return weight + torch.linalg.lstsq(left, right).solution.T


@pytest.mark.parametrize("tokens", [5, IN, IN + 1, 200])
@pytest.mark.parametrize("ridge", RIDGES)
def test_new_weights_are_least_squares_solutions(tokens: int, ridge: float) -> None:
    weight, x, t = drawn(tokens)
    fit = observed(weight, x, t)
    assert (fit.tokens is None) == (tokens > IN)
    solution = refit(weight, fit, observed(weight, x, t), (ridge,))
    assert solution.ridge == ridge
    torch.testing.assert_close(solution.weight, slow(weight, x, t, ridge))


@pytest.mark.parametrize("tokens", [9, 60])
def test_errors_are_those_of_the_validation_tokens(tokens: int) -> None:
    weight, x, t = drawn(200)
    _, other_x, other_t = drawn(tokens, seed=1)
    solution = refit(weight, observed(weight, x, t), observed(weight, other_x, other_t), (1.0,))
    for w, error in ((weight, solution.error_before), (solution.weight, solution.error_after)):
        found = (other_x @ w.T - other_t).norm() / other_t.norm()
        assert error == pytest.approx(float(found), rel=1e-9)


@pytest.mark.parametrize("fitted", [20, 300])
@pytest.mark.parametrize("validated", [11, 300])
def test_the_best_ridge_is_chosen(
    fitted: int, validated: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All candidates are compared in the slow way; few tokens and many choose different ones."""
    monkeypatch.setattr(_ridge, "CHOOSING_ROWS", OUT)
    weight, x, t = drawn(fitted)
    _, other_x, other_t = drawn(validated, seed=1)
    errors = {
        ridge: float((other_x @ slow(weight, x, t, ridge).T - other_t).norm()) for ridge in RIDGES
    }
    best = min(errors, key=errors.__getitem__)
    solution = refit(weight, observed(weight, x, t), observed(weight, other_x, other_t), RIDGES)
    assert solution.ridge == best
    torch.testing.assert_close(solution.weight, slow(weight, x, t, best))


def test_some_rows_choose_what_all_rows_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x, t = drawn(300, dtype=torch.float32)
    _, other_x, other_t = drawn(100, seed=1, dtype=torch.float32)
    fit, validate = observed(weight, x, t), observed(weight, other_x, other_t)
    whole = refit(weight, fit, validate, RIDGES)
    monkeypatch.setattr(_ridge, "CHOOSING_ROWS", 8)
    some = refit(weight, fit, validate, RIDGES)
    assert some.ridge == whole.ridge is not None
    assert torch.equal(some.weight, whole.weight)


def test_weights_stay_if_no_ridge_lowers_the_error() -> None:
    weight, x, _ = drawn(200)
    exact = observed(weight, x, x @ weight.T)
    _, noisy_x, noisy_t = drawn(200, seed=1)
    solution = refit(weight, observed(weight, noisy_x, noisy_t), exact, RIDGES)
    assert solution.ridge is None
    assert torch.equal(solution.weight, weight)
    assert refit(weight, exact, exact, ()).ridge is None
