"""Two teachers: against the mixture of whole distributions in float64, and in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from slow_losses import BETA, NAMES, SKEW
from slow_losses import slow as slow_loss
from tiny_distillation import OPTIONS, figures
from tiny_folders import data_of, write_model, write_text
from tiny_models import tiny_model
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AddedToken

from regrow.checkpoint import Checkpoint
from regrow.config import parse
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.recipe.recipe import Recipe, check, run
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.teacher import open_extra_teachers
from regrow.training.head import Head, head_loss
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import bind_loss
from regrow.training.teacher import MixedTeacher, Teacher, TeacherMixture

N, V = 11, 13
SHARES = (0.5, 0.3, 0.2)
WIDTHS = (4, 7, 6)
CONFIG = DistillConfig(tokens=512, batch_tokens=128, eval_tokens=256, heldout_sequences=4)


def random(*shape: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def blend_of(caps: tuple[float | None, ...] = (None, None, 1.5)) -> tuple[TeacherMixture, Tensor]:
    """Heads of different width, rows and cap, and the states of N tokens side by side."""
    heads = tuple(
        Head(random(V + n, width, seed=n), cap)
        for n, (width, cap) in enumerate(zip(WIDTHS, caps, strict=True))
    )
    return TeacherMixture(heads, SHARES), random(N, sum(WIDTHS), seed=9)


def slow_target(blend: TeacherMixture, hidden_NH: Tensor, temperature: float) -> Tensor:
    """log Σ w softmax(logits / T), one probability after the other."""
    target_NV, begin = torch.zeros(N, V, dtype=torch.float64), 0
    for head, share in zip(blend.heads, blend.shares, strict=True):
        width = head.weight_VH.shape[1]
        logits = hidden_NH[:, begin : begin + width] @ head.weight_VH[:V].T
        begin += width
        if head.softcap is not None:
            logits = head.softcap * (logits / head.softcap).tanh()
        target_NV += share * (logits / temperature).softmax(-1)
    return target_NV.log()


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_learns_the_mixture(name: str, temperature: float) -> None:
    blend, hidden_NH = blend_of()
    student_NH = random(N, 5, seed=20).requires_grad_()
    head = Head(random(V, 5, seed=21).requires_grad_())
    targets = torch.arange(N) % V
    mix = LossWeights({name: 1.3}, temperature, BETA, SKEW)
    # The slow losses divide by T: logits of the softened mixture are T times its logarithm.
    target = temperature * slow_target(blend, hidden_NH, temperature)
    expected = (
        1.3 * slow_loss(name, student_NH @ head.weight_VH.T, target, targets, temperature).sum()
    )
    inputs = (student_NH, head.weight_VH)
    gradients = torch.autograd.grad(expected, inputs)
    for chunk in (1, 4, N, N + 3):
        value, _ = head_loss(student_NH, head, targets, mix, hidden_NH, blend, chunk)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
        for actual, expected_gradient in zip(
            torch.autograd.grad(value, inputs), gradients, strict=True
        ):
            torch.testing.assert_close(actual, expected_gradient, rtol=1e-9, atol=1e-11)


def test_a_share_of_nearly_nothing_and_a_far_token_stay_finite() -> None:
    heads = tuple(Head(100 * random(V, 4, seed=n)) for n in range(2))
    blend, hidden_NH = TeacherMixture(heads, (1 - 1e-12, 1e-12)), 10 * random(N, 8, seed=3)
    target = blend.target(hidden_NH, V, LossWeights({"forward_kl": 1.0}))
    assert bool(target.isfinite().all())
    torch.testing.assert_close(target.logsumexp(-1), torch.zeros(N, dtype=torch.float64))


def test_the_teacher_with_itself_is_that_teacher() -> None:
    models = [tiny_model("llama", torch.float64, seed=seed) for seed in (1, 2, 2)]
    student, teachers = models[0], [Teacher(model) for model in models[1:]]
    ids = torch.randint(4, 384, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "position_ids": torch.arange(12).expand(2, -1), "labels": ids}
    values = []
    for teacher in (teachers[0], MixedTeacher(teachers, (0.3, 0.7))):
        undo = bind_loss(student, teacher, LossWeights({"forward_kl": 1.0}, 2.0))
        values.append(float(student.train()(**batch)["loss"].detach()))
        undo()
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    bind_loss(models[1], MixedTeacher(teachers, (0.3, 0.7)), LossWeights({"forward_kl": 1.0}))
    assert abs(float(models[1](**batch)["loss"].detach())) < 1e-10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    write_text(folder / "text.jsonl")
    write_model(folder / "student", num_hidden_layers=1)
    write_model(folder / "one", num_hidden_layers=2, vocab_size=400)
    write_model(folder / "other", "qwen3", hidden_size=36, num_hidden_layers=1)
    odd = write_model(folder / "odd", num_hidden_layers=1, vocab_size=385)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|mine|>", special=True)])
    tokenizer.save_pretrained(str(odd.folder))
    return folder


def slow_kl(folder: Path, place: Path) -> float:
    """KL(0.75 one + 0.25 other ‖ model) per scored held-out token, over the tokenizer's ids."""
    sequences = build_sequences(data_of(place / "text.jsonl"), tiny_tokenizer(), "heldout", 4)
    batch = next(sequences.batches(4))
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        q, first_p, second_p = (
            Checkpoint(path).model(torch.float64)(**inputs, use_cache=False).logits
            for path in (folder, place / "one", place / "other")
        )
    size = len(tiny_tokenizer())
    p = 0.75 * first_p[..., :size].softmax(-1) + 0.25 * second_p[..., :size].softmax(-1)
    kl_BT = (p * (p.log() - q[..., :size].log_softmax(-1))).sum(-1)[:, :-1]
    return float(kl_BT[batch["labels"][:, 1:] != -100].mean())


def test_a_run_learns_the_mixture_and_knows_its_teachers(place: Path, tmp_path: Path) -> None:
    data, out = data_of(place / "text.jsonl"), tmp_path / "out"
    config = CONFIG.model_copy(
        update={"extra_teachers": {str(place / "other"): 0.25}, "learning_rate": 3e-3}
    )
    distill(place / "student", place / "one", data, out, config, OPTIONS)
    measured = figures(out)
    assert measured["held-out KL before"] == pytest.approx(
        slow_kl(place / "student", place), rel=0.05
    )
    assert measured["held-out KL"] == pytest.approx(slow_kl(out, place), rel=0.05)
    assert measured["held-out KL"] < measured["held-out KL before"]
    before = (out / "manifest.json").stat().st_mtime_ns
    distill(place / "student", place / "one", data, out, config, OPTIONS)
    assert (out / "manifest.json").stat().st_mtime_ns == before  # complete and unchanged


def test_a_recipe_distils_from_two_teachers(place: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"tokens": 128, "batch_tokens": 128, "heldout_sequences": 2}
    fields |= {"teacher": str(place / "one"), "extra_teachers": {str(place / "other"): 0.5}}
    data = data_of(place / "text.jsonl")
    recipe = Recipe(model=str(place / "student"), data=data, stages=[{"distill": fields}])
    out = run(recipe, tmp_path / "run", OPTIONS)
    assert (out / "model" / "config.json").exists()
    cached = {"cache": {"teacher": str(place / "one"), "tokens": 128}}
    with_cache = recipe.model_copy(update={"stages": [cached, {"distill": fields}]})
    with pytest.raises(
        UserError, match=r"stages.1.distill: extra_teachers: cache works with one teacher only"
    ):
        check(with_cache, OPTIONS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra_teachers": {"x": 1.0}}, "sum to less than 1"),
        ({"extra_teachers": {"x": 0.6, "y": 0.5}}, "sum to less than 1"),
        ({"extra_teachers": {"x": 0.0}}, "must be above 0"),
        ({"extra_teachers": {"x": float("nan")}}, "should be a finite number"),
    ],
)
def test_bad_teacher_weights_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(DistillConfig, fields, "distill")


def test_bad_extra_teachers_are_refused_before_any_slow_work(place: Path) -> None:
    student = Checkpoint(place / "student")
    other = {str(place / "other"): 0.5}
    feature_losses = DistillConfig(extra_teachers=other, feature_losses={"hidden": 1.0})
    with pytest.raises(
        UserError, match="extra_teachers: feature_losses works with one teacher only"
    ):
        open_extra_teachers(feature_losses, student)
    with pytest.raises(UserError, match="nowhere"):
        open_extra_teachers(DistillConfig(extra_teachers={str(place / "nowhere"): 0.5}), student)
    with pytest.raises(UserError, match="every teacher must have all tokens"):
        open_extra_teachers(DistillConfig(extra_teachers=other), Checkpoint(place / "odd"))
