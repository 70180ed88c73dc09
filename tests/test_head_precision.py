"""What half precision costs in the chunked head, and what memory the chunks save."""

from __future__ import annotations

import pytest
import torch
from slow_losses import BETA, NAMES, SKEW, slow_gradient
from test_head import MIXES, Case
from tiny_training import Largest
from torch import Tensor

from regrow.runtime.chunks import CHUNKS_TOGETHER
from regrow.training.head import Head, add_product, head_loss, product, split
from regrow.training.loss_weights import LossWeights


def frobenius(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def autocast_errors(
    hidden: Tensor, student_VH: Tensor, teacher_VH: Tensor, mix: LossWeights = MIXES["kl"]
) -> dict[str, tuple[float, float]]:
    """Relative error of the gradients by (hidden, weight): ours, and with a softmax in bfloat16.

    Against float64 over the same inputs, rounded to bfloat16.
    """
    x, w, t = hidden.bfloat16(), student_VH.bfloat16(), teacher_VH.bfloat16()
    targets = torch.zeros(len(hidden), dtype=torch.int64)
    logits = [x.double() @ y.double().T for y in (w, t)]
    slope = torch.stack(
        [
            weight * slow_gradient(name, *logits, targets, mix.temperature)
            for name, weight in mix.weights.items()
        ]
    ).sum(0)
    exact = slope @ w.double(), slope.T @ x.double()
    student_NH, student = hidden.clone().requires_grad_(), Head(student_VH.clone().requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = head_loss(student_NH, student, targets, mix, x, Head(t), chunk_tokens=16)
    gradients = torch.autograd.grad(value, (student_NH, student.weight_VH))
    assert [tensor.dtype for tensor in (value, *gradients)] == [torch.float32] * 3
    low = (x @ w.T).softmax(-1) - (x @ t.T).softmax(-1)
    coarse = low @ w, low.T @ x
    return {
        "ours": (frobenius(gradients[0], exact[0]), frobenius(gradients[1], exact[1])),
        "bf16 softmax": (frobenius(coarse[0], exact[0]), frobenius(coarse[1], exact[1])),
    }


def half_a_nat_apart() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(96, 64), torch.randn(4096, 64) / 8
    return hidden, weight, weight + torch.randn(4096, 64) / 8


def test_gradient_error_of_bfloat16_products() -> None:
    """1.0 % by hidden and 0.9 % by weight at 0.5 nats from the teacher: logits rounded to bf16."""
    errors = autocast_errors(*half_a_nat_apart())
    assert max(errors["ours"]) < 2e-2, errors


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_gradient_error_of_exact_products(name: str, temperature: float) -> None:
    """0.003 %: what rounding to bfloat16 leaves out is made up for."""
    weights = dict.fromkeys(NAMES, 1.0) if name == "all" else {name: 1.0}
    mix = LossWeights(weights, temperature, BETA, SKEW, exact=True)
    errors = autocast_errors(*half_a_nat_apart(), mix)
    assert max(errors["ours"]) < 2e-4, errors


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [40, 3], ids=["at once", "in rows"])
def test_matrix_products_are_as_precise_as_declared(
    dtype: torch.dtype, exact: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrow.training.head.ADDED_ELEMENTS", rows * 90)
    torch.manual_seed(0)
    factor, right = torch.randn(40, 70), torch.randn(70, 90).to(dtype)
    left = factor.to(dtype)
    true = left.double() @ right.double()
    actual = product(left, right, exact)
    coarse = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 1e-6, torch.float64: 1e-14}
    fine = {**coarse, torch.bfloat16: 1e-5, torch.float16: 1e-6}
    assert actual.dtype == torch.promote_types(dtype, torch.float32)
    assert frobenius(actual, true) < (fine if exact else coarse)[dtype]
    total = torch.ones(40, 90, dtype=actual.dtype)
    true = factor.double() @ right.double()
    add_product(total, split(factor.to(actual.dtype), dtype, exact), right)
    bound = 4e-5 if dtype == torch.bfloat16 and exact else 2 * (fine if exact else coarse)[dtype]
    assert frobenius(total - 1, true) < bound


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


def largest_of_head(mix: LossWeights, n: int, v: int, chunk: int) -> tuple[int, torch.Size]:
    """Elements and shape, beside the weights and the gradients by the logits of a few chunks."""
    case = Case(torch.bfloat16, sizes=(n, 8, v, v))
    weight, slopes = case.student.weight_VH.shape, torch.Size((CHUNKS_TOGETHER * chunk, v))
    with Largest({weight, weight[::-1], slopes, slopes[::-1]}) as largest:
        value, _ = case.chunked(mix)
        case.gradients(value)
    return largest.elements, largest.shape


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "all"])
def test_no_tensor_grows_with_tokens_times_vocabulary(
    monkeypatch: pytest.MonkeyPatch, name: str, exact: bool
) -> None:
    """The largest tensors are some chunks of logits, whatever N and V are."""
    budget = 1 << 12
    monkeypatch.setattr("regrow.runtime.chunks.CHUNK_ELEMENTS", budget)
    weights = dict.fromkeys(NAMES, 1.0) if name == "all" else {name: 1.0}
    mix = LossWeights(weights, 2.0, exact=exact)
    small, big = largest_of_head(mix, 256, 128, 32), largest_of_head(mix, 512, 256, 16)
    assert small[0] <= budget, small
    assert big[0] <= budget, big
    assert small[0] >= budget // 2  # and the chunk is used, not one token at a time
