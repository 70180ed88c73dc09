"""What half precision costs in the chunked head, and what memory the chunks save."""

from __future__ import annotations

import pytest
import torch
from test_head import MIXES, Case
from tiny_training import Largest
from torch import Tensor

from regrow.training.head import Head, head_loss


def frobenius(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def autocast_errors(
    hidden: Tensor, student_VH: Tensor, teacher_VH: Tensor
) -> dict[str, tuple[float, float]]:
    """Relative error of the gradients by (hidden, weight): ours, and with a softmax in bfloat16.

    Against float64 over the same inputs, rounded to bfloat16.
    """
    x, w, t = hidden.bfloat16(), student_VH.bfloat16(), teacher_VH.bfloat16()
    q, p = ((x.double() @ y.double().T).softmax(-1) for y in (w, t))
    exact = (q - p) @ w.double(), (q - p).T @ x.double()
    student_NH, student = hidden.clone().requires_grad_(), Head(student_VH.clone().requires_grad_())
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = head_loss(student_NH, student, targets, MIXES["kl"], x, Head(t), chunk_tokens=16)
    ours = torch.autograd.grad(value, (student_NH, student.weight_VH))
    assert [found.dtype for found in (value, *ours)] == [torch.float32] * 3
    low = (x @ w.T).softmax(-1) - (x @ t.T).softmax(-1)
    coarse = low @ w, low.T @ x
    return {
        "ours": (frobenius(ours[0], exact[0]), frobenius(ours[1], exact[1])),
        "bf16 softmax": (frobenius(coarse[0], exact[0]), frobenius(coarse[1], exact[1])),
    }


def test_gradient_error_of_bfloat16_products() -> None:
    """1.0 % by hidden and 0.9 % by weight at 0.5 nats from the teacher: logits rounded to bf16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(96, 64), torch.randn(4096, 64) / 8
    errors = autocast_errors(hidden, weight, weight + torch.randn(4096, 64) / 8)
    assert max(errors["ours"]) < 2e-2, errors


def test_softmax_and_accumulation_are_float32() -> None:
    """Where bf16 holds the logits exactly, 0.2 % is left (rounding q − p); bf16 softmax: 9 %."""
    torch.manual_seed(0)
    hidden = torch.eye(64)  # so that a logit is a weight, and a small multiple of 1/32
    weight = torch.randint(-64, 65, (4096, 64)) / 32
    errors = autocast_errors(hidden, weight, weight + torch.randint(-1, 2, (4096, 64)) / 32)
    assert max(errors["ours"]) < 3e-3, errors
    assert min(errors["bf16 softmax"]) > 10 * max(errors["ours"]), errors


def test_the_loss_is_not_rounded_by_autocast() -> None:
    case = Case(torch.float32, sizes=(200, 16, 97, 97))
    with torch.autocast("cpu", torch.bfloat16):
        value, parts = case.chunked(MIXES["mix"])
    expected = 0.7 * parts["forward_kl"] + 0.3 * parts["cross_entropy"]
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-6)


def largest_of_head(n: int, v: int) -> tuple[int, torch.Size]:
    case = Case(torch.float32, sizes=(n, 8, v, v))
    weight = case.student.weight_VH.shape
    with Largest({weight, weight[::-1], case.teacher.weight_VH.shape}) as seen:
        value, _ = case.chunked(MIXES["mix"])
        case.gradients(value)
    return seen.elements, seen.shape


def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor beside the weights is one chunk of logits, whatever N and V are."""
    budget = 1 << 12
    monkeypatch.setattr("regrow.training.head.CHUNK_ELEMENTS", budget)
    small, big = largest_of_head(100, 128), largest_of_head(200, 256)
    assert small[0] <= budget, small
    assert big[0] <= budget, big
    assert small[0] >= budget // 2  # and the chunk is used, not one token at a time
