"""How exact the gradients of head and forward KL are with bf16 products, and what that takes.

    python benchmarks/head_precision.py

512 tokens, hidden 576, vocabulary 49,152 (SmolLM2-135M's head), normal weights, student and teacher
0.5 nats apart; one thread. Errors: Frobenius, relative, against float64 over the same bf16 inputs.
Time: the least processor time of three runs, forward and backward.
"""

from __future__ import annotations

import time
from unittest.mock import patch

import torch
from torch import Tensor

from regrow.training import head
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights

N, H, V = 512, 576, 49152
KL = {"forward_kl": 1.0}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(N, H), torch.randn(V, H) * 2 / H**0.5
    teacher_VH = weight_VH + torch.randn(V, H) / H**0.5
    x, w, t = (tensor.bfloat16() for tensor in (hidden_NH, weight_VH, teacher_VH))
    true = _true(x.double(), w.double(), t.double())
    print("| products | error of the hidden gradient | of the weight gradient | seconds |")
    print("|---|---|---|---|")
    _row("bf16", x, w, t, LossWeights(KL), true)
    rounded = lambda factor, dtype, exact: head.split(factor, dtype, False)  # noqa: E731
    with patch("regrow.training.head.split", rounded):
        _row("logits exact, gradients bf16", x, w, t, LossWeights(KL, exact=True), true)
    _row("all exact (`exact_head`)", x, w, t, LossWeights(KL, exact=True), true)
    _row("all float32", x.float(), w.float(), t.float(), LossWeights(KL), true)


def _true(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    slope_NV = (x @ w.T).softmax(-1).sub_((x @ t.T).softmax(-1))
    return slope_NV @ w, slope_NV.T @ x


def _row(
    name: str, x: Tensor, w: Tensor, t: Tensor, mix: LossWeights, true: tuple[Tensor, Tensor]
) -> None:
    targets_N = torch.zeros(N, dtype=torch.int64)
    times = []
    for _ in range(3):
        # Float32 leaves, as in training: the head casts them to the dtype of its products.
        student_NH, head = x.float().requires_grad_(), Head(w.float().requires_grad_())
        begin = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=x.dtype == torch.bfloat16):
            value, _ = head_loss(student_NH, head, targets_N, mix, x, Head(t))
        gradients = torch.autograd.grad(value, (student_NH, head.weight_VH))
        times.append(time.process_time() - begin)
    errors = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(gradients, true, strict=True)
    ]
    print(f"| {name} | {errors[0]:.1e} | {errors[1]:.1e} | {min(times):.2f} |", flush=True)


if __name__ == "__main__":
    main()
