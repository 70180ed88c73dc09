"""Feature losses through the stage: by the plan, by depth, what is refused, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from tiny_distillation import CONFIG, OPTIONS, data, figures, rows_of, write_place
from tiny_folders import write_model

from regrow.checkpoint import load
from regrow.config import parse
from regrow.errors import UserError
from regrow.plan import Plan
from regrow.stages.distill import estimate
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.setup import feature_losses_between
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import open_student
from regrow.training.features import LayerMapping

SHORT = CONFIG.model_copy(update={"tokens": 4 * 128, "eval_tokens": 2 * 128})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_place(tmp_path_factory.mktemp("place"))


def feature_losses_for(place: Path, student: str, **fields: Any) -> Any:
    config = CONFIG.model_copy(update=fields)
    master = load(place / "teacher")
    return feature_losses_between(open_student(place / student, master), master, config)


def test_the_hidden_loss_falls_when_it_has_a_weight(place: Path, tmp_path: Path) -> None:
    """The KL alone leaves it where it is."""
    ends = []
    for weight in (1e-6, 20.0):
        config = CONFIG.model_copy(update={"feature_losses": {"hidden": weight}})
        out = tmp_path / str(weight)
        distill(place / "pruned", place / "teacher", data(place), out, config, OPTIONS)
        rows = [row["heldout_hidden"] for row in rows_of(out) if "heldout_hidden" in row]
        ends.append(rows[-1] / rows[0])
        assert figures(out)["held-out KL"] > 0
    assert ends[1] < 0.95 < ends[0], ends


@pytest.mark.parametrize("student", ["pruned", "stranger"])
def test_all_feature_losses_train_together_with_balance(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], student: str
) -> None:
    """Logged by name; the student that is written is a stock one, with nothing of ours in it.

    The stranger has one layer, so that only embeddings and attention have anything to compare.
    """
    names = ["attention", "embeddings"]
    names += ["hidden", "hidden_cosine", "logit_lens"] if student == "pruned" else []
    weights = dict.fromkeys(names, 1.0)
    config = SHORT.model_copy(update={"feature_losses": weights, "balance_feature_losses": True})
    out = tmp_path / "out"
    distill(place / student, place / "teacher", data(place), out, config, OPTIONS)
    rows = rows_of(out)
    for kind, prefix in (("loss", ""), ("heldout_kl", "heldout_")):
        logged = [row for row in rows if kind in row]
        assert len(logged) >= 3
        assert all(row[prefix + name] >= 0 for row in logged for name in names)
    output = capsys.readouterr().err
    assert "needs eager attention in both models" in output
    assert ("no plan leads from" in output) == (student == "stranger")
    fields = json.loads((out / "config.json").read_text())
    assert not [key for key in fields if "attn_impl" in key]
    with safe_open(place / student / "model.safetensors", "pt") as before:
        names_before = set(before.keys())
    with safe_open(out / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names_before
    assert not (out / "feature_losses.pt").exists()


def test_the_layer_mapping_follows_the_plan(place: Path) -> None:
    plan = Plan.read(place / "pruned" / "plan.json")
    weights = {"hidden": 1.0, "embeddings": 1.0}
    assert feature_losses_for(
        place, "pruned", feature_losses=weights
    ).mapping == LayerMapping.of_plan(plan)
    assert feature_losses_for(
        place, "teacher", feature_losses=weights
    ).mapping == LayerMapping.of_same(2)
    stranger = feature_losses_for(place, "stranger", feature_losses={"embeddings": 1.0}).mapping
    assert {n: tuple(p.shape) for n, p in stranger.projections.items()} == {"embeddings": (36, 48)}
    lens = feature_losses_for(
        place, "pruned", feature_losses={"logit_lens": 1.0}, lens_layers=(0,)
    ).mapping.lens
    assert lens == ((0, 0),)
    assert feature_losses_for(place, "pruned") is None


def test_bad_feature_losses_are_refused_before_any_slow_work(place: Path, tmp_path: Path) -> None:
    for student in ("stranger", "config.json"):
        for name in ("hidden", "logit_lens_symmetric"):
            with pytest.raises(UserError, match=rf"{name} compares .* \(1 layers\) is paired with"):
                feature_losses_for(place, student, feature_losses={"embeddings": 1.0, name: 1.0})
    with pytest.raises(UserError, match=r"lens_layers: 1 is not a layer .* \(0 to 0\)"):
        feature_losses_for(place, "pruned", feature_losses={"logit_lens": 1.0}, lens_layers=(1,))
    config = CONFIG.model_copy(update={"feature_losses": {"logit_lens": 1.0}, "lens_layers": (1,)})
    teacher = load(place / "teacher")
    with pytest.raises(UserError, match="lens_layers: 1 is not a layer"):  # what --dry-run does
        estimate(open_student(place / "pruned", teacher), teacher, data(place), config, OPTIONS)
    write_model(tmp_path / "dropping", attention_dropout=0.1)
    master = load(place / "teacher")
    config = CONFIG.model_copy(update={"feature_losses": {"attention": 1.0}})
    with pytest.raises(UserError, match=r"attention_dropout 0.1: set it to 0"):
        feature_losses_between(open_student(tmp_path / "dropping", master), master, config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"feature_losses": {"hiden": 1.0}},
            "no feature loss named 'hiden' — did you mean 'hidden'?",
        ),
        (
            {"feature_losses": {"zzz": 1.0}},
            "no feature loss named 'zzz'; there are: attention, embeddings",
        ),
        ({"feature_losses": {"hidden": 0}}, "the weight of hidden must be above 0"),
        ({"feature_losses": {"hidden": float("inf")}}, "should be a finite number"),
        (
            {"feature_losses": ["hidden"]},
            "stages.1.distill.feature_losses: Input should be a valid dictionary",
        ),
        ({"lens_layers": [1.5]}, "1.5 is no depth: give shares between 0 and 1"),
        ({"lens_layers": [-1]}, "-1 is no depth"),
        ({"lens_layers": []}, "give at least one depth"),
        ({"hidden_weight": 1.0}, "hidden_weight: unknown key"),
    ],
)
def test_bad_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(DistillConfig, fields, "stages.1.distill")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
