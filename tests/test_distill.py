"""Distillation from folder to folder: every kind of student, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from test_trainer import free_port
from tiny_folders import data_of, write_model, write_text
from tiny_models import random_plan, tiny_config
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from regrow.checkpoint import Checkpoint
from regrow.data import DataConfig, build_blocks
from regrow.errors import UserError
from regrow.manifest import read
from regrow.options import Options
from regrow.stages.distill import DistillConfig, distill
from regrow.stages.distill import stage as distill_stage
from regrow.stages.distill.student import open_student
from regrow.stages.prune import PruneConfig, prune

STEPS = 12
OPTIONS = Options(device="cpu", batch_size=2)
CONFIG = DistillConfig(
    tokens=STEPS * 128,
    batch_tokens=128,
    learning_rate=1e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.05,
    eval_tokens=4 * 128,
    heldout_blocks=6,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 teacher, a pruned child, a smaller stranger, a config.json, and text."""
    folder = tmp_path_factory.mktemp("distill")
    write_text(folder / "text.jsonl")
    teacher = write_model(folder / "teacher", dtype=torch.bfloat16, num_hidden_layers=2)
    plan = random_plan(teacher.config, teacher.fingerprint, mlp=32)
    plan.write(folder / "plan.json")
    config = PruneConfig(plan=str(folder / "plan.json"), repair=False)
    prune(teacher, folder / "pruned", config)
    write_model(folder / "stranger", "qwen3", torch.float32, hidden_size=36, num_hidden_layers=1)
    fresh = tiny_config("llama", hidden_size=36, head_dim=6, vocab_size=400, num_hidden_layers=1)
    fields = {**fresh.to_diff_dict(), "model_type": "llama", "rms_norm_eps": 1e-6}
    del fields["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def data(place: Path) -> DataConfig:
    return data_of(place / "text.jsonl")


STUDENTS = {"pruned": "pruned", "stranger": "stranger", "fresh": "config.json"}
RATES = {"pruned": 1e-3, "stranger": 1e-2, "fresh": 2e-2}
TOO_FAST = {"learning_rate": 1e-2, "min_learning_rate_ratio": 1.0, "warmup_ratio": 0.0}


@pytest.fixture(scope="module")
def distilled(place: Path) -> dict[str, Path]:
    """Per kind of student what a distillation wrote."""
    found = {}
    for kind, name in STUDENTS.items():
        config = CONFIG.model_copy(update={"learning_rate": RATES[kind]})
        out = place / "out" / kind
        found[kind] = distill(place / name, place / "teacher", data(place), out, config, OPTIONS)
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out(folder: Path) -> dict[int, float]:
    """Held-out KL by step."""
    rows = [row for row in rows_of(folder) if "heldout_kl" in row]
    found = {row["step"]: row["heldout_kl"] for row in rows}
    assert len(found) == len(rows)
    return found


def figures(folder: Path) -> dict[str, float]:
    found = read(folder)
    assert found is not None
    return {figure["name"]: figure["value"] for figure in found["figures"]}


def kl_of(folder: Path, place: Path) -> float:
    """KL(teacher ‖ model) in nats per scored held-out token, in float32 by the stock classes."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        for path in (folder, place / "teacher")
    )
    blocks = build_blocks(data(place), tiny_tokenizer(), "heldout", CONFIG.heldout_blocks)
    batch = next(blocks.batches(len(blocks)))
    given = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        log_q, log_p = (
            model(**given, use_cache=False).logits[:, :-1, : len(tiny_tokenizer())].log_softmax(-1)
            for model in (student, teacher)
        )
    kl_BT = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(kl_BT[batch["labels"][:, 1:] != -100].mean())


@pytest.mark.parametrize("kind", STUDENTS)
def test_every_kind_of_student_learns(distilled: dict[str, Path], place: Path, kind: str) -> None:
    found = held_out(distilled[kind])
    assert list(found) == [0, 4, 8, 12]
    assert found[12] < found[4] < found[0]
    assert found[12] < 0.8 * found[0]
    losses = {row["step"]: row["loss"] for row in rows_of(distilled[kind]) if "loss" in row}
    assert list(losses) == list(range(1, STEPS + 1))
    assert figures(distilled[kind])["held-out KL before"] == found[0]
    assert figures(distilled[kind])["held-out KL"] == found[12]
    assert figures(distilled[kind])["training tokens"] == STEPS * 128
    # What was written is what was measured, by another road: stock classes and full logits.
    assert kl_of(distilled[kind], place) == pytest.approx(found[12], rel=0.03)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("pruned", torch.bfloat16), ("stranger", torch.float32), ("fresh", torch.bfloat16)],
)
def test_stock_reload(
    distilled: dict[str, Path], place: Path, kind: str, dtype: torch.dtype
) -> None:
    """In the parent's dtype (a fresh model's parent is the teacher), nothing missing or left."""
    model, info = AutoModelForCausalLM.from_pretrained(
        str(distilled[kind]), dtype="auto", output_loading_info=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.use_cache
    given = place / STUDENTS[kind] if kind == "fresh" else place / STUDENTS[kind] / "config.json"
    expected = json.loads(given.read_text())
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        assert getattr(model.config, key) == expected[key]
    tokenizer = AutoTokenizer.from_pretrained(str(distilled[kind]))
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert model.config.eos_token_id == 0
    assert model.generation_config.eos_token_id == 0


def test_plan_and_tensorboard_travel(distilled: dict[str, Path], place: Path) -> None:
    plan = (place / "pruned" / "plan.json").read_text()
    assert (distilled["pruned"] / "plan.json").read_text() == plan
    assert not (distilled["stranger"] / "plan.json").exists()
    for folder in distilled.values():
        assert [path for path in folder.glob("tensorboard/**/*tfevents*") if path.stat().st_size]


def test_a_fresh_student_does_not_take_over_the_teachers_plan(place: Path, tmp_path: Path) -> None:
    teacher = Checkpoint(place / "pruned")
    assert open_student(place / "config.json", teacher).carried("plan.json") is None
    assert open_student(place / "pruned", teacher).carried("plan.json") is not None


def test_a_fresh_student_follows_from_its_seed(place: Path) -> None:
    student = open_student(place / "config.json", Checkpoint(place / "teacher"))
    first, again, other = (student.model(seed).state_dict() for seed in (1, 1, 2))
    weight = "model.layers.0.mlp.down_proj.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[weight], other[weight])
    assert {value.dtype for value in first.values()} == {torch.float32}
    parameters = student.model(1).parameters()
    assert student.parameters == sum(p.numel() for p in parameters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 100}, "vocab_size 100 is too small"),
        ({"model_type": "lama"}, "lama"),
        ({"model_type": "t5"}, "no config of a causal"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 47}, "47"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized"),
    ],
)
def test_configs_that_no_student_can_be_made_of(
    place: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fields = json.loads((place / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, **change}))
    with pytest.raises(UserError, match=message) as caught:
        distill(tmp_path / "config.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_config_and_no_json(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config for a fresh student"):
        distill(tmp_path / "none.json", place / "teacher", data(place), tmp_path / "out", CONFIG)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="no JSON"):
        distill(tmp_path / "bad.json", place / "teacher", data(place), tmp_path / "out", CONFIG)


def test_refused_before_any_slow_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokenizers, and a batch that is no number of whole blocks."""
    monkeypatch.setattr(distill_stage, "build_blocks", lambda *_: pytest.fail("reads text"))
    shutil.copytree(place / "stranger", tmp_path / "other")
    tiny_tokenizer(vocab_size=300).save_pretrained(str(tmp_path / "other"))
    with pytest.raises(UserError, match="different tokenizers"):
        distill(tmp_path / "other", place / "teacher", data(place), tmp_path / "out", CONFIG)
    config = CONFIG.model_copy(update={"batch_tokens": 100})
    with pytest.raises(UserError, match="batch_tokens 100 is no multiple of 32"):
        distill(place / "stranger", place / "teacher", data(place), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_the_best_checkpoint_is_kept_not_the_last(place: Path, tmp_path: Path) -> None:
    """At a rate at which a nearly perfect student only gets worse."""
    config = CONFIG.model_copy(update=TOO_FAST)
    out = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "out", config, OPTIONS
    )
    found = held_out(out)
    best = min(value for step, value in found.items() if step > 0)
    assert best < 0.9 * found[12], found
    assert figures(out)["held-out KL"] == best
    assert kl_of(out, place) == pytest.approx(best, rel=0.03)


def test_a_raised_budget_goes_on(distilled: dict[str, Path], place: Path, tmp_path: Path) -> None:
    """From the last step, also after the folder moved; a best checkpoint before it is known."""
    longer = CONFIG.model_copy(update=TOO_FAST)
    short = longer.model_copy(update={"tokens": 8 * 128})
    first = distill(
        place / "pruned", place / "teacher", data(place), tmp_path / "a" / "out", short, OPTIONS
    )
    before = rows_of(first)
    (tmp_path / "a").rename(tmp_path / "b")
    out = tmp_path / "b" / "out"
    assert distill(place / "pruned", place / "teacher", data(place), out, short, OPTIONS) == out
    assert rows_of(out) == before  # complete and unchanged
    distill(place / "pruned", place / "teacher", data(place), out, longer, OPTIONS)
    rows = rows_of(out)
    assert rows[: len(before)] == before
    assert list(held_out(out)) == [0, 4, 8, 12]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert min(held_out(out), key=lambda step: held_out(out)[step] if step else 9.0) == 4
    state = json.loads((out / "trainer" / "checkpoint-12" / "trainer_state.json").read_text())
    assert state["best_metric"] == min(value for step, value in held_out(out).items() if step)
    assert figures(out)["held-out KL"] == state["best_metric"]
    assert kl_of(out, place) == pytest.approx(state["best_metric"], rel=0.03)


def _rank(rank: int, world: int, port: int, place: str, out: str) -> None:
    """One process of a distributed distillation, as torchrun would start it."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    where = Path(place)
    distill(where / "pruned", where / "teacher", data(where), Path(out), CONFIG, OPTIONS)
    torch.distributed.barrier()
    os._exit(0)  # at once: gloo's threads can hang in an orderly end


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.tensor(name).float() for name in checkpoint.names()}


def test_two_ranks_write_the_student_of_one(
    distilled: dict[str, Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server has no other
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_trainer", "test_distill"])
    out = tmp_path / "out"
    torch.multiprocessing.start_processes(
        _rank, (2, free_port(), str(place), str(out)), 2, start_method="forkserver"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    alone, together = held_out(distilled["pruned"]), held_out(out)
    assert list(together) == list(alone)
    assert [row["step"] for row in rows_of(out) if "loss" in row] == list(range(1, STEPS + 1))
    for step, value in alone.items():
        assert together[step] == pytest.approx(value, rel=1e-3)
    expected = weights(distilled["pruned"])
    for name, value in weights(out).items():
        assert float((value - expected[name]).norm() / expected[name].norm()) < 1e-2, name
