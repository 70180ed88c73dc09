"""The loss against a stored distribution, through the chunked head: float64 by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_cache import states_and_head
from torch import Tensor

from regrow.training.cache.formats import samples, topk
from regrow.training.cache.sparse import PADDING, Sparse
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights

V, N = 97, 40
KEY = b"k" * 32
KL = LossWeights({"forward_kl": 1.0})


def stored(kind: str) -> Sparse:
    states, head = states_and_head()
    form = samples.Format(V, draws=20) if kind == "samples" else topk.Format(V, k=6)
    sparse: Sparse = form.decode(form.encode(states, head, KEY))  # type: ignore[assignment]
    if kind != "padded":
        return sparse
    known = 1 + torch.arange(N)[:, None] % 6  # rows with 1 to 6 known ids
    lost_NK = torch.arange(6) >= known
    p_NK, tail_N = sparse.probability_NK.masked_fill(lost_NK, 0), sparse.tail_N
    assert tail_N is not None
    tail_N = tail_N + (sparse.probability_NK - p_NK).sum(-1)
    return Sparse(V, sparse.ids_NK.masked_fill(lost_NK, PADDING), p_NK, tail_N)


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Head, Tensor]:
    states, head = states_and_head(hidden=12, vocabulary=V, seed=5)
    weight = head.weight_VH.to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    return states.to(dtype).requires_grad_(), Head(weight), targets


def slow(logits_NV: Tensor, sparse: Sparse) -> Tensor:
    """Sum over tokens, each bucket by itself, in float64; autograd differentiates it."""
    total = torch.zeros((), dtype=torch.float64)
    for row, logits in enumerate(logits_NV):
        q = logits.softmax(-1)
        ids, probabilities = sparse.ids_NK[row], sparse.probability_NK[row].double()
        pairs = [(p, q[i]) for p, i in zip(probabilities, ids, strict=True) if p > 0]
        if sparse.tail_N is not None:
            rest = torch.ones(len(q), dtype=torch.bool)
            rest[ids[ids != PADDING]] = False
            pairs.append((sparse.tail_N[row].double(), q[rest].sum()))
            total = total + sum(p * (p / mass).log() for p, mass in pairs)
        else:
            assert sparse.entropy_N is not None
            total = total - sum(p * mass.log() for p, mass in pairs) - sparse.entropy_N[row]
    return total


@pytest.mark.parametrize("kind", ["topk", "padded", "samples"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 7, N, 3 * N])
def test_value_and_gradient_equal_the_slow_version(
    kind: str, softcap: float | None, chunk: int
) -> None:
    sparse = stored(kind)
    states, head, targets = student()
    head = replace(head, softcap=softcap)
    total, parts = head_loss(states, head, targets, KL, chunk_tokens=chunk, sparse=sparse)
    total.backward()
    gradients = (states.grad, head.weight_VH.grad)
    states.grad = head.weight_VH.grad = None
    logits = states @ head.weight_VH.T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    expected = slow(logits, sparse)
    expected.backward()
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    assert float(parts["forward_kl"]) == float(total.detach())
    for actual, slow_gradient in zip(gradients, (states.grad, head.weight_VH.grad), strict=True):
        torch.testing.assert_close(actual, slow_gradient, rtol=1e-6, atol=1e-7)


def test_cached_probabilities_mix_with_cross_entropy_on_labels() -> None:
    sparse = stored("topk")
    states, head, targets = student()
    mix = LossWeights({"forward_kl": 0.75, "cross_entropy": 0.25})
    total, parts = head_loss(states, head, targets, mix, chunk_tokens=7, sparse=sparse)
    logits = states @ head.weight_VH.T
    hard = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert float(parts["cross_entropy"]) == pytest.approx(float(hard.detach()), rel=1e-9)
    expected = 0.75 * slow(logits, sparse) + 0.25 * hard
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    total.backward()
    (gradient,) = torch.autograd.grad(expected, states)
    torch.testing.assert_close(states.grad, gradient, rtol=1e-6, atol=1e-7)


def test_a_student_with_more_rows_is_compared_on_the_stored_ids() -> None:
    """Rows of padding get no gradient, and no share of the softmax."""
    sparse = stored("topk")
    states, head, targets = student()
    wide = Head(torch.cat([head.weight_VH.detach(), torch.ones(7, 12).double()]).requires_grad_())
    plain, _ = head_loss(states, head, targets, KL, sparse=sparse)
    padded, _ = head_loss(states, wide, targets, KL, sparse=sparse)
    assert float(padded.detach()) == float(plain.detach())
    padded.backward()
    assert wide.weight_VH.grad is not None
    assert not bool(wide.weight_VH.grad[V:].any())


@pytest.mark.parametrize("kind", ["topk", "samples"])
def test_float32_is_near_float64(kind: str) -> None:
    sparse = stored(kind)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        states, head, targets = student(dtype)
        head_loss(states, head, targets, KL, sparse=sparse)[0].backward()
        assert states.grad is not None
        gradients.append(states.grad.double())
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extreme_student_logits_stay_finite(sign: float) -> None:
    """All mass on a stored id, or all of it outside: finite, and the gradients sum to 0."""
    sparse = stored("topk")
    logits = torch.zeros(N, V)
    logits[range(N), sparse.ids_NK[:, 0]] = sign * 300.0
    logits[:, :] += 50
    value, gradient = sparse.loss(logits)
    assert bool(value.isfinite().all())
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(N), rtol=0, atol=1e-4)


def test_the_loss_of_the_teacher_itself_is_zero() -> None:
    """Up to what rounding to 8 bits costs; never below."""
    states, head = states_and_head()
    value, gradient = stored("topk").loss(states @ head.weight_VH.T)
    assert bool((value > -1e-6).all())
    assert float(value.mean()) < 1e-4
    assert float(gradient.abs().max()) < 0.02


def test_the_gradient_of_samples_is_unbiased() -> None:
    """Its mean over many draws is q − p, and that of the value the KL."""
    states, head = states_and_head(tokens=4)
    sampled_states, _, _ = student(torch.float32)
    shared_weight = head.weight_VH[:, :12]
    logits = (sampled_states[:4] @ shared_weight.T).detach()
    p, log_q = (states @ head.weight_VH.T).softmax(-1), logits.log_softmax(-1)
    count, form = 500, samples.Format(V, draws=10, sampling="multinomial")
    values, gradients = torch.zeros(count, 4), torch.zeros(count, 4, V)
    for number in range(count):
        sparse = form.decode(form.encode(states, head, number.to_bytes(32, "big")))
        assert isinstance(sparse, Sparse)
        values[number], gradients[number] = sparse.loss(logits.clone())
    kl = (p * (p.log() - log_q)).sum(-1)
    assert bool(((values.mean(0) - kl).abs() < 5 * values.std(0) / count**0.5).all())
    off = (gradients.mean(0) - (log_q.exp() - p)).abs()
    assert bool((off <= 5 * gradients.std(0) / count**0.5 + 1e-3).all())


def test_no_scored_token_gives_zero() -> None:
    states, head, targets = student()
    empty = Sparse.nothing(V, torch.device("cpu"))
    total, _ = head_loss(states[:0], head, targets[:0], KL, sparse=empty)
    total.backward()
    assert float(total.detach()) == 0.0


def test_distributions_of_several_sequences_are_joined() -> None:
    """Those with fewer ids are filled up, which changes nothing."""
    states, head = states_and_head()
    form = samples.Format(V, draws=20)
    parts = [form.decode(form.encode(states[a:b], head, KEY)) for a, b in ((0, 3), (3, N))]
    joined = Sparse.join(parts)  # type: ignore[arg-type]
    logits = student(torch.float32)[0].detach() @ head.weight_VH[:, :12].T
    value, gradient = joined.loss(logits.clone())
    rows = [
        part.loss(logits[a:b].clone())  # type: ignore[union-attr]
        for part, (a, b) in zip(parts, ((0, 3), (3, N)), strict=True)
    ]
    torch.testing.assert_close(value, torch.cat([v for v, _ in rows]))
    torch.testing.assert_close(gradient, torch.cat([g for _, g in rows]))
