"""Zeros of a sparse model stay zero in training, and what would fill them is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distillation import CONFIG, OPTIONS, data, held_out, write_place
from tiny_job import call, refused, write_recipe
from torch import Tensor, nn

from regrow import (
    DistillConfig,
    LearnMasksConfig,
    PruneConfig,
    QuantizeConfig,
    RotateConfig,
    SparsifyConfig,
    UserError,
    distill,
    learn_masks,
    prune,
    quantize,
    reconstruct,
    rotate,
    sparsify,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.sparsity import zeros
from regrow.stages.reconstruct import ReconstructConfig

HALF = SparsifyConfig(method="magnitude", sparsity=0.5)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("place"))
    sparsify(place / "pruned", place / "sparse", HALF)
    few = HALF.model_copy(update={"sparsity": 0.1})
    sparsify(place / "pruned", place / "few", few)
    return place


def matrices(folder: Path) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in zeros.weights(load(folder))}


def trained(place: Path, student: Path, name: str, **fields: Any) -> Path:
    config = CONFIG.model_copy(update=fields)
    return distill(student, place / "teacher", data(place), place / "out" / name, config, OPTIONS)


def recipe_of(place: Path, model: str, stages: list[Any], folder: Path) -> Path:
    fields = {
        "model": str(place / model),
        "data": data(place).model_dump(mode="json"),
        "stages": [{s: {}} if isinstance(s, str) else s for s in stages],
    }
    return write_recipe(folder / "recipe.yaml", fields)


def without_manifest(folder: Path, out: Path) -> Path:
    """The same model as another tool would have written it."""
    out.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != "manifest.json":
            (out / path.name).write_bytes(path.read_bytes())
    return out


KINDS: dict[str, dict[str, Any]] = {
    "sparse": {},
    "few": {},
    "without manifest": {},
    "int4": {"fake_quantize": "int4-g32"},
    "weight decay": {"weight_decay": 0.1},
    "8 bits": {"optimizer": "adamw_8bit", "weight_decay": 0.1},
    "bf16": {"optimizer": "adamw_bf16", "weight_decay": 0.1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_weights_have_the_same_zeros(kind: str, place: Path) -> None:
    student = place / ("few" if kind == "few" else "sparse")
    if kind == "without manifest":
        student = without_manifest(student, place / "foreign")
    if "optimizer" in KINDS[kind]:
        pytest.importorskip("torchao")
    out = trained(place, student, kind, **KINDS[kind])
    before, after = matrices(student), matrices(out)
    for name, weight in before.items():
        assert (after[name][weight == 0] == 0).all(), name
        assert (after[name] != weight)[weight != 0].float().mean() > 0.5, name  # it was trained
    kl = held_out(out)
    assert kl[max(kl)] < kl[0]
    manifest = stage_dir.read(out) or {}
    assert manifest["sparsity"] == ("0.1" if kind == "few" else "0.5")


def test_zeros_may_be_filled_with_a_warning(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained(place, place / "sparse", "filled", keep_zeros=False)
    assert "keep_zeros is off: training fills the zeros" in capsys.readouterr().err
    assert max(map(zeros.share, matrices(out).values())) < 0.1
    assert "sparsity" not in (stage_dir.read(out) or {})


@pytest.mark.slow
def test_a_continued_run_keeps_them(place: Path) -> None:
    out = trained(place, place / "sparse", "longer", tokens=CONFIG.tokens // 2)
    out = trained(place, place / "sparse", "longer")
    for name, weight in matrices(place / "sparse").items():
        assert (matrices(out)[name][weight == 0] == 0).all(), name


@pytest.mark.slow
def test_more_sparsity_after_training_keeps_the_first_zeros(place: Path) -> None:
    first = trained(place, place / "sparse", "sparse")
    config = SparsifyConfig(sparsity=0.7, samples=16)
    more = sparsify(first, place / "more", config, data(place))
    again = trained(place, more, "again")
    start, end = matrices(place / "sparse"), matrices(again)
    for name, weight in start.items():
        assert (end[name][weight == 0] == 0).all()
        assert zeros.share(end[name]) == pytest.approx(0.7, abs=0.02)


def test_gradients_are_zero_before_their_norm_is_taken() -> None:
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        layer[0].weight[:, :2] = 0
        layer[2].weight.zero_()  # all of it: it is new, and shall be filled
    assert zeros.hold(layer) == (8, 16)
    (layer(torch.ones(3, 4)).sum() + layer[2].weight.sum()).backward()
    assert (layer[0].weight.grad[:, :2] == 0).all()
    assert (layer[2].weight.grad != 0).all()


def test_reconstruction_keeps_them(place: Path) -> None:
    config = ReconstructConfig(tokens=256, batch_tokens=128, passes=2, validation_sequences=4)
    given = (place / "sparse", place / "teacher", data(place), place / "reconstructed", config)
    out = reconstruct(*given, OPTIONS)
    after = matrices(out)
    changed = False
    for name, weight in matrices(place / "sparse").items():
        assert (after[name][weight == 0] == 0).all(), name
        changed |= not torch.equal(after[name], weight)
    assert changed


def test_what_leaves_the_zeros_keeps_the_note_on_them(place: Path, tmp_path: Path) -> None:
    """Without it, training would take a tenth of zeros for chance, and fill them."""
    sparsify(place / "teacher", tmp_path / "few", HALF.model_copy(update={"sparsity": 0.1}))
    plan = PruneConfig(plan=str(place / "plan.json"), allow_sibling=True, repair=False)
    cut = prune(tmp_path / "few", tmp_path / "cut", plan)
    masks = LearnMasksConfig(
        intermediate_size=24, multiple_of=4, train_weights=False, tokens=256, batch_tokens=128
    )
    learned = learn_masks(cut, data(place), tmp_path / "learned", masks, OPTIONS)
    assert zeros.recorded(load(learned)) == "0.1"
    out = trained(place, learned, "few after a cut")
    for name, weight in matrices(learned).items():
        assert (weight == 0).any()
        assert (matrices(out)[name][weight == 0] == 0).all(), name


def test_a_cut_of_widths_breaks_the_groups_of_a_pattern(place: Path, tmp_path: Path) -> None:
    pattern = SparsifyConfig(method="magnitude", pattern="2:4")
    sparse = sparsify(place / "teacher", tmp_path / "sparse", pattern)
    plan = PruneConfig(plan=str(place / "plan.json"), allow_sibling=True, repair=False)
    cut = prune(sparse, tmp_path / "cut", plan)
    assert zeros.recorded(load(sparse)) == "2:4"
    assert zeros.recorded(load(cut)) == "0.5"


def test_a_layer_without_zeros_gets_no_mask() -> None:
    layer = nn.Linear(8, 8, bias=False)
    assert zeros.hold(layer, 0.0) == (0, 0)
    with torch.no_grad():
        layer.weight[0, 0] = 0
    assert zeros.hold(layer, 0.0) == (1, 64)


def test_what_would_fill_them_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sparse, and adapter lora would fill their zeros"):
        trained(place, place / "sparse", "lora", adapter="lora")
    sparse = load(place / "sparse")
    with pytest.raises(UserError, match=r"\(0.5\), and a rotation would fill .* rotate before"):
        rotate(sparse, data(place), tmp_path / "r", RotateConfig())
    with pytest.raises(UserError, match=r"\(0.5\), and repair would fill .* repair to false"):
        prune(sparse, tmp_path / "p", PruneConfig(intermediate_size=24))
    assert not list(tmp_path.iterdir())


def test_other_columns_of_quantized_weights_do_not_fill_them(place: Path) -> None:
    """GPTQ compensates in later columns; of a folder that another tool made sparse, too."""
    student = without_manifest(place / "sparse", place / "foreign for gptq")
    config = QuantizeConfig(scheme="int8", method="gptq", samples=16)
    out = quantize(student, place / "gptq", config, data(place))
    state = Checkpoint(out, quantized=True).model(torch.float32).state_dict()
    for name, weight in matrices(student).items():
        assert (state[name][weight == 0] == 0).all(), name


RECIPES: dict[str, tuple[list[Any], str]] = {
    "repair": (["sparsify", "profile", {"prune": {"keep_params": 0.9}}], "repair would fill"),
    "rotation": (["sparsify", "rotate"], "a rotation would fill their zeros: rotate before"),
    "adapter": (["sparsify", {"distill": {"adapter": "lora"}}], "adapter lora would fill"),
    "width": ([{"sparsify": {"pattern": "4:32"}}], "self_attn.q_proj has 48 columns"),
    "range": ([{"sparsify": {"sparsity": 2}}], "2 is out of range"),
    "quantized": (["quantize", "sparsify"], "put quantize last"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_are_refused_before_they_run(
    case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, message = RECIPES[case]
    recipe = recipe_of(place, "teacher", stages, tmp_path)
    assert message in refused(capsys, "run", recipe, "--out", tmp_path / "run")


OWN: dict[str, tuple[list[Any], str]] = {
    "rotation": ([{"distill": {"tokens": 256}}, "rotate"], "a rotation would fill"),
    "repair": (["profile", {"prune": {"intermediate_size": 24}}], "repair would fill"),
    "masks": ([{"learn_masks": {"hidden_size": 24}}], "training with masks would fill"),
}


@pytest.mark.parametrize("case", OWN)
def test_a_recipe_whose_own_model_is_sparse_is_refused_before_it_runs(
    case: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages, message = OWN[case]
    recipe = recipe_of(place, "sparse", stages, tmp_path)
    told = refused(capsys, "run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert "has sparse weights (0.5)" in told and message in told


@pytest.mark.parametrize("command", ["rotate", "learn_masks", "prune"])
def test_dry_runs_of_what_would_fill_them_are_refused(
    command: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = [command, place / "sparse", "--out", tmp_path / "out", "--dry-run"]
    given += ["--data", place / "text.jsonl"] if command != "prune" else []
    given += ["--intermediate-size", 24, "--multiple-of", 4] if command != "rotate" else []
    assert "would fill their zeros" in refused(capsys, *given)


def test_a_recipe_in_two_rounds(place: Path, tmp_path: Path) -> None:
    budget = DistillConfig.model_validate(
        {"tokens": 256, "batch_tokens": 128, "eval_tokens": 256, "heldout_sequences": 2}
    ).model_dump(include={"tokens", "batch_tokens", "eval_tokens", "heldout_sequences"})
    stages = [
        {"sparsify": {"sparsity": 0.4, "samples": 16}},
        {"distill": budget},
        {"sparsify": {"pattern": "2:4", "samples": 16}},
        {"distill": budget},
        {"evaluate": {"metrics": ["size"]}},
        "report",
        {"export": {"type": "bitmask"}},
    ]
    fields = {
        "model": str(place / "teacher"),
        "data": data(place).model_dump(mode="json"),
        "stages": stages,
    }
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    call("run", recipe, "--out", tmp_path / "run", "--dry-run")
    call("run", recipe, "--out", tmp_path / "run")
    for name, weight in matrices(tmp_path / "run" / "model").items():
        assert ((weight == 0).view(-1, 4).sum(1) >= 2).all(), name
    place = next((tmp_path / "run" / "stages").glob("*evaluate*/evaluation.json"))
    rows = json.loads(place.read_text())["figures"]
    last = {row["name"]: row["value"] for row in rows["distilled 2"]}
    assert 0.3 < last["zeros"] < 0.6
    assert last["bytes_as_bitmask"] < last["bytes"]
    assert "zeros" not in {row["name"] for row in rows["teacher"]}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Zeros make the folder no smaller and the model no faster" in page
