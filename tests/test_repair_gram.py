"""Closed-form repair against least squares on the tokens themselves, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model, write_text
from tiny_models import random_plan
from tiny_pruning import kl_between, write_trained
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.sequences import build_sequences
from regrow.plan import Plan
from regrow.profile_folder import Gram, Profile
from regrow.pruning.cut import cut_model
from regrow.pruning.repair import RepairSetup
from regrow.pruning.repair import gram as by_gram
from regrow.pruning.repair._ridge import RIDGES, Solution
from regrow.pruning.repair.gram import OneShot, solve
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile

OPTIONS = Options(device="cpu", batch_size=4, order="resident")
OUT, IN, TOKENS = 7, 12, 60
KEPT = [0, 2, 3, 5, 8, 9, 11]
LOST = [n for n in range(IN) if n not in KEPT]


def rows(seed: int, tokens: int = TOKENS) -> Tensor:
    """Correlated inputs [tokens, IN], so that what is kept says something about what goes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.randn(tokens, IN, generator=draw, dtype=torch.float64) @ mixing


@pytest.fixture
def weight() -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(OUT, IN, generator=draw, dtype=torch.float64)


def gram_of(fit: Tensor, validate: Tensor) -> Gram:
    return Gram(fit=fit.T @ fit, validate=validate.T @ validate)


def ridge_of(fit: Tensor, ridge: float) -> float:
    """λ in the units of solve(): the mean square of a kept input, summed over tokens."""
    return ridge * float(fit[:, KEPT].square().sum(0).mean())


def least_squares(weight: Tensor, fit: Tensor, ridge: float) -> Tensor:
    """argmin Σ |W'x_k − Wx|² + λ|W' − W_k|², by one augmented lstsq on explicit rows."""
    root = ridge_of(fit, ridge) ** 0.5
    inputs = torch.cat([fit[:, KEPT], root * torch.eye(len(KEPT), dtype=torch.float64)])
    outputs = torch.cat([fit @ weight.T, root * weight[:, KEPT].T])
    return torch.linalg.lstsq(inputs, outputs).solution.T


def held_out_error(weight: Tensor, new: Tensor, x: Tensor) -> float:
    """sqrt(Σ|y' − y|² / Σ|y|²), token by token."""
    wrong = sum(float((new @ t[KEPT] - weight @ t).square().sum()) for t in x)
    return (wrong / sum(float((weight @ t).square().sum()) for t in x)) ** 0.5


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 3.0])
def test_solve_equals_augmented_least_squares(weight: Tensor, ridge: float) -> None:
    fit, held_out = rows(2), rows(3)
    solution = solve(weight, gram_of(fit, held_out), KEPT, (ridge,))
    expected = least_squares(weight, fit, ridge)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-9, atol=1e-10)
    assert solution.ridge == ridge
    before = held_out_error(weight, weight[:, KEPT], held_out)
    assert solution.error_before == pytest.approx(before, rel=1e-9)
    after = held_out_error(weight, expected, held_out)
    assert solution.error_after == pytest.approx(after, rel=1e-9)
    assert after < before


def test_a_huge_ridge_leaves_the_weights_unchanged(weight: Tensor) -> None:
    solution = solve(weight, gram_of(rows(2), rows(3)), KEPT, (1e12,))
    torch.testing.assert_close(solution.weight, weight[:, KEPT], rtol=1e-9, atol=1e-9)


def test_dropped_inputs_that_depend_on_kept_ones_are_recovered(weight: Tensor) -> None:
    """Lost inputs that are sums of kept ones: a tiny ridge gives the old output back."""
    fit, held_out = rows(2), rows(3)
    for x in (fit, held_out):
        x[:, LOST] = x[:, KEPT[:5]]
    solution = solve(weight, gram_of(fit, held_out), KEPT, (1e-9,))
    assert solution.error_after < 1e-7 < 0.1 < solution.error_before


def test_the_ridge_is_chosen_on_the_held_out_gram(weight: Tensor) -> None:
    """Few fitting tokens: the smallest ridge fits them best, another one serves unseen tokens."""
    fit_rows, unseen = rows(4, tokens=9), rows(5, tokens=400)
    ridges = (1e-6, 1e-2, 1e-1, 1.0, 10.0)
    solution = solve(weight, gram_of(fit_rows, unseen), KEPT, ridges)
    errors = {r: held_out_error(weight, least_squares(weight, fit_rows, r), unseen) for r in ridges}
    assert solution.ridge == min(errors, key=lambda ridge: errors[ridge]) != 1e-6
    on_fit = {
        r: held_out_error(weight, least_squares(weight, fit_rows, r), fit_rows) for r in ridges
    }
    assert min(on_fit, key=lambda ridge: on_fit[ridge]) == 1e-6
    assert solution.error_after == pytest.approx(errors[solution.ridge], rel=1e-6)


def test_never_worse_than_no_repair_on_held_out_tokens(weight: Tensor) -> None:
    """Held-out tokens whose lost inputs are silent: any change only does harm."""
    held_out = rows(3)
    held_out[:, LOST] = 0
    solution = solve(weight, gram_of(rows(2), held_out), KEPT, (1e-2, 1.0))
    assert solution == Solution(solution.weight, None, 0.0, 0.0)
    assert torch.equal(solution.weight, weight[:, KEPT])


def test_silent_inputs_do_not_break_it(weight: Tensor) -> None:
    zeros = torch.zeros(IN, IN)
    solution = solve(weight.float(), Gram(zeros, zeros), KEPT, (1e-2,))
    assert torch.equal(solution.weight, weight.float()[:, KEPT].double())


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=400)


CONFIG = ProfileConfig(samples=40, gram_tokens=40 * 32)


def profiled(folder: Path, checkpoint: Checkpoint, text: Path) -> Profile:
    return profile(checkpoint, data_of(text), folder, CONFIG, OPTIONS)


def one_shot(
    checkpoint: Checkpoint, profile: Profile, plan: Plan, ridges: tuple[float, ...] = RIDGES
) -> OneShot:
    work = profile.folder / "work"
    setup = RepairSetup(checkpoint, families.of(checkpoint), profile, plan, work, OPTIONS)
    return by_gram.repair(setup, ridges)


class Inputs:
    """The inputs of one reader [N, d] and its outputs' weights 1/|residual|, for every token."""

    def __init__(self, model: PreTrainedModel, reader: str, norm: str, batches: Any) -> None:
        x, r = [], []
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, into=into: into.append(inputs[0].flatten(0, 1))
            )
            for name, into in ((reader, x), (norm, r))
        ]
        with torch.no_grad():
            for batch in batches:
                inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
                model.base_model(**inputs, use_cache=False)  # a cache would undo the packing
        for handle in handles:
            handle.remove()
        self.x, self.scale = torch.cat(x), 1 / torch.cat(r).norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
@pytest.mark.parametrize("dim", ["mlp", "heads", "kv_heads"])
def test_readers_of_a_cut_model_are_least_squares_solutions(
    tmp_path: Path, text: Path, name: str, dim: str
) -> None:
    """Profile → plan → cut, against lstsq on the dense model's own inputs; hidden is cut too.

    The order of the heads' channels is wrong if anything in that chain orders them another way.
    """
    checkpoint = write_model(tmp_path / "model", name, torch.float64)
    profile = profiled(tmp_path / "profile", checkpoint, text)
    model = checkpoint.model(torch.float64)
    after = {"mlp": {"mlp": 31}, "heads": {"heads": 4}, "kv_heads": {"kv_heads": 1, "heads": 2}}[
        dim
    ]
    config = model.config.to_dict()
    plan = random_plan(config, checkpoint.fingerprint, hidden=36, **after)
    repair = one_shot(checkpoint, profile, plan, (1e-3,))
    student = cut_model(model, plan, replace=repair)

    layer, reader = 1, "mlp.down_proj" if dim == "mlp" else "self_attn.o_proj"
    pre_mlp = "pre_feedforward" if "gemma" in name else "post_attention"
    norm = f"{pre_mlp}_layernorm" if dim == "mlp" else "input_layernorm"
    sequences = build_sequences(data_of(text), checkpoint.tokenizer(), "calibration", 40)
    fit = [n for n in range(len(sequences)) if n % 8 != 7]
    batches = [{k: v[fit] for k, v in next(sequences.batches(len(sequences))).items()}]
    prefix = f"model.layers.{layer}."
    recorded = Inputs(model, prefix + reader, prefix + norm, batches)
    units, width = plan.kept("mlp" if dim == "mlp" else "heads", layer), 1
    assert units is not None
    if dim != "mlp":
        width = plan.before["head_dim"]
    kept = [unit * width + n for unit in units for n in range(width)]
    x = recorded.x * recorded.scale
    old = model.get_submodule(prefix + reader).weight.detach()[plan.hidden]  # type: ignore[union-attr,index]
    root = float((1e-3 * x[:, kept].square().sum(0).mean()).sqrt())
    inputs = torch.cat([x[:, kept], root * torch.eye(len(kept), dtype=torch.float64)])
    outputs = torch.cat([x @ old.T, root * old[:, kept].T])
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    new: Any = student.get_submodule(prefix + reader).weight
    torch.testing.assert_close(new.detach(), expected, rtol=1e-4, atol=1e-5)
    assert repair.solutions[f"{prefix}{reader}.weight"][0] == 1e-3
    readers = len(plan.kept_layers())
    assert len(repair.solutions) == readers
    assert all(after < before for _, before, after in repair.solutions.values())


def test_only_readers_of_cut_dimensions_change(tmp_path: Path, text: Path) -> None:
    checkpoint = write_model(tmp_path / "model", "llama", torch.float64)
    profile = profiled(tmp_path / "profile", checkpoint, text)
    model = checkpoint.model(torch.float64)
    plan = random_plan(model.config.to_dict(), checkpoint.fingerprint, mlp=31, layers=[0, 2])
    repair = one_shot(checkpoint, profile, plan)
    repaired = cut_model(model, plan, replace=repair).state_dict()
    for name, plain in cut_model(model, plan).state_dict().items():
        assert torch.equal(repaired[name], plain) != name.endswith("down_proj.weight"), name
    assert set(repair.solutions) == {f"model.layers.{n}.mlp.down_proj.weight" for n in (0, 2)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Checkpoint:
    return write_trained(tmp_path_factory.mktemp("trained"), text, num_hidden_layers=2)


@pytest.mark.parametrize("after", [{"mlp": 28}, {"heads": 4}, {"mlp": 28, "hidden": 42}])
def test_a_repaired_model_is_nearer_to_the_dense_one(
    trained: Checkpoint, tmp_path: Path, text: Path, after: dict[str, int]
) -> None:
    profile = profiled(tmp_path / "profile", trained, text)
    dense = trained.model(torch.float32)
    plan: Plan = random_plan(dense.config.to_dict(), trained.fingerprint, **after)
    repair = one_shot(trained, profile, plan)
    heldout = build_sequences(data_of(text), trained.tokenizer(), "heldout", 20)
    plain = kl_between(dense, cut_model(dense, plan), heldout)
    repaired = kl_between(dense, cut_model(dense, plan, replace=repair), heldout)
    assert repaired < 0.9 * plain, (plain, repaired)
