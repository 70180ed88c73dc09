"""The contract of every file in training/losses: values by hand, gradients by differences."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

from regrow import plugins
from regrow.training.head import Head, Mix, head_loss

LOSSES = plugins.names("regrow.training.losses")
DIVERGENCES = [n for n in LOSSES if plugins.load("regrow.training.losses", n).NEEDS_TEACHER]
LN2, LN3 = math.log(2), math.log(3)
# Logits whose softmax is (1/2, 1/2) for the student and (1/4, 3/4) for the teacher; target 0.
STUDENT, TEACHER, TARGET = [[0.0, 0.0]], [[0.0, LN3]], [0]
BY_HAND = {
    "forward_kl": {1.0: 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)},
    "cross_entropy": {1.0: LN2, 2.0: LN2},
}
# At T = 2 the teacher is (1, √3) / (1 + √3); times T².
P = 1 / (1 + math.sqrt(3))
BY_HAND["forward_kl"][2.0] = 4 * (P * math.log(2 * P) + (1 - P) * math.log(2 * (1 - P)))


@pytest.fixture(params=LOSSES)
def module(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("regrow.training.losses", request.param)


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def inputs(
    n: int = 7, v: int = 9, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    student, teacher = (scale * torch.randn(2, n, v, generator=draw, dtype=torch.float64)).to(dtype)
    return student, teacher, torch.randint(0, v, (n,), generator=draw)


def values(module: ModuleType, s: Tensor, t: Tensor, y: Tensor, temperature: float) -> Tensor:
    """The values [N]; copies go in, because a loss may overwrite its inputs."""
    value: Tensor = module.loss(s.clone(), t.clone(), y, temperature)[0]
    return value


def test_every_loss_has_a_hand_written_number() -> None:
    assert set(BY_HAND) == set(LOSSES)


def test_hand_written_number(module: ModuleType) -> None:
    assert isinstance(module.NEEDS_TEACHER, bool)
    assert module.__doc__
    for temperature, expected in BY_HAND[name_of(module)].items():
        found = values(
            module,
            torch.tensor(STUDENT, dtype=torch.float64),
            torch.tensor(TEACHER, dtype=torch.float64),
            torch.tensor(TARGET),
            temperature,
        )
        assert found.tolist() == pytest.approx([expected], rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_by_finite_differences(module: ModuleType, temperature: float) -> None:
    s, t, y = inputs()
    gradient_NV = module.loss(s.clone(), t.clone(), y, temperature)[1]
    assert gradient_NV.shape == s.shape
    step = 1e-6
    for place in range(s.shape[1]):
        bump = torch.zeros_like(s)
        bump[:, place] = step
        up, down = (values(module, s + sign * bump, t, y, temperature) for sign in (1, -1))
        slope_N = (up - down) / (2 * step)
        torch.testing.assert_close(gradient_NV[:, place], slope_N, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_zero_when_equal(name: str, temperature: float) -> None:
    module = plugins.load("regrow.training.losses", name)
    for dtype in (torch.float32, torch.float64):
        s, _, y = inputs(n=40, v=500, scale=6.0, dtype=dtype)
        value_N, gradient_NV = module.loss(s.clone(), s.clone(), y, temperature)
        assert value_N.tolist() == [0.0] * 40
        assert not gradient_NV.any()


def test_never_negative_and_larger_when_further(module: ModuleType) -> None:
    s, t, y = inputs(n=30)
    far = values(module, s, t, y, 1.0)
    assert bool((far > 0).all())
    if module.NEEDS_TEACHER:
        near = values(module, t + 0.1 * (s - t), t, y, 1.0)
        assert bool((near < far).all())


def test_extreme_logits_stay_finite(module: ModuleType) -> None:
    """A target of probability 0 in float32: log space keeps value and gradient right."""
    s, t = torch.tensor([[-200.0, 0.0, 5.0]]), torch.tensor([[300.0, 0.0, -300.0]])
    value_N, gradient_NV = module.loss(s.clone(), t.clone(), torch.tensor([0]), 1.0)
    assert value_N.tolist() == pytest.approx([205.0067], rel=1e-5)
    torch.testing.assert_close(gradient_NV, torch.tensor([[-1.0, 0.00669285, 0.99330715]]))


def test_rows_do_not_see_each_other(module: ModuleType) -> None:
    """Masking is leaving rows out: what is left gives the same as before, to the bit."""
    s, t, y = inputs()
    rows = torch.tensor([0, 3, 4])
    value_N, gradient_NV = module.loss(s.clone(), t.clone(), y, 2.0)
    fewer_N, fewer_NV = module.loss(s[rows], t[rows], y[rows], 2.0)
    torch.testing.assert_close(fewer_N, value_N[rows], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fewer_NV, gradient_NV[rows], rtol=1e-14, atol=1e-14)


def test_chunked_equals_plain(module: ModuleType) -> None:
    """Through the head, in chunks that do not divide N; an identity head makes the logits."""
    s, t, y = inputs()
    eye = torch.eye(s.shape[1], dtype=torch.float64)
    value_N, gradient_NV = module.loss(s.clone(), t.clone(), y, 2.0)
    for chunk in (1, 3, 7, 100):
        hidden = s.clone().requires_grad_()
        mix = Mix({name_of(module): 1.0}, 2.0)
        total, _ = head_loss(hidden, Head(eye), y, mix, t, Head(eye), chunk_tokens=chunk)
        torch.testing.assert_close(total.detach(), value_N.sum(), rtol=1e-13, atol=1e-13)
        (found,) = torch.autograd.grad(total, (hidden,))
        torch.testing.assert_close(found, gradient_NV, rtol=1e-13, atol=1e-13)
