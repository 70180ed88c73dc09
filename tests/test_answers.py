"""Distillation on generated answers: the teacher's in place of the data, and the student's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_distillation import CONFIG, OPTIONS, rows_of, write_place
from tiny_folders import data_of
from tiny_job import DISTILL, EVALUATE, PRUNE, recipe_fields, refused
from tiny_job import write_model as write_job_model

from regrow.config import parse
from regrow.data import DataConfig, SourceConfig
from regrow.errors import UserError
from regrow.recipe.check import describe
from regrow.recipe.recipe import Recipe, check, run
from regrow.stage_dir import read as read_manifest
from regrow.stages.distill import setup
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.text import loss_weights_of, training_text
from regrow.stages.generate import GenerateConfig
from regrow.stages.generate.stage import generate

ANSWER = GenerateConfig(max_new_tokens=16, keep_unfinished=True)
GENERATE: dict[str, Any] = {"generate": ANSWER.model_dump(exclude_defaults=True)}
BY_TEACHER: dict[str, Any] = {"generate": {**GENERATE["generate"], "by": "teacher"}}


def write_prompts(path: Path, count: int = 200) -> Path:
    asked = [f"What is {n} and {n * n}?" for n in range(count)]
    rows = [{"prompt": prompt, "completion": f"It is {n}."} for n, prompt in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("answers") / "place")
    data = data_of(write_prompts(place / "prompts.jsonl"))
    generate(place / "teacher", data, place / "theirs", ANSWER, OPTIONS)
    generate(place / "pruned", data, place / "own", ANSWER, OPTIONS)
    return place


def contrastive(place: Path, **fields: Any) -> DistillConfig:
    fields = {"heldout_sequences": 16, **fields}
    update = {"losses": {"skewed_kl": 1.0}, "answers": str(place / "theirs")}
    return CONFIG.model_copy(update={**update, "own_answers": str(place / "own"), **fields})


def test_the_student_learns_from_both_kinds_of_answers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the tokens each; a raised budget goes on, equal to one run; answers may move."""
    data, seen = data_of(place / "prompts.jsonl"), []
    build = setup.text_for

    def watched(*given: Any) -> Any:
        sequences = build(*given)
        seen.append(sequences)
        return sequences

    monkeypatch.setattr(setup, "text_for", watched)
    given = (place / "pruned", place / "teacher", data)
    whole = distill(*given, tmp_path / "whole", contrastive(place), OPTIONS)
    heldout, train = seen
    assert heldout.source is None
    assert train.source is not None
    share = float(train.source.double().mean())
    assert share == pytest.approx(0.5, abs=0.1)
    rows = [row for row in rows_of(whole) if "loss" in row]
    losses = [row["loss"] for row in rows]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all({"skewed_kl", "skewed_reverse_kl"} <= set(row) for row in rows)
    tokens = contrastive(place, tokens=4 * 128)
    distill(*given, tmp_path / "more", tokens, OPTIONS)
    (place / "own").rename(place / "moved")
    try:
        moved = contrastive(place, own_answers=str(place / "moved"))
        more = distill(*given, tmp_path / "more", moved, OPTIONS)
    finally:
        (place / "moved").rename(place / "own")
    assert [row["step"] for row in rows_of(more) if "loss" in row] == list(range(1, 13))
    manifest = read_manifest(more)
    assert manifest is not None
    assert {"answers", "own_answers"} <= set(manifest["inputs"])


def test_a_kind_of_its_own_for_each_source() -> None:
    config = DistillConfig(losses={"jsd": 1.0}, own_answers="own", own_share=0.25)
    data = DataConfig.model_validate([{"source": "a", "weight": 2.0}, {"source": "b"}])
    text = training_text(data, config)
    assert [(s.source, s.weight, s.losses) for s in text.sources] == [
        ("a", 2.0, None),
        ("b", 1.0, None),
        ("own", 1.0, {"skewed_reverse_kl": 1.0}),
    ]
    jsd = {"jsd": 1.0}
    assert loss_weights_of(config, text).by_source == (jsd, jsd, {"skewed_reverse_kl": 1.0})
    assert loss_weights_of(config, data).by_source == ()
    answered = training_text(data, config.model_copy(update={"answers": "theirs"}))
    assert [(s.source, s.weight) for s in answered.sources] == [("theirs", 1.0), ("own", 1 / 3)]
    tagged = DataConfig.model_validate([{"source": "a", "losses": {"forward_kl": 2.0}}, "b"])
    assert loss_weights_of(config, tagged).by_source == ({"forward_kl": 2.0}, jsd)


def test_what_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"distill\.own_losses: no loss named 'jsdd'"):
        parse(DistillConfig, {"own_losses": {"jsdd": 1.0}}, "distill")
    tagged = DataConfig(sources=[SourceConfig(source="a", losses={"jsdd": 1.0})])
    with pytest.raises(UserError, match="a: losses: no loss named 'jsdd'"):
        loss_weights_of(CONFIG, tagged)
    with pytest.raises(UserError, match="answers replace the data"):
        training_text(tagged, contrastive(place))
    with pytest.raises(UserError, match="leave out the cache"):
        training_text(data_of(place), contrastive(place, cache="cached"))
    given = ["distill", place / "pruned", "--teacher", place / "teacher", "--out", tmp_path / "o"]
    text = ["--data", place / "prompts.jsonl", "--sequence-length", 32, "--batch-tokens", 128]
    said = refused(capsys, *given, *text, "--own-answers", tmp_path / "none")
    assert "no such file or folder" in said
    assert not (tmp_path / "o").exists()


def recipe_of(place: Path, *stages: Any) -> Recipe:
    return Recipe.model_validate(recipe_fields(place / "model", place / "prompts.jsonl", *stages))


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_job_model(tmp_path / "model")
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def test_a_recipe_generates_and_takes_the_answers(job: Path) -> None:
    """Own answers are of the student as it is: a second distillation does not take old ones."""
    asked = {"generate": {**GENERATE["generate"], "prompts": str(job / "asked.jsonl")}}
    rows = [{"prompt": f"Who is {n}?"} for n in range(60)]
    (job / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny = {"distill": {**DISTILL["distill"], "tokens": 512, "losses": {"skewed_kl": 1.0}}}
    profile = {"profile": {"samples": 8, "gram_tokens": 256}}
    recipe = recipe_of(job, profile, PRUNE, BY_TEACHER, asked, tiny, tiny)
    check(recipe, OPTIONS)
    lines = describe(recipe.model, recipe.data, recipe.steps(), OPTIONS)
    assert any(line.startswith("generate:") for line in lines)
    out = run(recipe, job / "out", OPTIONS)
    theirs, own = (read_manifest(out / "stages" / n) for n in ("03-generate", "04-generate"))
    assert theirs is not None
    assert own is not None
    assert theirs["inputs"]["model"] != own["inputs"]["model"]
    said = (out / "stages" / "04-generate" / "answers.jsonl").read_text().splitlines()
    questions = [json.loads(row)["messages"][0]["content"] for row in said]
    assert 0 < len(questions) < 60  # of the train split
    assert set(questions) <= {row["prompt"] for row in rows}
    first, second = (read_manifest(out / "stages" / n) for n in ("05-distill", "06-distill"))
    assert first is not None
    assert second is not None
    assert {"answers", "own_answers"} <= set(first["inputs"])
    assert "answers" in second["inputs"]
    assert "own_answers" not in second["inputs"]


def test_recipes_that_cannot_be(job: Path) -> None:
    cached = recipe_of(job, "cache", GENERATE, DISTILL)
    with pytest.raises(UserError, match=r"stages\.2\.distill: a cache is of the data's text"):
        check(cached, OPTIONS)
    with pytest.raises(
        UserError, match=r"stages\.0\.generate\.by: Input should be 'student' or 'teacher'"
    ):
        recipe_of(job, {"generate": {"by": "me"}}, DISTILL).steps()
    (job / "prompts.jsonl").write_text('{"text": "Only text."}\n')
    with pytest.raises(UserError, match="which are no prompt"):
        check(recipe_of(job, GENERATE, EVALUATE), OPTIONS)
