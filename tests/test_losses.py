"""The contract of every file in training/losses, against definitions in float64 and by hand.

A loss that is only a formula (it defines `loss`) is its own definition: a new file needs no entry
here. A file with a written gradient (`loss_and_gradient`) has its definition in `slow_losses.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import doc_pages
import pytest
import torch
from slow_losses import BETA, FUSED, NAMES, SKEW, slow, slow_gradient
from tiny_folders import write_model, write_text
from tiny_job import call
from tiny_training import Largest
from torch import Tensor

from regrow import plugins
from regrow.runtime.chunks import CHUNKS_TOGETHER
from regrow.stages.distill.config import DistillConfig
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights, with_gradient

LOSSES = plugins.names("regrow.training.losses")
DIVERGENCES = [n for n in LOSSES if plugins.load("regrow.training.losses", n).NEEDS_TEACHER]
# Logits whose softmax is (1/2, 1/2) for the student and (1/4, 3/4) for the teacher; target 0.
STUDENT, TEACHER, TARGET = [[0.0, 0.0]], [[0.0, math.log(3)]], [0]

every_loss = pytest.mark.parametrize("name", LOSSES)
every_written_gradient = pytest.mark.parametrize("name", FUSED)
every_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def run(
    name: str, s: Tensor, t: Tensor, y: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Values [N] and gradient [N, V]; copies go in, because a loss may overwrite its inputs."""
    module = plugins.load("regrow.training.losses", name)
    options = {key: {"beta": BETA, "skew": SKEW}[key] for key in module.OPTIONS}
    return with_gradient(module)(s.clone(), t.clone(), y, temperature, **options)


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


def test_every_written_gradient_has_its_slow_version_and_its_hand_written_number() -> None:
    assert FUSED == NAMES
    assert sorted(by_hand(0.25)) == [name for name in NAMES if name in DIVERGENCES]


@every_loss
def test_every_loss_file_defines_what_it_needs(name: str) -> None:
    module = plugins.load("regrow.training.losses", name)
    assert isinstance(module.NEEDS_TEACHER, bool)
    assert "arXiv" in module.__doc__ or not module.NEEDS_TEACHER
    assert hasattr(module, "loss") != hasattr(module, "loss_and_gradient")
    assert set(module.OPTIONS) <= set(vars(LossWeights({name: 1.0})))


@every_written_gradient
def test_every_loss_equals_its_hand_computed_number(name: str) -> None:
    module = plugins.load("regrow.training.losses", name)
    # At T = 2 the teacher is (1, √3) / (1 + √3), and T² = 4.
    expected = {1.0: math.log(2), 2.0: math.log(2)}
    if module.NEEDS_TEACHER:
        expected = {1.0: by_hand(0.25)[name], 2.0: 4 * by_hand(1 / (1 + math.sqrt(3)))[name]}
    s, t = (torch.tensor(x, dtype=torch.float64) for x in (STUDENT, TEACHER))
    for temperature, value in expected.items():
        actual = run(name, s, t, torch.tensor(TARGET), temperature)[0]
        assert actual.tolist() == pytest.approx([value], rel=1e-12)


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
        rounding = 0.0 if name in FUSED else 1e3 * torch.finfo(dtype).eps
        assert float(value_N.abs().max()) <= rounding
        assert float(gradient_NV.abs().max()) <= rounding


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
@pytest.mark.parametrize("distance", [0.01, 1.0, 10.0])
def test_wide_logits_in_float32(name: str, distance: float) -> None:
    """Logits of ±80, the student's a given distance from the teacher's."""
    t, noise, y = inputs(n=30, v=1000, scale=25.0, dtype=torch.float32)
    s = t + distance / 25 * noise
    value_N, gradient_NV = run(name, s, t, y)
    value, slope = slow(name, s, t, y, 1.0), slow_gradient(name, s, t, y, 1.0)
    torch.testing.assert_close(value_N.double(), value, rtol=1e-4, atol=2e-6)
    assert float((gradient_NV.double() - slope).norm() / slope.norm()) < 1e-4


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("name", ["jsd", "skewed_kl", "skewed_reverse_kl"])
def test_bounds_of_the_mixtures(name: str, share: float) -> None:
    """Disjoint distributions reach the bound: the entropy of (β, 1 − β), and −log α."""
    s, t = torch.tensor([[80.0, -80.0]]), torch.tensor([[-80.0, 80.0]])
    loss = plugins.load("regrow.training.losses", name).loss_and_gradient
    option = "beta" if name == "jsd" else "skew"
    value_N, gradient_NV = loss(s, t, torch.tensor([0]), 1.0, **{option: share})
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    bound = entropy if name == "jsd" else -math.log(share)
    assert value_N.tolist() == pytest.approx([bound], rel=1e-5)
    assert bool(gradient_NV.isfinite().all())


def test_small_beta_is_the_forward_kl_and_large_the_reverse() -> None:
    s, t, y = inputs()
    loss = plugins.load("regrow.training.losses", "jsd").loss_and_gradient
    for beta, name in ((1e-6, "forward_kl"), (1 - 1e-6, "reverse_kl")):
        scaled = loss(s.clone(), t.clone(), y, 1.0, beta=beta)[0] / min(beta, 1 - beta)
        torch.testing.assert_close(scaled, run(name, s, t, y)[0], rtol=1e-2, atol=0)


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
        (gradient,) = torch.autograd.grad(total, (hidden,))
        torch.testing.assert_close(gradient, gradient_NV, rtol=1e-13, atol=1e-13)


ADDED = "squared_log_ratio"


@pytest.fixture
def added(tmp_path: Path) -> Iterator[str]:
    """The loss of docs/add-a-loss.md, which is only a formula; nothing else knows of it."""
    with doc_pages.written("add-a-loss.md", tmp_path):
        yield ADDED


def test_the_page_on_losses_adds_a_loss(
    added: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract runs on it, and the page's command trains with it."""
    assert ADDED in plugins.names("regrow.training.losses")
    test_every_loss_file_defines_what_it_needs(added)
    for temperature in (0.5, 1.0, 4.0):
        test_value_and_gradient_equal_the_slow_version(added, temperature)
        test_gradient_by_finite_differences(added, temperature)
    for case in EXTREME:
        test_extreme_logits_in_float32(added, case, 1.0)
    test_zero_when_equal(added, 6.0, 3.0)
    test_never_negative_and_larger_when_further(added)
    test_wide_logits_in_float32(added, 1.0)
    test_rows_do_not_see_each_other(added)
    test_chunked_equals_plain(added)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("student", "teacher")):
        write_model(Path(name), num_hidden_layers=1 + seed)
    write_text(Path("text.jsonl"))
    for arguments in doc_pages.commands("add-a-loss.md"):
        call(*arguments)
    rows = [json.loads(line) for line in Path("better/metrics.jsonl").read_text().splitlines()]
    assert all(row[ADDED] > 0 for row in rows if "loss" in row)


def test_a_formula_in_a_config_beside_another_loss(added: str) -> None:
    config = DistillConfig(losses={added: 0.25, "forward_kl": 0.5})
    s, t, y = inputs()
    head = Head(torch.eye(s.shape[1], dtype=torch.float64))
    hidden = s.clone().requires_grad_()
    total, parts = head_loss(hidden, head, y, LossWeights(config.losses), t, head, chunk_tokens=3)
    plain = s.clone().requires_grad_()
    log_q, log_p = plain.log_softmax(-1), t.log_softmax(-1)
    squares = (log_p.exp() * (log_q - log_p).square()).sum() / 2
    expected = 0.25 * squares + 0.5 * (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parts[added], squares.detach(), rtol=1e-12, atol=0)
    pair_gradients = [
        torch.autograd.grad(value, x)[0] for value, x in ((total, hidden), (expected, plain))
    ]
    torch.testing.assert_close(*pair_gradients, rtol=1e-11, atol=1e-13)


@every_written_gradient
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_autograd_in_place_of_a_written_gradient(
    name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the file's gradient, with its formula: values and gradients stay the same."""
    s, t, y = inputs(n=20, v=50)
    hidden = s.clone().requires_grad_()
    weight = torch.randn(30, 50, dtype=torch.float64, requires_grad=True)
    other = Head(torch.randn(30, 50, dtype=torch.float64))
    loss_weights = LossWeights({name: 0.7}, temperature, BETA, SKEW)

    def gradients() -> list[Tensor]:
        total, _ = head_loss(hidden, Head(weight), y % 30, loss_weights, t, other, 7)
        return [total.detach(), *torch.autograd.grad(total, (hidden, weight))]

    written = gradients()
    module = plugins.load("regrow.training.losses", name)
    formula = partial(slow, name)
    monkeypatch.delattr(module, "loss_and_gradient")
    monkeypatch.setattr(module, "OPTIONS", ())
    monkeypatch.setattr(module, "loss", formula, raising=False)
    for actual, expected in zip(gradients(), written, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_a_formula_takes_the_memory_of_a_chunk(added: str) -> None:
    """The largest tensor has the logits of the chunks that are multiplied at once, not all."""
    n, v, chunk = 512, 300, 8
    hidden = torch.randn(n, 16, requires_grad=True)
    head, targets = Head(torch.randn(v, 16)), torch.zeros(n, dtype=torch.int64)
    teacher_NH, loss_weights = torch.randn(n, 16), LossWeights({added: 1.0})
    with Largest(ignored=set()) as largest:
        total, _ = head_loss(hidden, head, targets, loss_weights, teacher_NH, head, chunk)
        total.backward()  # type: ignore[no-untyped-call]
    assert largest.elements <= CHUNKS_TOGETHER * chunk * v


def test_a_formula_without_a_value_per_token_is_named(
    added: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = plugins.load("regrow.training.losses", added)
    monkeypatch.setattr(module, "loss", lambda s, *_: s.mean())
    with pytest.raises(ValueError, match=r"squared_log_ratio: loss returned the shape \[\]; it mu"):
        run(added, *inputs())
