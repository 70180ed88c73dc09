"""The contract of every file in training/losses, against definitions in float64 and by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from slow_losses import BETA, NAMES, SKEW, slow, slow_gradient
from torch import Tensor

from regrow import plugins
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights

LOSSES = plugins.names("regrow.training.losses")
DIVERGENCES = [n for n in LOSSES if plugins.load("regrow.training.losses", n).NEEDS_TEACHER]
# Logits whose softmax is (1/2, 1/2) for the student and (1/4, 3/4) for the teacher; target 0.
STUDENT, TEACHER, TARGET = [[0.0, 0.0]], [[0.0, math.log(3)]], [0]

every_loss = pytest.mark.parametrize("name", LOSSES)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def run(
    name: str, s: Tensor, t: Tensor, y: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Values [N] and gradient [N, V]; copies go in, because a loss may overwrite its inputs."""
    module = plugins.load("regrow.training.losses", name)
    options = {key: {"beta": BETA, "skew": SKEW}[key] for key in module.OPTIONS}
    found: tuple[Tensor, Tensor] = module.loss(s.clone(), t.clone(), y, temperature, **options)
    return found


def inputs(
    n: int = 7, v: int = 9, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    student, teacher = (scale * torch.randn(2, n, v, generator=draw, dtype=torch.float64)).to(dtype)
    return student, teacher, torch.randint(0, v, (n,), generator=draw)


def by_hand(p: float) -> dict[str, float]:
    """Each loss of a student (1/2, 1/2) and a teacher (p, 1 − p), written out."""

    def kl(a: tuple[float, float], b: tuple[float, float]) -> float:
        return a[0] * math.log(a[0] / b[0]) + a[1] * math.log(a[1] / b[1])

    def mixed(share: float) -> tuple[float, float]:
        return share * p + (1 - share) / 2, share * (1 - p) + (1 - share) / 2

    teacher, student = (p, 1 - p), (0.5, 0.5)
    return {
        "forward_kl": kl(teacher, student),
        "reverse_kl": kl(student, teacher),
        "jsd": 0.3 * kl(teacher, mixed(0.3)) + 0.7 * kl(student, mixed(0.3)),
        "skewed_kl": kl(teacher, mixed(0.1)),
        "skewed_reverse_kl": kl(student, mixed(0.9)),
        "total_variation": 0.5 - p,
    }


def test_every_loss_has_its_slow_version_and_its_hand_written_number() -> None:
    assert LOSSES == NAMES
    assert sorted(by_hand(0.25)) == DIVERGENCES


@every_loss
def test_hand_written_number(name: str) -> None:
    module = plugins.load("regrow.training.losses", name)
    assert isinstance(module.NEEDS_TEACHER, bool)
    assert "arXiv" in module.__doc__ or not module.NEEDS_TEACHER
    # At T = 2 the teacher is (1, √3) / (1 + √3), and T² = 4.
    expected = {1.0: math.log(2), 2.0: math.log(2)}
    if module.NEEDS_TEACHER:
        expected = {1.0: by_hand(0.25)[name], 2.0: 4 * by_hand(1 / (1 + math.sqrt(3)))[name]}
    s, t = (torch.tensor(x, dtype=torch.float64) for x in (STUDENT, TEACHER))
    for temperature, value in expected.items():
        found = run(name, s, t, torch.tensor(TARGET), temperature)[0]
        assert found.tolist() == pytest.approx([value], rel=1e-12)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value_and_gradient_equal_the_slow_version(name: str, temperature: float) -> None:
    s, t, y = inputs(n=20, v=50, scale=3.0)
    value_N, gradient_NV = run(name, s, t, y, temperature)
    torch.testing.assert_close(value_N, slow(name, s, t, y, temperature), rtol=1e-11, atol=1e-13)
    expected = slow_gradient(name, s, t, y, temperature)
    torch.testing.assert_close(gradient_NV, expected, rtol=1e-10, atol=1e-13)


@every_loss
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_by_finite_differences(name: str, temperature: float) -> None:
    s, t, y = inputs()
    gradient_NV = run(name, s, t, y, temperature)[1]
    assert gradient_NV.shape == s.shape
    step = 1e-6
    for place in range(s.shape[1]):
        bump = torch.zeros_like(s)
        bump[:, place] = step
        up, down = (run(name, s + sign * bump, t, y, temperature)[0] for sign in (1, -1))
        slope_N = (up - down) / (2 * step)
        torch.testing.assert_close(gradient_NV[:, place], slope_N, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("scale", [6.0, 40.0])
@every_divergence
def test_zero_when_equal(name: str, scale: float, temperature: float) -> None:
    for dtype in (torch.float32, torch.float64):
        s, _, y = inputs(n=40, v=500, scale=scale, dtype=dtype)
        value_N, gradient_NV = run(name, s, s, y, temperature)
        assert value_N.tolist() == [0.0] * 40
        assert not gradient_NV.any()


@every_loss
def test_never_negative_and_larger_when_further(name: str) -> None:
    s, t, y = inputs(n=30)
    far = run(name, s, t, y)[0]
    assert bool((far > 0).all())
    if name in DIVERGENCES:
        near = run(name, t + 0.1 * (s - t), t, y)[0]
        assert bool((near < far).all())


EXTREME: dict[str, Any] = {
    "disjoint peaks": ([80.0, 0.0, -80.0], [-80.0, 0.0, 80.0]),
    "probabilities that underflow": ([-200.0, 0.0, 5.0], [300.0, 0.0, -300.0]),
    "a sharp student": ([80.0, -80.0, -80.0], [0.1, 0.0, -0.1]),
    "a sharp teacher": ([0.1, 0.0, -0.1], [80.0, -80.0, -80.0]),
    "nearly equal": ([1.0, 0.0, -80.0], [1.001, 0.0, -79.0]),
}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("case", EXTREME)
@every_loss
def test_extreme_logits_in_float32(name: str, case: str, temperature: float) -> None:
    """Where a probability is 0 in float32, log space keeps value and gradient right."""
    s, t = (torch.tensor([logits]) for logits in EXTREME[case])
    rounding = 1e-6 + 2e-7 * float((t - s).abs().max())  # float32 holds their difference so far
    for target in range(3):
        y = torch.tensor([target])
        value_N, gradient_NV = run(name, s, t, y, temperature)
        expected = slow(name, s, t, y, temperature).float()
        torch.testing.assert_close(value_N, expected, rtol=1e-5, atol=rounding)
        slope = slow_gradient(name, s, t, y, temperature).float()
        torch.testing.assert_close(gradient_NV, slope, rtol=1e-5, atol=rounding)


@every_loss
@pytest.mark.parametrize("apart", [0.01, 1.0, 10.0])
def test_wide_logits_in_float32(name: str, apart: float) -> None:
    """Logits of ±80, the student's a given distance from the teacher's."""
    t, noise, y = inputs(n=30, v=1000, scale=25.0, dtype=torch.float32)
    s = t + apart / 25 * noise
    value_N, gradient_NV = run(name, s, t, y)
    value, slope = slow(name, s, t, y, 1.0), slow_gradient(name, s, t, y, 1.0)
    torch.testing.assert_close(value_N.double(), value, rtol=1e-4, atol=2e-6)
    assert float((gradient_NV.double() - slope).norm() / slope.norm()) < 1e-4


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["jsd", "skewed_kl", "skewed_reverse_kl"])
def test_bounds_of_the_mixtures(name: str, share: float) -> None:
    """Disjoint distributions reach the bound: the entropy of (β, 1 − β), and −log α."""
    s, t = torch.tensor([[80.0, -80.0]]), torch.tensor([[-80.0, 80.0]])
    loss = plugins.load("regrow.training.losses", name).loss
    option = "beta" if name == "jsd" else "skew"
    value_N, gradient_NV = loss(s, t, torch.tensor([0]), 1.0, **{option: share})
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    bound = entropy if name == "jsd" else -math.log(share)
    assert value_N.tolist() == pytest.approx([bound], rel=1e-5)
    assert bool(gradient_NV.isfinite().all())


def test_small_beta_is_the_forward_kl_and_large_the_reverse() -> None:
    s, t, y = inputs()
    loss = plugins.load("regrow.training.losses", "jsd").loss
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        found = loss(s.clone(), t.clone(), y, 1.0, beta=beta)[0] / min(beta, 1 - beta)
        torch.testing.assert_close(found, run(name, s, t, y)[0], rtol=1e-2, atol=0)


@every_loss
def test_rows_do_not_see_each_other(name: str) -> None:
    """Masking is leaving rows out: what is left gives the same as before, to the bit."""
    s, t, y = inputs()
    rows = torch.tensor([0, 3, 4])
    value_N, gradient_NV = run(name, s, t, y, 2.0)
    fewer_N, fewer_NV = run(name, s[rows], t[rows], y[rows], 2.0)
    torch.testing.assert_close(fewer_N, value_N[rows], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(fewer_NV, gradient_NV[rows], rtol=1e-14, atol=1e-14)


@every_loss
def test_chunked_equals_plain(name: str) -> None:
    """Through the head, in chunks that do not divide N; an identity head makes the logits."""
    s, t, y = inputs()
    eye = torch.eye(s.shape[1], dtype=torch.float64)
    value_N, gradient_NV = run(name, s, t, y, 2.0)
    for chunk in (1, 3, 7, 100):
        hidden = s.clone().requires_grad_()
        mix = LossWeights({name: 1.0}, 2.0, BETA, SKEW)
        total, _ = head_loss(hidden, Head(eye), y, mix, t, Head(eye), chunk_tokens=chunk)
        torch.testing.assert_close(total.detach(), value_N.sum(), rtol=1e-13, atol=1e-13)
        (found,) = torch.autograd.grad(total, (hidden,))
        torch.testing.assert_close(found, gradient_NV, rtol=1e-13, atol=1e-13)
