"""Exact answers: greedy answers, one token at a time, and the intervals from their definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from test_evaluate import QUICK, write_model
from tiny_job import refused
from tiny_models import tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer
from transformers import AutoModelForCausalLM

from regrow.errors import UserError
from regrow.stages.evaluate.answer_rows import answer_row
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.metrics.exact_answers import Z, bootstrap, wilson
from regrow.stages.evaluate.stage import EVALUATION, ITEMS, evaluate

NEW = 6
PROMPTS = [f"{sentence[: 5 + 4 * n]}\n" for n, sentence in enumerate(SENTENCES)]
PROMPTS += ["a\n", "b c\n", "The\n", "12 3 4\n", "Hello you\n"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "teacher", tiny_model("llama", seed=1))
    write_model(folder / "student", tiny_model("llama", seed=2))
    return folder


def slow_answer(folder: Path, prompt_ids: list[int]) -> str:
    """Greedy tokens without a cache and without padding, until the end mark."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    tokenizer, ids = tiny_tokenizer(), list(prompt_ids)
    for _ in range(NEW):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return str(tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=True)).strip()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def measured(folder: Path, place: Path, rows: Path, batch_size: int = 3) -> Any:
    from regrow.config import Options

    quick = {key: value for key, value in QUICK.items() if key == "dtype"}
    config = EvaluateConfig(
        metrics=("exact_answers",), answers={"job": str(rows)}, answer_tokens=NEW, **quick
    )
    students = {"student": folder / "student"}
    options = Options(batch_size=batch_size)
    return evaluate(students, place / "out", None, folder / "teacher", config, options)


def test_the_share_is_that_of_slow_greedy_answers(models: Path, tmp_path: Path) -> None:
    tokenizer, rows, right = tiny_tokenizer(), [], []
    for n, prompt in enumerate(PROMPTS):
        answer = slow_answer(models / "student", tokenizer(prompt)["input_ids"])
        if not answer:
            continue
        rows.append({"prompt": prompt, "completion": answer if n % 3 else f"{answer}!"})
        right.append(float(n % 3 != 0))
    assert 0 < sum(right) < len(right)
    out = measured(models, tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    evaluation = json.loads((out / EVALUATION).read_text())
    figures = {figure["name"]: figure for figure in evaluation["figures"]["student"]}
    share = sum(right) / len(right)
    assert figures["exact_answers/job"]["value"] == pytest.approx(share)
    assert figures["exact_answers/job"]["n"] == len(right)
    assert figures["exact_answers/job"]["interval"] == pytest.approx(wilson(share, len(right)))
    items = json.loads((out / ITEMS).read_text())
    assert items["student"]["exact_answers/job"] == right
    assert "exact_answers_kept/job" not in figures, "the teacher answers none of them"


def test_the_kept_share_is_paired(models: Path, tmp_path: Path) -> None:
    tokenizer, rows = tiny_tokenizer(), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        answers = [slow_answer(models / name, ids) for name in ("student", "teacher")]
        model = rows and sum(row["by"] for row in rows) >= 2  # two rows by the teacher
        if all(answers) and len(set(answers)) == 2 and len(rows) < 5:
            rows.append({"prompt": prompt, "completion": answers[not model], "by": not model})
    out = measured(models, tmp_path, write_rows(tmp_path / "rows.jsonl", rows))
    evaluation = json.loads((out / EVALUATION).read_text())
    by_label = {
        label: {figure["name"]: figure for figure in figures}
        for label, figures in evaluation["figures"].items()
    }
    shares = [by_label[label]["exact_answers/job"]["value"] for label in ("student", "teacher")]
    kept = by_label["student"]["exact_answers_kept/job"]
    assert len(rows) == 5
    assert shares == pytest.approx([3 / 5, 2 / 5])
    assert kept["value"] == pytest.approx(3 / 2)
    assert kept["interval"][0] < 3 / 2 < kept["interval"][1]


def test_a_conversation_is_read_by_its_template() -> None:
    turns = [("user", "Hello"), ("assistant", "Yes?"), ("user", "1 2 3"), ("assistant", " 4 ")]
    messages = [{"role": role, "content": text} for role, text in turns]
    row = answer_row({"messages": messages}, "rows, row 1")
    expected = (
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\n1 2 3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tiny_tokenizer().decode(row.prompt_ids(tiny_tokenizer())) == expected
    assert row.answer == "4"


def test_the_answer_of_a_row_is_what_training_scores() -> None:
    tokenizer = tiny_tokenizer()
    row = answer_row({"question": "How many?", "answer": " 12 "}, "rows, row 1")
    assert (row.answer, tokenizer.decode(row.prompt_ids(tokenizer))) == ("12", "How many?\n")


@pytest.mark.parametrize(
    "row",
    [{"text": "plain"}, {"prompt": "a", "completion": " "}, {"prompt": "", "completion": "b"}],
)
def test_a_row_without_an_answer_is_refused(row: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"rows, row 1: the row has no answer"):
        answer_row(row, "rows, row 1")


def test_wilson_solves_its_equation() -> None:
    for share, count in ((0.0, 7), (0.9, 31), (0.5, 500), (1.0, 4)):
        for limit in wilson(share, count):
            if 1e-9 < limit < 1 - 1e-9:
                distance = abs(share - limit)
                spread = Z * math.sqrt(limit * (1 - limit) / count)
                assert distance == pytest.approx(spread, rel=1e-9)
    assert wilson(0.9, 31)[0] < 0.9 < wilson(0.9, 31)[1]


def test_the_bootstrap_draws_rows_in_pairs() -> None:
    draw = numpy.random.default_rng(0)
    teacher = (draw.random(120) < 0.9).astype(float)
    student = teacher * (draw.random(120) < 0.8)
    rows = draw.integers(0, 120, (20_000, 120))
    shares = student[rows].sum(1) / teacher[rows].sum(1)
    slow = numpy.percentile(shares, [2.5, 97.5])
    assert bootstrap(student.tolist(), teacher.tolist()) == pytest.approx(slow, abs=0.01)
    assert bootstrap(teacher.tolist(), teacher.tolist()) == (1.0, 1.0)


def test_bad_input_is_refused_before_a_model_is_loaded(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", tmp_path / "out")
    call = ("evaluate", models / "student", *out, "--metrics", "exact_answers")
    assert "no such file" in refused(capsys, *call, "--answers", "job", tmp_path / "none.jsonl")
    assert "give --answers" in refused(capsys, *call)
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}, {"text": "c"}])
    said = refused(capsys, *call, "--answers", "job", tmp_path / "rows.jsonl")
    assert "rows.jsonl, row 2" in said
    said = refused(
        capsys,
        *("evaluate", models / "student", *out, "--metrics", "size"),
        *("--answers", "job", tmp_path / "rows.jsonl"),
    )
    assert "exact_answers" in said
    assert not (tmp_path / "out").exists()
