"""The methods that choose zeros, against slow references in float64, and what patterns promise."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from regrow import SparsifyConfig, UserError, plugins
from regrow.calibration import compensate
from regrow.checkpoint import bitmask
from regrow.config import parse
from regrow.sparsity import zeros
from regrow.sparsity.pattern import Sparsity, lowest
from regrow.sparsity.pattern import parse as parse_pattern
from regrow.stages.sparsify import METHODS
from regrow.stages.sparsify.methods import magnitude, sparsegpt, wanda

ROWS, COLUMNS, DAMPING = 6, 64, 0.01
TARGETS = [Sparsity(0.5), Sparsity(0.7), parse_pattern("2:4"), parse_pattern("4:8")]
BY_TARGET = pytest.mark.parametrize("target", TARGETS, ids=str)


def weight(seed: int = 0, columns: int = COLUMNS) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, columns, generator=draw, dtype=torch.float64)


def inputs(seed: int = 1, tokens: int = 200) -> Tensor:
    """Correlated inputs whose channels have very different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, COLUMNS, generator=draw, dtype=torch.float64)
    own = torch.randn(tokens, COLUMNS, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, 16, generator=draw, dtype=torch.float64) @ mix + own
    sizes = torch.logspace(-1, 1, COLUMNS, dtype=torch.float64)
    return x * sizes[torch.randperm(COLUMNS, generator=draw)]


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def slow_zeros(score: list[list[float]], target: Sparsity, per_row: bool) -> set[tuple[int, int]]:
    """The places of the lowest scores, by sorting lists."""
    rows, columns = range(len(score)), range(len(score[0]))
    if target.of:
        groups = [
            [(r, c) for c in range(begin, begin + target.of)]
            for r in rows
            for begin in range(0, len(columns), target.of)
        ]
    elif per_row:
        groups = [[(r, c) for c in columns] for r in rows]
    else:
        groups = [list(itertools.product(rows, columns))]
    chosen: set[tuple[int, int]] = set()
    for group in groups:
        count = target.of - target.keep if target.of else round(target.share * len(group))
        chosen |= set(sorted(group, key=lambda place: score[place[0]][place[1]])[:count])
    return chosen


def without(w: Tensor, places: set[tuple[int, int]]) -> Tensor:
    w = w.clone()
    for row, column in places:
        w[row, column] = 0
    return w


@BY_TARGET
def test_magnitude(target: Sparsity) -> None:
    w = weight()
    expected = without(w, slow_zeros(w.abs().tolist(), target, per_row=False))
    assert torch.equal(magnitude.sparsify(w, target), expected.float())


@BY_TARGET
def test_wanda(target: Sparsity) -> None:
    w, x = weight(), inputs()
    norms = [sum(float(v) ** 2 for v in x[:, c]) ** 0.5 for c in range(COLUMNS)]
    score = [[abs(float(w[r, c])) * norms[c] for c in range(COLUMNS)] for r in range(ROWS)]
    expected = without(w, slow_zeros(score, target, per_row=True))
    assert torch.equal(wanda.sparsify(w, target, second_moment(x)), expected.float())
    assert not torch.equal(expected.float(), magnitude.sparsify(w, target))


def slow_sparsegpt(w: Tensor, target: Sparsity, h: Tensor, block: int) -> Tensor:
    """Optimal brain surgeon in a fixed order of columns, with a new inverse for each column.

    After w_c has become q_c, the columns F that remain are solved anew for the least error of the
    output: δ_F = −(w_c − q_c) / [H_F∪c⁻¹]_cc · [H_F∪c⁻¹]_Fc. A block's zeros are the weights of
    lowest w_c² / [H_F∪c⁻¹]_cc at its beginning.
    """
    h = h + DAMPING * h.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    w = w.clone()
    size = target.of or block
    gone: set[tuple[int, int]] = set()
    for c in range(COLUMNS):
        if c % size == 0:
            width = min(size, COLUMNS - c)
            cost = [float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(c, c + width)]
            score = (w[:, c : c + width].square() / torch.tensor(cost)).tolist()
            gone |= {(r, c + j) for r, j in slow_zeros(score, target, per_row=False)}
        inverse = torch.linalg.inv(h[c:, c:])
        for r in range(ROWS):
            q = 0.0 if (r, c) in gone else float(w[r, c])
            w[r, c:] -= (w[r, c] - q) / inverse[0, 0] * inverse[0]
            w[r, c] = q
    return w


@BY_TARGET
def test_sparsegpt_is_the_optimal_brain_surgeon(
    target: Sparsity, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compensate, "BLOCK", 24)  # no divisor of 64, and a multiple of 4 and 8
    w, h = weight(), second_moment(inputs())
    fast = sparsegpt.sparsify(w, target, h, DAMPING)
    slow = slow_sparsegpt(w, target, h, 24)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-9)
    assert ((fast != 0) & (fast != w)).any()  # the weights that stay made up for the others


@BY_TARGET
def test_compensation_lowers_the_error(target: Sparsity) -> None:
    w, x = weight(), inputs()
    h = second_moment(x)
    errors = {}
    for name in ("magnitude", "wanda", "sparsegpt"):
        off = plugins.load(METHODS, name).sparsify(w, target, h).double() - w
        errors[name] = float((x @ off.T).norm())
    assert errors["sparsegpt"] < 0.95 * errors["wanda"] < 0.95 * errors["magnitude"]


@BY_TARGET
@pytest.mark.parametrize("name", plugins.names(METHODS))
def test_every_method_gives_the_zeros_that_were_asked_for(name: str, target: Sparsity) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        w = weight().to(dtype)
        found = plugins.load(METHODS, name).sparsify(w, target, second_moment(inputs()), DAMPING)
        zero = found == 0
        places = ROWS if name == "wanda" else 1  # each row is rounded
        assert abs(int(zero.sum()) - target.share * w.numel()) <= places / 2
        if target.of:
            assert (zero.view(-1, target.of).sum(1) == target.of - target.keep).all()


@pytest.mark.parametrize("name", plugins.names(METHODS))
def test_more_sparsity_keeps_the_zeros_there_are(name: str) -> None:
    method, h = plugins.load(METHODS, name), second_moment(inputs())
    first = method.sparsify(weight(), Sparsity(0.5), h, DAMPING)
    second = method.sparsify(first, Sparsity(0.7), h, DAMPING)
    assert (second[first == 0] == 0).all()
    assert zeros.share(second) == pytest.approx(0.7, abs=0.01)
    third = method.sparsify(first, parse_pattern("2:4"), h, DAMPING)
    assert (third[first == 0] == 0).all()
    assert ((third == 0).view(-1, 4).sum(1) >= 2).all()


@pytest.mark.parametrize("first_share", [0.2, 0.5])
@pytest.mark.parametrize("name", plugins.names(METHODS))
def test_zeros_that_lie_unevenly_stay_and_count(
    name: str, first_share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most of the first zeros are in the first columns; the share of the second round is exact."""
    monkeypatch.setattr(compensate, "BLOCK", 24)
    w = weight()
    w[:, :32] *= 0.2
    first = magnitude.sparsify(w, Sparsity(first_share)).double()
    method, h = plugins.load(METHODS, name), second_moment(inputs())
    for share in (first_share, 0.7):
        second = method.sparsify(first, Sparsity(share), h, DAMPING)
        assert (second[first == 0] == 0).all()
        if name == "wanda":  # counts in each row: rows with more zeros keep them
            rows = torch.maximum((first == 0).sum(1), torch.tensor(round(share * COLUMNS)))
            assert torch.equal((second == 0).sum(1), rows)
        else:
            assert zeros.share(second) == pytest.approx(share, abs=0.005)


def test_the_zeros_of_a_later_round_are_the_lowest_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By lists, for the first block, in which no weight has been changed yet."""
    monkeypatch.setattr(compensate, "BLOCK", 24)
    w, h = weight(), second_moment(inputs())
    w[:, ::3] = 0
    found = sparsegpt.sparsify(w, Sparsity(0.6), h, DAMPING)
    damped = h + DAMPING * h.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    cost = [float(torch.linalg.inv(damped[c:, c:])[0, 0]) for c in range(24)]
    free = [(r, c) for r in range(ROWS) for c in range(24) if c % 3]
    held = ROWS * len(range(0, COLUMNS, 3))
    share = (0.6 * ROWS * COLUMNS - held) / (ROWS * COLUMNS - held)
    order = sorted(free, key=lambda place: float(w[place]) ** 2 / cost[place[1]])
    lowest_ones = set(order[: round(share * len(free))])
    assert {place for place in free if found[place] == 0} == lowest_ones


def test_equal_scores_and_dead_inputs() -> None:
    assert lowest(torch.ones(2, 4), 2).tolist() == [[True, True, False, False]] * 2
    assert not lowest(torch.ones(2, 4), 0).any()
    h = second_moment(inputs())
    h[:, 5] = h[5] = 0
    for name in ("wanda", "sparsegpt"):
        found = plugins.load(METHODS, name).sparsify(weight(), Sparsity(0.5), h, DAMPING)
        assert found.isfinite().all()
        assert zeros.share(found) == 0.5
    nothing = plugins.load(METHODS, "sparsegpt").sparsify(weight(), Sparsity(0.5), 0 * h, DAMPING)
    assert nothing.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [64, 61])
def test_the_bitmask_loses_nothing(dtype: torch.dtype, columns: int) -> None:
    w = magnitude.sparsify(weight(columns=columns), Sparsity(0.7)).to(dtype)
    w[2] = 0
    stored = bitmask.pack(w)
    assert torch.equal(bitmask.unpack(stored), w)
    size = sum(part.numel() * part.itemsize for part in stored.values())
    values = int((w != 0).sum())
    assert size == bitmask.stored_bytes(tuple(w.shape), values, w.itemsize)
    assert tuple(sorted(stored)) == bitmask.PARTS


REFUSED = {
    "out of range": (
        {"sparsity": 1.0},
        r"1 is out of range: give the share .* above 0 and below 1",
    ),
    "negative": ({"sparsity": -0.1}, "-0.1 is out of range"),
    "all of them": ({"pattern": "4:4"}, "'4:4' is no N:M: of M consecutive weights N stay"),
    "turned round": ({"pattern": "4:2"}, "'4:2' is no N:M"),
    "no pattern": ({"pattern": "half"}, "'half' is no N:M"),
    "odd": ({"pattern": "2:5"}, "M one of 2, 4, 8, 16, 32"),
    "both": ({"sparsity": 0.5, "pattern": "2:4"}, "exclude each other"),
    "method": ({"method": "sparsegtp"}, "no method named 'sparsegtp' — did you mean 'sparsegpt'"),
    "keep": ({"keep": ["("]}, "is not a regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        parse(SparsifyConfig, fields, "sparsify")
    assert "\n" not in str(caught.value)
