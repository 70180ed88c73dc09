"""lm_head and loss in chunks, against full logits and autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pretend_cuda import FakeCuda
from slow_losses import BETA, NAMES, SKEW
from slow_losses import slow as slow_loss
from tiny_models import tiny_model
from torch import Tensor

from regrow.runtime import chunks
from regrow.runtime.chunks import head_chunk
from regrow.training.head import Head, head_loss, head_of, scale_of
from regrow.training.loss_weights import LossWeights

N, H, V = 13, 6, 11

MIXES = {
    "kl": LossWeights({"forward_kl": 1.0}),
    "ce": LossWeights({"cross_entropy": 1.0}),
    "hot": LossWeights({"forward_kl": 1.0}, temperature=2.5),
    "mix": LossWeights({"forward_kl": 0.7, "cross_entropy": 0.3}, temperature=3.0),
    "mix turned": LossWeights({"cross_entropy": 0.4, "forward_kl": 0.6}, temperature=0.5),
    "measured only": LossWeights({"forward_kl": 0.0, "cross_entropy": 1.0}),
    "all": LossWeights({name: 0.1 + n for n, name in enumerate(NAMES)}, 2.0, BETA, SKEW),
    **{f"{name} at 1": LossWeights({name: 1.0}, 1.0, BETA, SKEW) for name in NAMES},
    **{f"{name} at 0.5": LossWeights({name: 0.5}, 0.5, BETA, SKEW) for name in NAMES},
    **{f"{name} at 4": LossWeights({name: 3.0}, 4.0, BETA, SKEW) for name in NAMES},
}


class Case:
    """Random hidden states, heads and targets; the gradients are asked for anew by each run."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        sizes: tuple[int, int, int, int] = (N, H, V, V),
        softcap: float | None = None,
        teacher_softcap: float | None = None,
        scale: float = 1.0,
    ) -> None:
        n, h, v, teacher_v = sizes
        draw = torch.Generator().manual_seed(3)

        def random(*shape: int) -> Tensor:
            return (scale * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype)

        self.student_NH = random(n, h).requires_grad_()
        self.student = Head(random(v, h).requires_grad_(), softcap)
        self.teacher_NH, self.teacher = (
            random(n, h + 2),
            Head(random(teacher_v, h + 2), teacher_softcap),
        )
        self.targets_N = torch.randint(0, min(v, teacher_v), (n,), generator=draw)

    def to(self, device: str) -> Case:
        """The same case on a device, with leaves of its own."""
        self.student_NH = self.student_NH.detach().to(device).requires_grad_()
        weight_VH = self.student.weight_VH.detach().to(device).requires_grad_()
        self.student = replace(self.student, weight_VH=weight_VH)
        self.teacher_NH, self.targets_N = self.teacher_NH.to(device), self.targets_N.to(device)
        self.teacher = replace(self.teacher, weight_VH=self.teacher.weight_VH.to(device))
        return self

    def chunked(
        self, mix: LossWeights, chunk: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return head_loss(
            self.student_NH,
            self.student,
            self.targets_N,
            mix,
            self.teacher_NH,
            self.teacher,
            chunk_tokens=chunk,
        )

    def gradients(self, value: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = torch.autograd.grad(value, (self.student_NH, self.student.weight_VH))
        return hidden, weight

    def check_by_finite_differences(self, value: Callable[[], Tensor]) -> None:
        """The gradients of `value`, which is computed anew, are its slopes."""
        tensors = (self.student_NH, self.student.weight_VH)
        for tensor, gradient in zip(tensors, self.gradients(value()), strict=True):
            with torch.no_grad():
                flat = tensor.view(-1)
                for place in range(len(flat)):
                    old, step, values = float(flat[place]), 1e-5, []
                    for sign in (1, -1):
                        flat[place] = old + sign * step
                        values.append(float(value()))
                    flat[place] = old
                    slope = (values[0] - values[1]) / (2 * step)
                    expected = float(gradient.view(-1)[place])
                    assert slope == pytest.approx(expected, rel=1e-6, abs=1e-8)


def slow_parts(case: Case, mix: LossWeights) -> dict[str, Tensor]:
    """Each loss of the mix by its definition, on full logits over the shared ids, in float64."""
    shared = min(len(case.student.weight_VH), len(case.teacher.weight_VH))
    logits = []
    for hidden, head in ((case.student_NH, case.student), (case.teacher_NH, case.teacher)):
        full = hidden.double() @ head.weight_VH.double()[:shared].T
        logits.append(full if head.softcap is None else head.softcap * (full / head.softcap).tanh())
    return {
        name: slow_loss(name, *logits, case.targets_N, mix.temperature).sum()
        for name in mix.weights
    }


def slow(case: Case, mix: LossWeights) -> Tensor:
    parts = slow_parts(case, mix)
    return torch.stack([weight * parts[name] for name, weight in mix.weights.items()]).sum()


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "softcap"])
def test_value_and_gradients_equal_the_slow_version(mix: LossWeights, cap: float | None) -> None:
    case = Case(softcap=cap, teacher_softcap=cap)
    expected = slow(case, mix)
    hidden, weight = case.gradients(expected)
    for chunk in range(1, N + 2):
        value, parts = case.chunked(mix, chunk)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for name, part in slow_parts(case, mix).items():
            torch.testing.assert_close(parts[name], part, rtol=1e-12, atol=1e-12)
        gradients = case.gradients(value)
        torch.testing.assert_close(gradients[0], hidden, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(gradients[1], weight, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
@pytest.mark.parametrize("cap", [None, 2.0], ids=["plain", "softcap"])
def test_gradients_by_finite_differences(mix: LossWeights, cap: float | None) -> None:
    case = Case(sizes=(4, 3, 5, 5), softcap=cap, teacher_softcap=cap)
    case.check_by_finite_differences(lambda: case.chunked(mix, 3)[0])


@pytest.mark.parametrize("cap", [None, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_mix_is_the_weighted_sum_of_its_losses(temperature: float, cap: float | None) -> None:
    case = Case(softcap=cap, teacher_softcap=cap)
    weights = {name: 0.3 + n / 2 for n, name in enumerate(NAMES)}
    total, parts = case.chunked(LossWeights(weights, temperature, BETA, SKEW), 5)
    mixed = case.gradients(total)
    alone = {n: case.chunked(LossWeights({n: 1.0}, temperature, BETA, SKEW), 5)[0] for n in NAMES}
    gradients = {name: case.gradients(value) for name, value in alone.items()}
    for name, value in alone.items():
        torch.testing.assert_close(parts[name], value)
    expected = torch.stack([weights[name] * value for name, value in alone.items()]).sum()
    torch.testing.assert_close(total, expected)
    for place in (0, 1):
        summed = torch.stack([w * gradients[name][place] for name, w in weights.items()]).sum(0)
        torch.testing.assert_close(mixed[place], summed)


@pytest.mark.parametrize("name", [name for name in NAMES if "kl" in name or name == "jsd"])
def test_temperature_counts_once_in_value_and_in_gradient(name: str) -> None:
    """T² · KL at T: for small logits the factor of both is one, whatever T is (Hinton, 2015)."""
    case = Case(scale=0.01)
    values, gradients = [], []
    for temperature in (1.0, 10.0):
        value = case.chunked(LossWeights({name: 1.0}, temperature))[0]
        values.append(value.detach())
        gradients.append(case.gradients(value)[0])
    torch.testing.assert_close(values[0], values[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize(("v", "teacher_v"), [(11, 16), (16, 11)])
@pytest.mark.parametrize("name", ["kl", "mix", "ce", "all"])
def test_padded_vocabularies_are_cut_to_the_shared_ids(v: int, teacher_v: int, name: str) -> None:
    case = Case(sizes=(N, H, v, teacher_v))
    expected = slow(case, MIXES[name])
    value, _ = case.chunked(MIXES[name], 4)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    for actual, slow_gradient in zip(case.gradients(value), case.gradients(expected), strict=True):
        torch.testing.assert_close(actual, slow_gradient, rtol=1e-11, atol=1e-12)


def test_padding_the_vocabulary_keeps_the_loss_of_identical_models_zero() -> None:
    case = Case()
    padded = torch.cat([case.student.weight_VH.detach(), torch.zeros(5, H, dtype=torch.float64)])
    value, _ = head_loss(
        case.student_NH,
        case.student,
        case.targets_N,
        MIXES["kl"],
        case.student_NH.detach(),
        Head(padded),
    )
    assert float(value.detach()) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_models_give_exactly_zero(dtype: torch.dtype) -> None:
    case = Case(dtype, sizes=(50, 16, 97, 97), scale=3.0)
    for temperature in (1.0, 2.0):
        value, parts = head_loss(
            case.student_NH,
            case.student,
            case.targets_N,
            LossWeights({"forward_kl": 1.0}, temperature),
            case.student_NH.detach().clone(),
            Head(case.student.weight_VH.detach().clone()),
            chunk_tokens=7,
        )
        assert float(value.detach()) == 0.0
        assert float(parts["forward_kl"]) == 0.0
        hidden, weight = case.gradients(value)
        assert not hidden.any()
        assert not weight.any()


def test_chunks_of_the_device() -> None:
    """On a CPU some 100 tokens of a large vocabulary, on a GPU about a thousand, within 2 GiB."""
    assert head_chunk("cpu", 151_936) == head_chunk("mps", 151_936) == (110, 4)
    assert head_chunk("cuda", 151_936) == (1009, 2)
    for vocabulary in (32_000, 128_256, 151_936, 262_144, 10_000_000):
        chunk = head_chunk("cuda", vocabulary)
        assert 16 <= chunk.tokens <= 2048
        bytes_of_two = vocabulary * chunk.tokens * (10 + 2 * 2)
        assert chunk.bytes(10_000, vocabulary) == bytes_of_two
        if vocabulary < 1_000_000:
            assert bytes_of_two <= 2 << 30
    assert head_chunk("cuda", 1000).bytes(30, 1000) == 30 * 1000 * 12


@pytest.mark.parametrize("name", ["mix", "all"])
def test_a_gpu_computes_the_same_loss_in_its_own_chunks(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(sizes=(50, H, V, V))
    expected, parts = case.chunked(MIXES[name])
    slopes = case.gradients(expected)
    monkeypatch.setattr(chunks, "GPU_TOKENS", 20)
    rows: list[int] = []
    plain = Head.logits

    def logits(head: Head, hidden_NH: Tensor, *more: Any) -> Tensor:
        rows.append(len(hidden_NH))
        return plain(head, hidden_NH, *more)

    monkeypatch.setattr(Head, "logits", logits)
    with FakeCuda():
        there = Case(sizes=(50, H, V, V)).to("cuda")
        value, found = there.chunked(MIXES[name])
        gradients = there.gradients(value)
    assert sorted(rows) == 2 * [10] + 4 * [20]  # of student and teacher
    for actual, right in zip((value, *gradients), (expected, *slopes), strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-12, atol=1e-13)
    for loss, right in parts.items():
        torch.testing.assert_close(found[loss], right, rtol=1e-12, atol=1e-13)


def test_no_token_gives_a_zero_with_a_graph() -> None:
    case = Case(sizes=(0, H, V, V))
    value, parts = case.chunked(MIXES["all"])
    assert float(value.detach()) == 0.0
    assert {name: float(part) for name, part in parts.items()} == dict.fromkeys(NAMES, 0.0)
    hidden, weight = case.gradients(value)
    assert hidden.shape == (0, H)
    assert torch.equal(weight, torch.zeros(V, H, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in MIXES if name != "measured only"])
def test_only_the_scored_tokens_count(name: str) -> None:
    """Masking means leaving rows out: the rows left give what they give alone."""
    mix = MIXES[name]
    case, mask = Case(), torch.rand(N, generator=torch.Generator().manual_seed(1)) < 0.5
    value, _ = head_loss(
        case.student_NH[mask],
        case.student,
        case.targets_N[mask],
        mix,
        case.teacher_NH[mask],
        case.teacher,
    )
    hidden, _ = case.gradients(value)
    assert not hidden[~mask].any()
    rest = Case()
    rest.student_NH = rest.student_NH.detach()[mask].requires_grad_()
    rest.teacher_NH, rest.targets_N = rest.teacher_NH[mask], rest.targets_N[mask]
    expected = slow(rest, mix)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(hidden[mask], rest.gradients(expected)[0])


def test_upstream_scale_and_frozen_parts() -> None:
    case = Case()
    once = case.gradients(case.chunked(MIXES["mix"])[0])
    scaled = case.gradients(0.25 * case.chunked(MIXES["mix"])[0])
    for gradient, quarter in zip(once, scaled, strict=True):
        torch.testing.assert_close(quarter, gradient / 4)
    frozen = Head(case.student.weight_VH.detach())
    value, _ = head_loss(
        case.student_NH, frozen, case.targets_N, MIXES["mix"], case.teacher_NH, case.teacher
    )
    (hidden,) = torch.autograd.grad(value, (case.student_NH,))
    torch.testing.assert_close(hidden, once[0])


def test_head_of_reads_the_cap_and_refuses_what_it_cannot_reproduce() -> None:
    model = tiny_model("gemma3_text", final_logit_softcapping=3.0)
    assert head_of(model).softcap == 3.0
    hidden = torch.randn(2, model.config.hidden_size, dtype=torch.float64)
    head = head_of(model)
    expected = 3.0 * torch.tanh(model.lm_head(hidden) / 3.0)
    torch.testing.assert_close(head.logits(hidden, head.weight_VH), expected)
    plain = tiny_model("llama")
    assert head_of(plain).softcap is None
    plain.config.logit_scale = 0.5
    assert head_of(plain).scale == 0.5
    assert scale_of({"logits_scaling": 8.0}) == 0.125
    assert scale_of({"logit_scale": None}) == 1.0


def test_scaled_and_capped_logits_and_their_gradient() -> None:
    """The cross entropy of 3 tanh(0.25 h Wᵀ / 3), written out in float64."""
    draw = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH = (
        torch.randn(n, 6, generator=draw, dtype=torch.float64).requires_grad_() for n in (5, 11)
    )
    targets_N = torch.tensor([1, 0, 10, 4, 4])
    head = Head(weight_VH, softcap=3.0, scale=0.25)
    value, _ = head_loss(hidden_NH, head, targets_N, LossWeights({"cross_entropy": 1.0}))
    logits_NV = 3.0 * torch.tanh(0.25 * (hidden_NH @ weight_VH.T) / 3.0)
    expected = torch.nn.functional.cross_entropy(logits_NV, targets_N, reduction="sum")
    torch.testing.assert_close(value, expected)
    found, wanted = (torch.autograd.grad(v, (hidden_NH, weight_VH)) for v in (value, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
