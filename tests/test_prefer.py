"""Preferences: how answers are ranked, which tokens count, and that a run can be continued."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_generate import write_rows
from tiny_folders import data_of, write_model
from tiny_job import refused
from tiny_models import tiny_model
from tiny_tokenizer import GENERATION_TEMPLATE, PLAIN_TEMPLATE, tiny_tokenizer

pytest.importorskip("trl")

from regrow import SparsifyConfig, sparsify
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.documents import read_row, tokenize
from regrow.data.prompts import read_prompt
from regrow.errors import UserError
from regrow.sparsity import zeros
from regrow.stage import parse_step
from regrow.stage_dir import read as read_manifest
from regrow.stages.prefer import PreferConfig, dpo
from regrow.stages.prefer.rank import Pair, pair_of, rank
from regrow.stages.prefer.stage import PAIRS, prefer

OPTIONS = Options(device="cpu", batch_size=2)
CONFIG = PreferConfig(
    limit=12,
    answers=3,
    max_new_tokens=8,
    keep_unfinished=True,
    min_margin=0.0,
    temperature=3.0,
    learning_rate=2e-3,
    batch_pairs=2,
    save_pairs=4,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("prefer")
    write_model(place / "student", num_hidden_layers=1, hidden_size=24)
    write_model(place / "teacher", num_hidden_layers=2)
    write_rows(place / "prompts.jsonl", [{"prompt": f"Say {n}."} for n in range(60)])
    return place


@torch.no_grad()
def test_ranks_are_mean_log_probabilities_one_by_one() -> None:
    model = tiny_model("llama", torch.float64, num_hidden_layers=2)
    prompt, answers = [5, 6, 7, 8], [[9, 10, 11], [12], [13, 14, 15, 16, 17]]
    found = rank(model, prompt, answers, 2)
    for answer, score in zip(answers, found, strict=True):
        ids = torch.tensor([prompt + answer])
        log_p = model(ids).logits[0].log_softmax(-1)
        total = sum(float(log_p[3 + n, token]) for n, token in enumerate(answer))
        assert score == pytest.approx(total / len(answer), rel=1e-5)


def test_a_pair_is_the_best_and_the_worst() -> None:
    answers = [[1], [2], [3]]
    pair = pair_of([0], answers, [-2.0, -1.0, -3.5], 0.5)
    assert pair == Pair([0], [2], [3], (-1.0, -3.5))
    assert pair_of([0], answers, [-1.0, -1.2, -1.3], 0.5) is None
    assert pair_of([0], [[1]], [-1.0], 0.0) is None
    assert pair_of([0], [[1], [1]], [-1.0, -1.0], 0.0) is None
    assert pair_of([0], answers, [math.nan, math.nan, math.nan], 0.0) is None


INST_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
)
BARE_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "marks"),
    [(PLAIN_TEMPLATE, 1), (GENERATION_TEMPLATE, 1), (INST_TEMPLATE, 1), (BARE_TEMPLATE, 0)],
    ids=["ChatML", "with generation marks", "INST", "no end mark"],
)
def test_the_assistants_tokens_by_hand_counts(template: str, marks: int) -> None:
    """The scored tokens are those of `12`, two digits, and the end mark; all others are prompt."""
    tokenizer = tiny_tokenizer(chat_template=template)
    turns = [{"role": "user", "content": "34 7"}, {"role": "assistant", "content": "12"}]
    (document,) = tokenize([read_row({"messages": turns}, "here")], tokenizer)
    own = [i for i, scored in zip(document.ids, document.scored, strict=True) if scored]
    assert tokenizer.decode(own, skip_special_tokens=True).strip() == "12"
    assert sum(i in (0, 3) for i in own) == marks
    digits = [i for i in own if tokenizer.decode([i]).strip().isdigit()]
    assert len(own) - marks - len(digits) <= 1  # at most a space before the answer
    prompt = read_prompt({"messages": turns}, "here", 0, with_template=True).ids(tokenizer)
    assert document.ids[: len(prompt)] == prompt
    assert document.scored.index(True) == len(prompt)


def test_the_first_loss_is_that_of_equal_models_and_the_pairs_are_learned(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ln 2 before any step, by trl; the summed log p of the answers alone, token by token."""
    out = prefer(
        place / "student",
        place / "teacher",
        data_of(place / "prompts.jsonl"),
        tmp_path / "out",
        CONFIG.model_copy(update={"epochs": 3}),
        OPTIONS,
    )
    assert "has hardly changed" not in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/margins"] > 0.05
    pairs = [json.loads(line) for line in (out / PAIRS).read_text().splitlines()]
    assert len(pairs) == 12
    assert all(pair["scores"][0] > pair["scores"][1] for pair in pairs)
    assert all("Say" in pair["prompt"] and "Say" not in pair["chosen"] for pair in pairs)
    manifest = read_manifest(out)
    assert manifest is not None
    figures = {each["name"]: each["value"] for each in manifest["figures"]}
    assert (figures["prompts"], figures["pairs"]) == (12, 12)
    before, after = Checkpoint(place / "student"), Checkpoint(out)
    old, new = (load_file(each.folder / "model.safetensors") for each in (before, after))
    changed = sum(int((old[name] != new[name]).sum()) for name in old)
    assert figures["weights changed"] == changed / sum(weight.numel() for weight in old.values())
    assert before.shapes == after.shapes
    assert before.dtype(before.names()[0]) == after.dtype(before.names()[0])
    assert before.config["pad_token_id"] == after.config["pad_token_id"]
    assert after.tokenizer().chat_template == before.tokenizer().chat_template
    assert not {"trainer", "written-0.jsonl"} & {path.name for path in out.iterdir()}


def test_the_zeros_of_a_sparse_student_stay(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = SparsifyConfig(method="magnitude", sparsity=0.2)
    sparse = sparsify(place / "student", tmp_path / "sparse", few)
    data = data_of(place / "prompts.jsonl")
    out = prefer(sparse, place / "teacher", data, tmp_path / "out", CONFIG, OPTIONS)
    before, after = Checkpoint(sparse), Checkpoint(out)
    for name, weight in zeros.weights(before):
        assert (weight == 0).any()
        assert (after.tensor(name)[weight == 0] == 0).all(), name
        assert not torch.equal(after.tensor(name), weight)
    assert zeros.recorded(after) == "0.2"
    assert "prefer: the student is sparse (0.2)" in capsys.readouterr().err


@torch.no_grad()
def test_only_the_answers_tokens_count(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """trl's log-probabilities of a batch against float64, and the mask by hand."""
    pairs = [
        Pair([5, 6, 7], [8, 9], [10], (0.0, -1.0)),
        Pair([11], [12, 13, 14], [15, 16], (0.0, -1.0)),
    ]
    student = Checkpoint(place / "student")
    (tmp_path / "run").mkdir()
    config = CONFIG.model_copy(update={"learning_rate": 1e-12})
    with torch.enable_grad():
        dpo.train_pairs(student, pairs, tmp_path / "run", config, OPTIONS)
    assert "the student has hardly changed: the loss is 0.693" in capsys.readouterr().err
    (row,) = (json.loads(s) for s in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    model = student.model(torch.float64)
    for name in ("chosen", "rejected"):
        total = 0.0
        for pair in pairs:
            answer = getattr(pair, name)
            log_p = model(torch.tensor([pair.prompt + answer])).logits[0].log_softmax(-1)
            start = len(pair.prompt) - 1
            total += sum(float(log_p[start + n, token]) for n, token in enumerate(answer))
        assert row[f"logps/{name}"] == pytest.approx(total / 2, rel=2e-2)  # bf16


@pytest.mark.parametrize("part", ["written", "ranked", "trained"])
def test_a_killed_run_goes_on_to_the_same_student(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    given = (place / "student", place / "teacher", data_of(place / "prompts.jsonl"))
    whole = prefer(*given, tmp_path / "whole", CONFIG, OPTIONS)
    module, name = {
        "written": ("regrow.stages.prefer.stage", "_answers"),
        "ranked": ("regrow.stages.prefer.stage", "rank"),
        "trained": ("regrow.stages.prefer.dpo.PairTrainer", "training_step"),
    }[part]
    from importlib import import_module

    holder: Any = dpo.PairTrainer if part == "trained" else import_module(module)
    original, calls = getattr(holder, name), []

    def killed(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*given, **named)

    monkeypatch.setattr(holder, name, killed)
    with pytest.raises(KeyboardInterrupt):
        prefer(*given, tmp_path / "cut", CONFIG, OPTIONS)
    first = len(calls)
    prefer(*given, tmp_path / "cut", CONFIG, OPTIONS)
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert (tmp_path / "cut" / PAIRS).read_bytes() == (whole / PAIRS).read_bytes()
    assert first == 5


def test_what_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"messages": [{"role": "user", "content": f"Say {n}."}]} for n in range(60)]
    write_rows(tmp_path / "turns.jsonl", turns)
    write_model(tmp_path / "base", num_hidden_layers=1, hidden_size=24)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    rest = ["--teacher", place / "teacher", "--out", tmp_path / "out"]
    data = ["--data", tmp_path / "turns.jsonl"]
    said = refused(capsys, "prefer", tmp_path / "base", *rest, *data, at_once=False)
    assert "has no chat template" in said
    with pytest.raises(UserError, match="none of 12 prompts has two answers"):
        prefer(
            place / "student",
            place / "teacher",
            data_of(place / "prompts.jsonl"),
            tmp_path / "out",
            CONFIG.model_copy(update={"min_margin": 99.0}),
            OPTIONS,
        )
    assert not (tmp_path / "out").exists()


def test_other_prompts_make_a_recipe_train_again(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say 1."}])
    own = {"sources": [{"source": str(tmp_path / "prompts.jsonl")}]}
    step = parse_step({"prefer": {"prompts": own}}, 0)
    before = tuple(step.stage.inputs(step))
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "Say 2."}])
    assert before != tuple(step.stage.inputs(step))
    plain = parse_step({"prefer": {}}, 0)
    assert tuple(plain.stage.inputs(plain)) == ()
