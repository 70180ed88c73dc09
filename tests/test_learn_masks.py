"""The learn_masks stage: it reaches the shape, prune cuts to it, and a killed run continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import data_of, write_model, write_text
from tiny_job import LENGTH, recipe_fields, refused, write_recipe
from tiny_pruning import write_trained

from regrow import (
    LearnMasksConfig,
    Options,
    PruneConfig,
    SparsifyConfig,
    UserError,
    learn_masks,
    prune,
    sparsify,
    stage_dir,
)
from regrow.checkpoint import Checkpoint, load
from regrow.cli.main import main
from regrow.config import parse
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.stages.learn_masks import stage as learning

OPTIONS = Options(device="cpu", batch_size=4)
SHAPE = {
    "num_layers": 2,
    "hidden_size": 36,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
CONFIG = LearnMasksConfig(
    **SHAPE,
    multiple_of=4,
    tokens=120 * 128,
    batch_tokens=128,
    learning_rate=1e-3,
    samples=8,
    heldout_sequences=4,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("masks")
    text = write_text(place / "text.jsonl")
    checkpoint = write_trained(place / "model", text, head_dim=8)
    model = checkpoint.model(torch.float32)
    with torch.no_grad():  # every fourth MLP channel of the middle layer does nothing
        model.model.layers[1].mlp.down_proj.weight[:, ::4] = 0
    model.save_pretrained(str(place / "model"))
    return place


@pytest.fixture(scope="module")
def learned(place: Path) -> Path:
    data = data_of(place / "text.jsonl")
    learn_masks(place / "model", data, place / "learned", CONFIG, OPTIONS)
    return place / "learned"


def scores_in(folder: Path) -> dict[str, torch.Tensor]:
    scores: dict[str, torch.Tensor] = load_file(folder / "profile/scores.safetensors")
    return scores


def test_the_masks_reach_the_shape(learned: Path) -> None:
    found = {f["name"]: f["value"] for f in (stage_dir.read(learned) or {})["figures"]}
    targets = {"layers": 2, "hidden": 36, "mlp": 24, "heads": 2, "kv_heads": 1}
    before = {"layers": 3, "hidden": 48, "mlp": 56, "heads": 6, "kv_heads": 2}
    for dim, target in targets.items():
        assert abs(found[f"expected {dim}"] - target) < 0.15 * before[dim], dim


def test_it_says_whether_the_shape_was_reached(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LearnMasksConfig(
        intermediate_size=32, multiple_of=4, tokens=256, batch_tokens=128, heldout_sequences=2
    )
    learn_masks(place / "model", data_of(place / "text.jsonl"), tmp_path / "out", config)
    told = capsys.readouterr().err
    assert "expected sizes, and the target: mlp " in told
    assert "the masks did not reach the shape in mlp: raise tokens" in told


def test_prune_cuts_to_that_shape(learned: Path, tmp_path: Path) -> None:
    sizes = PruneConfig(
        **SHAPE,
        multiple_of=4,
        criterion="learned_masks",
        layer_criterion="learned_masks",
        repair=False,
    )
    out = prune(learned, tmp_path / "cut", sizes, learned / "profile")
    config = load(out).config
    assert config["num_hidden_layers"] == 2
    assert (config["hidden_size"], config["intermediate_size"]) == (36, 24)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    plan, scores = Plan.read(out / "plan.json"), scores_in(learned)
    best = scores["learned_masks/hidden/all"].topk(36).indices
    assert plan.hidden == sorted(best.tolist())
    assert plan.layers == sorted(scores["learned_masks/layers/all"].topk(2).indices.tolist())


def test_the_cut_model_is_the_one_that_was_measured(
    place: Path, learned: Path, tmp_path: Path
) -> None:
    """The figure for the shape, from masks, against the folder that prune writes."""
    from regrow.data.sequences import build_sequences

    sizes = {"criterion": "learned_masks", "layer_criterion": "learned_masks", "repair": False}
    config = PruneConfig.model_validate({**SHAPE, "multiple_of": 4, **sizes})
    cut = prune(learned, tmp_path / "cut", config, learned / "profile")
    model = load(cut).model(torch.float32)
    text = data_of(place / "text.jsonl")
    sequences = build_sequences(text, load(place / "model").tokenizer(), "validation", 4)
    batch = next(sequences.batches(4))
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits
    labels = batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    found = {f["name"]: f["value"] for f in (stage_dir.read(learned) or {})["figures"]}
    measured = found["held-out cross-entropy, cut to the shape"]
    assert measured == pytest.approx(float(loss), rel=0.01)  # masks were measured in bfloat16
    assert measured != pytest.approx(found["held-out cross-entropy, whole"], rel=0.01)


def test_masks_alone_find_channels_that_do_nothing(place: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={
            **dict.fromkeys(SHAPE),
            "intermediate_size": 40,
            "train_weights": False,
            "losses": {"forward_kl": 1.0},
        }
    )
    data = data_of(place / "text.jsonl")
    out = load(learn_masks(place / "model", data, tmp_path / "out", config, OPTIONS))
    profile, before = Profile(out.folder / "profile"), load(place / "model")
    assert all(torch.equal(out.tensor(name), before.tensor(name)) for name in before.names())
    profile.check_fingerprint(out)
    scores = profile.scores("learned_masks", "mlp")["1"]
    useless = torch.zeros(56, dtype=torch.bool)
    useless[::4] = True
    lowest = scores.argsort()[:16]
    assert int(useless[lowest].sum()) >= 13  # 14 channels do nothing; chance would be 4


def test_a_killed_run_ends_with_the_same_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = data_of(place / "text.jsonl"), tmp_path / "out"
    config = CONFIG.model_copy(update={"tokens": 24 * 128, "save_tokens": 8 * 128})
    learn_masks(place / "model", data, tmp_path / "whole", config, OPTIONS)
    save = learning._MaskTraining._save

    def killed(self: learning._MaskTraining, *given: object) -> None:
        save(self, *given)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(learning._MaskTraining, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            learn_masks(place / "model", data, out, config, OPTIONS)
    assert not out.exists()
    learn_masks(place / "model", data, out, config, OPTIONS)
    for name, scores in scores_in(tmp_path / "whole").items():
        assert torch.equal(scores_in(out)[name], scores), name
    one, other = Checkpoint(tmp_path / "whole"), Checkpoint(out)
    assert one.fingerprint == other.fingerprint


REFUSED = {
    "no size": ({}, "give the target shape"),
    "too large": ({"intermediate_size": 64}, "allowed are 1 to 56"),
    "multiple": ({"intermediate_size": 30, "multiple_of": 4}, "30"),
    "heads": ({"num_attention_heads": 5, "num_key_value_heads": 2}, "5"),
    "the same": ({"hidden_size": 48}, "is the model's own"),
    "batch": ({"hidden_size": 36, "multiple_of": 4, "batch_tokens": 33}, "no multiple"),
    "rate": ({"hidden_size": 36, "mask_rate": float("inf")}, "finite"),
    "loss": ({"hidden_size": 36, "losses": {"forward_k": 1}}, "did you mean 'forward_kl'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, place: Path, tmp_path: Path) -> None:
    fields, message = REFUSED[case]

    def learn() -> None:
        config = parse(LearnMasksConfig, fields, "learn_masks")
        learn_masks(place / "model", data_of(place / "text.jsonl"), tmp_path / "out", config)

    with pytest.raises(UserError, match=message) as caught:
        learn()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sparse_weights_are_not_filled(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = sparsify(place / "model", tmp_path / "sparse", SparsifyConfig(method="magnitude"))
    given = ["learn_masks", sparse, "--data", place / "text.jsonl", "--out", tmp_path / "out"]
    given += ["--sequence-length", LENGTH, "--hidden-size", 36, "--multiple-of", 4]
    told = refused(capsys, *given, "--batch-tokens", 128)
    assert "training with masks would fill their zeros: set train_weights to false" in told


def test_a_recipe_learns_prunes_and_distils(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    write_model(tmp_path / "model", dtype=torch.bfloat16, head_dim=8)
    few = {"tokens": 512, "batch_tokens": 128, "heldout_sequences": 2}
    shape = {"intermediate_size": 40, "multiple_of": 8}
    stages = [
        {"learn_masks": {**shape, **few, "samples": 8}},
        {"prune": {**shape, "criterion": "learned_masks"}},
        {"distill": {**few, "eval_tokens": 256}},
    ]
    fields = recipe_fields(tmp_path / "model", tmp_path / "text.jsonl", *stages)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 0
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["intermediate_size"] == 40


def test_a_model_that_mixes_documents_gets_one_in_each_sequence(
    place: Path, tmp_path: Path, alone: list[bool]
) -> None:
    config = CONFIG.model_copy(update={"tokens": CONFIG.batch_tokens})
    data = data_of(place / "text.jsonl")
    learn_masks(place / "model", data, tmp_path / "out", config, OPTIONS)
    assert alone == [True] * 3
