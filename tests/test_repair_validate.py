"""A repair is applied only where the whole model gains by it, on text it was not fitted on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import data_of, write_model, write_text
from tiny_models import random_plan
from tiny_pruning import OPTIONS, write_place
from torch import Tensor

from regrow import families
from regrow.data.sequences import Sequences
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.config import PruneConfig
from regrow.pruning.cut import cut_model
from regrow.pruning.prune import RepairTrial
from regrow.pruning.repair import RepairSetup, Solutions, sequential
from regrow.pruning.repair import gram as by_gram
from regrow.pruning.repair._validate import validation_kl
from regrow.stage import RecipeRun, find, parse_step
from regrow.stage_dir import read
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile
from regrow.stages.prune.stage import prune


class Scaled:
    """A repair that puts other values into the output projections of the attention."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.solutions: Solutions = {"model.layers.0.self_attn.o_proj.weight": (0.1, 0.5, 0.2)}

    def __call__(self, name: str, kept: Tensor) -> Tensor:
        return kept.abs() * self.factor if "o_proj" in name else kept


@torch.no_grad()
def slow_kl(dense: Any, student: Any, sequences: Sequences) -> float:
    """KL(dense ‖ student) over every token with one before it, of every eighth sequence."""
    total, count = 0.0, 0
    for number in range(7, len(sequences), 8):
        ids, positions = sequences.input_ids[number], sequences.position_ids[number]
        log_p, log_q = (
            model(ids[None], position_ids=positions[None], use_cache=False)
            .logits[0]
            .log_softmax(-1)
            for model in (dense, student)
        )
        for t in range(1, len(ids)):
            if sequences.real[number, t] and positions[t] > 0:
                total += float((log_p[t - 1].exp() * (log_p[t - 1] - log_q[t - 1])).sum())
                count += 1
    return total / count


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral"])
@pytest.mark.parametrize("after", [{"heads": 4}, {"heads": 4, "hidden": 40, "layers": [0, 2]}])
def test_the_kl_is_that_of_whole_models(tmp_path: Path, name: str, after: dict[str, Any]) -> None:
    text = write_text(tmp_path / "text.jsonl")
    checkpoint = write_model(tmp_path / "model", name, torch.float64)
    config = ProfileConfig(criteria=("random",), samples=24)
    measured = profile(checkpoint, data_of(text), tmp_path / "profile", config, OPTIONS)
    dense = checkpoint.model(torch.float64)
    plan = random_plan(dense.config.to_dict(), checkpoint.fingerprint, **after)
    fewer = {"vocab": list(range(200)), "after": {**plan.after, "vocab": 200}}
    setup = RepairSetup(
        checkpoint,
        families.of(checkpoint),
        measured,
        plan.model_copy(update=fewer),
        tmp_path / "work",
        OPTIONS,
    )
    values, tokens = validation_kl(setup, (None, Scaled(0.5)))
    sequences = Sequences.load(measured.sequences_path())
    expected = [
        slow_kl(dense, cut_model(dense, plan, replace=replace), sequences)
        for replace in (None, Scaled(0.5))
    ]
    assert values == pytest.approx(expected, rel=1e-4)
    assert values[0] != pytest.approx(values[1], rel=1e-2)
    assert 2 * 32 < tokens < 3 * 32


def test_only_a_lower_kl_accepts_a_repair_and_nan_does_not() -> None:
    repair = Scaled(1.0)
    assert RepairTrial(repair, 0.4, 0.3).accepted is repair
    for kl in (0.4, 0.5, float("nan")):
        assert RepairTrial(repair, 0.4, kl).accepted is None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


SIZES = PruneConfig(num_attention_heads=4, multiple_of=8)


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", [sequential, by_gram])
def test_a_repair_that_does_harm_is_not_applied(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: Any,
) -> None:
    """Every layer's own error falls, by what the repair says; the model gets worse."""
    monkeypatch.setattr(method, "repair", lambda setup: Scaled(-4.0))
    config = SIZES.model_copy(update={"repair_method": method.__name__.split(".")[-1]})
    out = prune(place / "model", tmp_path / "out", config, place / "profile", options=OPTIONS)
    plain = prune(
        place / "model",
        tmp_path / "plain",
        SIZES.model_copy(update={"repair": False}),
        place / "profile",
    )
    for name, value in tensors(plain).items():
        assert torch.equal(value, tensors(out)[name]), name
    written = read(out)
    assert written is not None
    figures = {figure["name"]: figure["value"] for figure in written["figures"]}
    assert figures["KL with repair"] > figures["KL without repair"] > 0
    assert written["repair"] == {}
    assert "output error after repair" not in figures
    assert "the repair does not help and is not applied" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [-4.0, None])
def test_a_recipe_continues_with_the_better_model(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float | None
) -> None:
    if factor is not None:
        monkeypatch.setattr(sequential, "repair", lambda setup: Scaled(factor))
    step = parse_step({"prune": SIZES.model_dump(exclude_unset=True)}, 0)
    data = data_of(place / "text.jsonl")
    run = RecipeRun(str(place / "model"), data, [step], tmp_path, OPTIONS)
    run.profile = place / "profile"
    find("prune").run(step, run, "01-prune")
    last = "01-prune" if factor is not None else "01-prune-repaired"
    assert run.current == tmp_path / "stages" / last
    assert list(run.models) == ["teacher", "pruned", *(["repaired"] if factor is None else [])]
    plan, other = (Plan.read(tmp_path / "stages" / n / "plan.json") for n in ("01-prune", last))
    assert plan == other
    assert Profile(place / "profile").info["gram_tokens"] == 24 * 32
