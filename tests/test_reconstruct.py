"""Layer-by-layer reconstruction: its loss, what it is accepted by, resuming, every kind of cut."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_folders import data_of, write_text
from tiny_job import LENGTH, PROFILE, PRUNE, call, recipe_fields, write_model, write_recipe
from tiny_models import random_plan
from tiny_pruning import kl_between, write_trained
from transformers import AutoModelForCausalLM

from regrow import UserError, families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.sequences import build_sequences
from regrow.layerwise import LayerByLayer
from regrow.pruning.config import PruneConfig
from regrow.stage_dir import read
from regrow.stages.prune.stage import prune
from regrow.stages.reconstruct import ReconstructConfig, stage, streams
from regrow.stages.reconstruct.stage import reconstruct
from regrow.stages.reconstruct.train_layer import (
    Target,
    batch_error,
    channel_weights,
    relative_error,
)

OPTIONS = Options(device="cpu", batch_size=4)
CONFIG = ReconstructConfig(
    tokens=24 * LENGTH, batch_tokens=4 * LENGTH, passes=6, validation_sequences=6, checks=2
)
CUTS: dict[str, dict[str, Any]] = {
    "mlp": {"mlp": 32},
    "layers": {"layers": 2},
    "hidden": {"hidden": 36},
    "heads": {"kv_heads": 1},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl", documents=400)


def cut_of(teacher: Checkpoint, folder: Path, **sizes: Any) -> Path:
    """A child of the teacher that keeps random units, unrepaired."""
    random_plan(teacher.config, teacher.fingerprint, **sizes).write(folder / "plan.json")
    prune(teacher, folder / "cut", PruneConfig(plan=str(folder / "plan.json"), repair=False))
    return folder / "cut"


def kl_of(model: Path, teacher: Path, text: Path) -> float:
    """By the stock classes in float32, on held-out text."""
    sequences = build_sequences(data_of(text), Checkpoint(teacher).tokenizer(), "heldout", 8)
    dense, student = (
        AutoModelForCausalLM.from_pretrained(str(p), dtype=torch.float32) for p in (teacher, model)
    )
    return kl_between(dense, student, sequences)


@pytest.mark.parametrize("cut", CUTS)
def test_reconstruction_lowers_the_kl_to_the_teacher(cut: str, text: Path, tmp_path: Path) -> None:
    teacher = write_trained(tmp_path / "teacher", text, num_hidden_layers=3)
    student = cut_of(teacher, tmp_path, **CUTS[cut])
    out = reconstruct(student, teacher, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    before, after = (kl_of(folder, teacher.folder, text) for folder in (student, out))
    assert after < 0.9 * before
    manifest = read(out)
    assert manifest is not None
    figures = {figure["name"]: figure["value"] for figure in manifest["figures"]}
    assert figures["KL after"] < figures["KL before"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        {*(path.name for path in student.iterdir()), "manifest.json"} - {"candidates.json"}
    )


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "mixtral"])
def test_reconstruction_works_with_biases_post_norms_and_experts(
    family: str, text: Path, tmp_path: Path
) -> None:
    """Biases, norms after the layers, stacked experts."""
    teacher = write_trained(tmp_path / "teacher", text, family)
    sizes = {"experts": 3} if family == "mixtral" else {"mlp": 32}
    student = cut_of(teacher, tmp_path, **sizes)
    out = reconstruct(student, teacher, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    before, after = (kl_of(folder, teacher.folder, text) for folder in (student, out))
    assert after < before


def test_layers_without_an_error_are_passed_over(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_trained(tmp_path / "teacher", text, num_hidden_layers=5)
    student = cut_of(teacher, tmp_path, layers=[0, 1, 3, 4])
    trained, train = list[int](), stage.train_layer

    def counted(*given: Any, seed: int, **rest: Any) -> dict[str, Any]:
        trained.append(seed - CONFIG.seed)
        return train(*given, seed=seed, **rest)

    monkeypatch.setattr(stage, "train_layer", counted)
    out = reconstruct(student, teacher, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    assert trained == [1, 2, 3]  # layer 1 stands for layer 2 as well
    old, new = (load_file(folder / "model.safetensors") for folder in (student, out))
    assert all(torch.equal(old[name], new[name]) for name in old if "layers.0." in name)
    assert not all(torch.equal(old[name], new[name]) for name in old)


def test_the_error_equals_its_formula(text: Path, tmp_path: Path) -> None:
    """Against a loop over tokens in float64."""
    teacher = write_trained(tmp_path / "teacher", text)
    student = Checkpoint(cut_of(teacher, tmp_path, hidden=36))
    plan = stage.plan_between(student, teacher)
    sequences = build_sequences(data_of(text), student.tokenizer(), "train", 3)
    device = torch.device("cpu")
    shells = [
        LayerByLayer.of(checkpoint, families.of(checkpoint), device, dtype=torch.float64)
        for checkpoint in (teacher, student)
    ]
    both_streams = streams.Streams(tmp_path / "streams", list(sequences.batches(1)), *shells)
    both_streams.advance_dense([0], None)
    assert plan.hidden is not None

    def stream(number: int) -> torch.Tensor:
        return both_streams.dense(number)[..., plan.hidden]

    target = Target(stream, channel_weights(both_streams, range(3), stream))

    dense, cut = (
        AutoModelForCausalLM.from_pretrained(str(checkpoint.folder), dtype=torch.float64)
        for checkpoint in (teacher, student)
    )
    pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], [], []]
    for n in range(3):
        inputs = {
            "input_ids": sequences.input_ids[n : n + 1],
            "position_ids": sequences.position_ids[n : n + 1],
            "output_hidden_states": True,
            "use_cache": False,
        }
        with torch.no_grad():
            goal, output = (model(**inputs).hidden_states[1][0] for model in (dense, cut))
        for t in range(LENGTH):
            if sequences.real[n, t]:
                pairs[n].append((goal[t, plan.hidden], output[t]))
    goals = [h for each in pairs for h, _ in each]
    shares = torch.stack([h**2 / (h**2).sum() for h in goals]).mean(0)
    c = 1 / (shares + shares.median())
    slow = [float(sum((c * (o - h) ** 2).sum() / (c * h**2).sum() for h, o in p)) for p in pairs]
    tokens = [len(each) for each in pairs]
    with torch.no_grad(), shells[1].resident(0):
        fast = [float(batch_error(shells[1], both_streams, n, target)) for n in range(3)]
        mean = relative_error(shells[1], both_streams, range(3), target)
    assert fast == pytest.approx([s / n for s, n in zip(slow, tokens, strict=True)], rel=1e-5)
    assert mean == pytest.approx(sum(slow) / sum(tokens), rel=1e-5)


def test_the_rate_follows_the_size_of_a_weight(text: Path, tmp_path: Path) -> None:
    """up_proj times 16 and down_proj by 16 is the same function, and learns the same."""
    teacher = write_trained(tmp_path / "teacher", text)
    plain = cut_of(teacher, tmp_path, mlp=32)
    scaled = Path(shutil.copytree(plain, tmp_path / "scaled"))
    tensors = load_file(plain / "model.safetensors")
    for name in tensors:
        factor = 16.0 if "up_proj" in name else 1 / 16 if "down_proj" in name else 1.0
        tensors[name] = tensors[name] * factor
    save_file(tensors, scaled / "model.safetensors", {"format": "pt"})
    after = [
        [row["after"] for row in rows_of(reconstruct_to(folder, teacher, text))]
        for folder in (plain, scaled)
    ]
    assert after[0] == pytest.approx(after[1], rel=0.05)  # clipped gradients differ a little


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What a reconstruction wrote about each layer."""
    manifest = read(folder)
    assert manifest is not None
    rows: list[dict[str, Any]] = manifest["layers"]
    return rows


def reconstruct_to(student: Path, teacher: Checkpoint, text: Path) -> Path:
    out = student.with_name(f"{student.name}-out")
    return reconstruct(student, teacher.folder, data_of(text), out, CONFIG, OPTIONS)


def test_a_layer_that_makes_the_model_worse_is_not_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the layers' own errors say."""
    teacher = write_trained(tmp_path / "teacher", text, num_hidden_layers=3)
    student = cut_of(teacher, tmp_path, mlp=32)
    errors = iter([1.0, 0.0] * 3)
    monkeypatch.setattr(stage, "relative_error", lambda *_: next(errors))
    wild = CONFIG.model_copy(update={"learning_rate": 3.0, "attention_rate": 1.0})
    out = reconstruct(student, teacher, data_of(text), tmp_path / "out", wild, OPTIONS)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, out))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    manifest = read(out)
    assert manifest is not None
    assert not any(row["kept"] for row in manifest["layers"])


@pytest.mark.parametrize(
    ("kl", "new"),
    [
        ([1.0, 1.2, 0.9], [True, True, True, True]),  # later layers made up for the first ones
        ([1.0, 0.8, 0.9], [True, True, False, False]),
        ([1.0, 1.2, 1.1], [False, False, False, False]),
        ([1.0, 0.8, float("nan")], [True, True, False, False]),
    ],
)
def test_the_layers_after_the_best_check_get_their_old_weights_back(
    kl: list[float], new: list[bool], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_trained(tmp_path / "teacher", text, num_hidden_layers=4)
    student = cut_of(teacher, tmp_path, mlp=32)
    measured = iter(kl)
    monkeypatch.setattr(stage.Reconstruction, "_kl", lambda *_, **__: next(measured))
    out = reconstruct(student, teacher, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    old, got = (load_file(folder / "model.safetensors") for folder in (student, out))
    changed = {name.split(".")[2] for name in old if not torch.equal(old[name], got[name])}
    assert changed == {str(layer) for layer, is_new in enumerate(new) if is_new}
    manifest = read(out)
    assert manifest is not None
    assert [row["kept"] for row in manifest["layers"]] == new


def test_a_killed_run_resumes_to_the_same_result(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the layer that it was at, to the same result; streams on disk or in memory."""
    teacher = write_trained(tmp_path / "teacher", text, num_hidden_layers=4)
    student = cut_of(teacher, tmp_path, layers=3, mlp=32)
    uninterrupted = reconstruct(
        student, teacher, data_of(text), tmp_path / "whole", CONFIG, OPTIONS
    )
    trained: list[int] = []
    real = stage.train_layer

    def killed(*arguments: Any, **options: Any) -> Any:
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(stage, "train_layer", killed)
    monkeypatch.setattr(streams, "SHARE_OF_RAM", 0.0)
    arguments = (student, teacher, data_of(text), tmp_path / "out", CONFIG, OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        reconstruct(*arguments)
    assert not (tmp_path / "out").exists()
    out = reconstruct(*arguments)
    assert len(trained) == 4  # the first layer once
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (uninterrupted, out))
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def test_another_teacher_is_refused(text: Path, tmp_path: Path) -> None:
    teacher = write_trained(tmp_path / "teacher", text)
    other = write_trained(tmp_path / "other", text, num_hidden_layers=4)
    student = cut_of(teacher, tmp_path, mlp=32)
    with pytest.raises(UserError, match="was not cut from"):
        reconstruct(student, other, data_of(text), tmp_path / "out", CONFIG, OPTIONS)


def test_a_recipe_reconstructs_a_pruned_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = write_model(tmp_path / "model"), write_text(tmp_path / "text.jsonl")
    step = {"reconstruct": {"tokens": 256, "batch_tokens": 64, "validation_sequences": 2}}
    fields = recipe_fields(model, text, PROFILE, PRUNE, step)
    recipe = write_recipe(tmp_path / "recipe.yaml", fields)
    call("run", recipe, "--out", tmp_path / "run", "--dry-run")
    assert "reconstruct: 512 tokens through each of at most 3 layers" in capsys.readouterr().out
    call("run", recipe, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "stages" / "03-reconstruct" / "plan.json").exists()
    student = tmp_path / "run" / "stages" / "02-prune-repaired"
    flags = ["--data", text, "--sequence-length", LENGTH, "--tokens", 256]
    call("reconstruct", student, "--teacher", model, *flags, "--out", tmp_path / "x", "--dry-run")
    assert not (tmp_path / "x").exists()
