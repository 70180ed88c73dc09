"""The contract of every file in training/feature_losses: hooks in float64, differences, masks."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_feature_losses import FAMILIES, KEPT, KL, NAMES, SLOW, family, loss_weights_of, slow
from tiny_models import random_plan, tiny_model
from tiny_training import Largest, tiny_sequences
from torch import Tensor
from transformers import PreTrainedModel

from regrow import plugins
from regrow.plan import Plan
from regrow.pruning.cut import cut_model
from regrow.runtime import chunks
from regrow.training.features import (
    FEATURE_LOSSES,
    FeatureLosses,
    LayerMapping,
    at_depths,
    give_attentions,
)
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher


@pytest.fixture(autouse=True)
def float64_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention rounds its softmax to float32, which ends a comparison at 1e-7."""
    stock = torch.nn.functional.softmax

    def wide(x: Tensor, dim: int, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        return stock(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", functools.wraps(stock)(wide))


def batch_of(n: int = 4, length: int = 24) -> dict[str, Tensor]:
    return next(tiny_sequences(n, length).batches(n))


def bound(
    student: PreTrainedModel,
    teacher: Teacher,
    feature_losses: FeatureLosses | None,
    batch: dict[str, Tensor],
) -> dict[str, Any]:
    undo = bind_loss(student, teacher, KL, feature_losses)
    outputs: dict[str, Any] = student(**batch)
    undo()
    return outputs


def values(
    student: PreTrainedModel, teacher: Teacher, plan: Plan, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Every feature loss's sum."""
    with torch.no_grad():
        parts = bound(student, teacher, loss_weights_of(plan, *NAMES), batch)["parts"]
    return {name: parts[name] for name in NAMES}


def test_every_feature_loss_has_a_slow_version_and_says_what_it_reads() -> None:
    assert set(SLOW) == set(NAMES)
    for name in NAMES:
        module = plugins.load(FEATURE_LOSSES, name)
        assert module.__doc__
        assert module.NEEDS
        assert not module.NEEDS - {"outputs", "embeddings", "attentions", "lens"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_value_and_gradient_equal_the_slow_version(model_type: str, name: str) -> None:
    """Of the feature loss times its weight; layers, channels and heads are cut."""
    student, teacher, plan = family(model_type, **FAMILIES[model_type])
    batch = batch_of()
    plain = bound(student, teacher, None, batch)["loss"]
    expected = slow(name, student, teacher, plan, batch)
    assert float(expected.detach()) > 1e-3
    (plain + 3.0 * expected).backward()
    gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    outputs = bound(student, teacher, loss_weights_of(plan, name), batch)
    torch.testing.assert_close(outputs["parts"][name], expected.detach(), rtol=1e-11, atol=0)
    torch.testing.assert_close(outputs["loss"], plain + 3.0 * expected, rtol=1e-11, atol=0)
    torch.testing.assert_close(outputs["main"], plain.detach(), rtol=1e-12, atol=0)
    outputs["loss"].backward()
    for parameter_name, parameter in student.named_parameters():
        difference = (parameter.grad - gradients[parameter_name]).norm()
        assert float(difference) <= 1e-9 * float(gradients[parameter_name].norm()), parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_finite_differences(name: str) -> None:
    """Along a random direction of all weights."""
    student, teacher, plan = family(**FAMILIES["llama"])
    batch, mix = batch_of(), loss_weights_of(plan, name)
    alone = bound(student, teacher, None, batch)["loss"]
    (bound(student, teacher, mix, batch)["loss"] - alone).backward()
    draw = torch.Generator().manual_seed(3)
    steps = [
        torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in student.parameters()
    ]
    slope = sum((p.grad * step).sum() for p, step in zip(student.parameters(), steps, strict=True))
    ends, size = [], 1e-6
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, step in zip(student.parameters(), steps, strict=True):
                parameter.add_(sign * size * step)
            ends.append(3.0 * bound(student, teacher, mix, batch)["parts"][name])
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * size), slope, rtol=1e-6, atol=1e-7)


def test_the_loss_of_the_teacher_itself_is_zero() -> None:
    for dtype, rounding in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        model = tiny_model("llama", dtype, seed=4, num_hidden_layers=6)
        layers = {"layers": list(range(6))}
        plan = random_plan(model.config.to_dict(), **layers)
        student = cut_model(model, plan)
        for part in (model, student):
            give_attentions(part)
        match = LayerMapping.of_plan(plan)
        match = match.read_at(at_depths(match.outputs, 6, (0.25, 0.5, 4)))
        mix = FeatureLosses(dict.fromkeys(NAMES, 1.0), match)
        outputs = bound(student, Teacher(model), mix, batch_of())
        assert {float(outputs["parts"][name]) for name in NAMES} == {0.0}
        outputs["loss"].backward()
        assert max(float(p.grad.abs().max()) for p in student.parameters()) < rounding


def test_no_scored_token_gives_a_zero_with_a_graph() -> None:
    student, teacher, plan = family()
    batch = batch_of()
    batch["labels"].fill_(-100)
    outputs = bound(student, teacher, loss_weights_of(plan, *NAMES), batch)
    assert float(outputs["loss"].detach()) == 0
    outputs["loss"].backward()
    assert all(not p.grad.any() for p in student.parameters())


def test_parts_of_a_batch_add_up() -> None:
    """So that accumulation and ranks share one mean: by blocks, and token by token."""
    student, teacher, plan = family(**FAMILIES["llama"])
    full_batch = values(student, teacher, plan, batch_of(8))
    sequences = [values(student, teacher, plan, b) for b in tiny_sequences(8).batches(2)]
    odd, even = batch_of(8), batch_of(8)
    odd["labels"][:, ::2] = even["labels"][:, 1::2] = -100
    tokens = [values(student, teacher, plan, b) for b in (odd, even)]
    for name in NAMES:
        for parts in (sequences, tokens):
            total = sum(part[name] for part in parts)
            torch.testing.assert_close(total, full_batch[name], rtol=1e-10, atol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_packed_documents_do_not_see_each_other(model_type: str) -> None:
    """A packed block gives what its documents give one by one, and what follows does not count."""
    student, teacher, plan = family(model_type, **FAMILIES[model_type])
    batch = {name: value[2:3] for name, value in batch_of(4, 40).items()}
    first = int((batch["position_ids"][0] == 0).nonzero()[1])
    alone = [
        values(student, teacher, plan, {name: x[:, begin:end] for name, x in batch.items()})
        for begin, end in pairwise((0, first, 40))
    ]
    packed = values(student, teacher, plan, batch)
    batch["labels"][:, first:] = -100
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, first:] = 9
    changed = values(student, teacher, plan, other)
    for name in NAMES:
        assert alone[0][name] > 0
        assert alone[1][name] > 0
        expected = alone[0][name] + alone[1][name]
        torch.testing.assert_close(packed[name], expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(changed[name], alone[0][name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_with_fewer_tokens_is_compared_on_the_shared_ids(name: str) -> None:
    """The teacher reads its own ids of the same tokens; untied, so that both ends are cut."""
    config = {"num_hidden_layers": 6, "tie_word_embeddings": False}
    model = tiny_model("llama", torch.float64, seed=4, **config)
    kept = [0, 1, *range(3, 384, 2)]
    plan = random_plan(model.config.to_dict(), layers=KEPT, vocab=kept, hidden=36)
    student = cut_model(model, plan)
    for part in (model, student):
        give_attentions(part)
    assert plan.vocab is not None
    teacher = Teacher(model, torch.tensor(plan.vocab))
    batch = next(tiny_sequences(4, vocabulary=len(kept)).batches(4))
    value = bound(student, teacher, loss_weights_of(plan, name), batch)["parts"][name].detach()
    if name.startswith("logit_lens"):
        with torch.no_grad():  # of the teacher's distribution, what the student has words for
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[plan.vocab])
    expected = slow(name, student, teacher, plan, batch)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-11, atol=1e-12)
    assert name == "embeddings" or float(value) > 0


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("logit_lens")])
def test_the_lens_is_computed_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to one chunk, and [tokens, vocabulary] is not made."""
    student, teacher, plan = family()
    batch = batch_of(8)
    unchunked = bound(student, teacher, loss_weights_of(plan, name), batch)
    unchunked["loss"].backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)  # chunks of 16 tokens
    tokens = int(unchunked["tokens"])
    assert tokens > 3 * 16
    shapes = {p.shape for model in (student, teacher.model) for p in model.parameters()}
    with Largest(shapes | {shape[::-1] for shape in shapes}) as largest:
        chunked = bound(student, teacher, loss_weights_of(plan, name), batch)
        chunked["loss"].backward()
    torch.testing.assert_close(chunked["parts"][name], unchunked["parts"][name], rtol=1e-12, atol=0)
    for parameter, expected in zip(student.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9)
    assert largest.elements < tokens * 384, largest.shape


def test_bfloat16_attention_is_never_negative() -> None:
    """Its rows do not sum to 1, and Σ p log(p / q) alone would be below 0 for some."""
    attention = plugins.load(FEATURE_LOSSES, "attention")
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(200, 2, 40, generator=draw, dtype=torch.float64)
    p = logits.softmax(-1)
    q = (logits + 0.02 * torch.randn(logits.shape, generator=draw, dtype=torch.float64)).softmax(-1)
    exact = (p * (p.log() - q.log())).sum() / 2
    rounded = [x.bfloat16().float() for x in (p, q)]
    plain = (rounded[0] * (rounded[0].log() - rounded[1].log())).sum(-1)
    assert float(plain.min()) < 0
    for p_AT, q_AT in zip(*rounded, strict=True):
        assert float(attention._divergence(q_AT[None], p_AT[None])) >= 0
    divergence = attention._divergence(rounded[1], rounded[0])
    torch.testing.assert_close(divergence.double(), exact, rtol=0.05, atol=0)
