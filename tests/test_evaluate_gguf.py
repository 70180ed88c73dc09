"""GGUF files in an evaluation: llama.cpp gives for an F32 file what transformers does."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluate import QUICK, TEXT, data_of
from tiny_folders import write_model
from tiny_gguf import WIDE, exported
from tiny_job import Refused
from tiny_tokenizer import SENTENCES

from regrow.checkpoint import Checkpoint
from regrow.cli.main import main
from regrow.config import Options
from regrow.llama_cpp import GgufModel
from regrow.stages.evaluate import tokenizer_match
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.gguf_model import GgufFile
from regrow.stages.evaluate.stage import EVALUATION, ITEMS, evaluate

LONG: dict[str, Any] = {**WIDE, "head_dim": 24, "max_position_embeddings": 1024}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders teacher and student, the student's files f32.gguf and q8.gguf, texts and tasks."""
    folder = tmp_path_factory.mktemp("gguf")
    write_model(folder / "teacher", "llama", torch.float32, seed=1, **LONG)
    student = write_model(folder / "student", "llama", torch.float32, seed=2, **LONG)
    exported(student, folder / "f32.gguf", "F32", verify="never")
    exported(student, folder / "q8.gguf", "Q8_0", verify="never")
    (folder / "raw.txt").write_text(TEXT)
    stories = [{"text": f"Story {n}. {SENTENCES[n % 5]}"} for n in range(80)]
    choices = [{"context": s[:9], "choices": ["a b", "cé", "deff"], "gold": 1} for s in SENTENCES]
    pairs = [{"context": s[:9], "continuation": s[10:]} for s in SENTENCES]
    answer_rows = [{"question": s, "answer": s[:3]} for s in SENTENCES]
    for name, rows in (
        *(("data", stories), ("choices", choices)),
        *(("pairs", pairs), ("answers", answer_rows)),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def config_of(place: Path, **fields: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        **QUICK,
        "texts": {"raw": f"{place}/raw.txt"},
        "text_tokens": 700,
        "window": 300,
        "heldout_sequences": 3,
        "tasks": tuple(f"{name}={place}/{name}.jsonl" for name in ("choices", "pairs", "answers")),
        "batch_sizes": (1, 3),
        **fields,
    }
    return EvaluateConfig(**settings)


def measured(out: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Figures by model and name."""
    evaluated = json.loads((out / EVALUATION).read_text())["figures"]
    return {label: {row["name"]: row for row in rows} for label, rows in evaluated.items()}


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """Everything measured of all of them."""
    models = {"student": place / "student", "f32": place / "f32.gguf", "q8": place / "q8.gguf"}
    config = config_of(place)
    return evaluate(models, place / "out", data_of(place), place / "teacher", config)


@pytest.mark.parametrize("text", ["raw", "heldout"])
def test_a_gguf_file_has_the_figures_of_its_folder_on_text(text: str, out: Path) -> None:
    measured_figures = measured(out)
    kinds = ["perplexity", "kl", *(["bits_per_byte"] if text == "raw" else [])]
    for kind in kinds:
        folder_figure, gguf_figure = (
            measured_figures[label][f"{kind}/{text}"] for label in ("student", "f32")
        )
        assert gguf_figure["value"] == pytest.approx(folder_figure["value"], rel=2e-4)
        assert gguf_figure["stderr"] == pytest.approx(folder_figure["stderr"], rel=2e-3)
        assert gguf_figure["n"] == folder_figure["n"]
        assert "llama.cpp, " in gguf_figure["convention"]
        assert "float32" not in gguf_figure["convention"]
        rounded = measured_figures["q8"][f"{kind}/{text}"]["value"]
        assert rounded != gguf_figure["value"]
        assert rounded == pytest.approx(gguf_figure["value"], rel=0.05)


def test_a_gguf_file_of_the_teacher_has_zero_kl(place: Path, tmp_path: Path) -> None:
    path = exported(Checkpoint(place / "teacher"), tmp_path / "t.gguf", "F32", verify="never")
    config = config_of(place, metrics=("kl",), tasks=())
    measured_figures = measured(
        evaluate({"t": path}, tmp_path / "out", None, place / "teacher", config)
    )
    assert abs(measured_figures["t"]["kl/raw"]["value"]) < 1e-6


def test_a_gguf_file_has_the_task_scores_of_its_folder(out: Path) -> None:
    measured_figures, items = measured(out), json.loads((out / ITEMS).read_text())
    names = [name for name in items["student"] if not name.startswith("task_")]
    assert {name.partition("/")[2] for name in names} == {"choices", "pairs", "answers"}
    for name in names:
        assert items["f32"][name] == items["student"][name], name
        assert measured_figures["f32"][name]["value"] == measured_figures["student"][name]["value"]
    perplexity = "task_perplexity/pairs"
    assert items["f32"][perplexity] == pytest.approx(items["student"][perplexity], rel=1e-4)
    assert measured_figures["f32"]["acc/choices"]["convention"].endswith(
        "tokens by transformers and llama.cpp alike"
    )
    assert "llama.cpp, " in measured_figures["f32"]["acc/choices"]["convention"]


def test_each_request_of_lm_eval_is_scored_like_the_folder(place: Path) -> None:
    """Log-likelihoods one by one in any order, whole texts in windows, and answers."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from regrow.stages.evaluate.folder_model import FolderEvalModel
    from regrow.stages.evaluate.gguf_lm import GgufLM
    from regrow.stages.evaluate.gguf_model import GgufEvalModel
    from regrow.stages.evaluate.harness import Model

    checkpoint = Checkpoint(place / "student")
    file = GgufFile(place / "f32.gguf")
    tokenizer, options = checkpoint.tokenizer(), Options(device="cpu", batch_size=2)
    folder_lm = Model(FolderEvalModel("s", checkpoint, tokenizer, [], torch.float32, options, {}))
    gguf_lm = GgufLM(GgufEvalModel("f", file, tokenizer, [], {}))

    def instances(kind: Any, *arguments: Any) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=request, idx=n)
            for n, request in enumerate(arguments)
        ]

    long_text = " ".join(SENTENCES * 12)
    pairs = [
        ("", "Hello"),
        (long_text, "the end"),
        ("The cat", " sat"),
        ("The cat", " on"),
        ("T", " he"),
    ]
    requests = instances("loglikelihood", *pairs)
    expected, actual = folder_lm.loglikelihood(requests), gguf_lm.loglikelihood(requests)
    assert [value for value, _ in actual] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [top for _, top in actual] == [top for _, top in expected]
    rolling = instances("loglikelihood_rolling", (long_text,), ("Short.",))
    assert len(checkpoint.tokenizer()(long_text)["input_ids"]) > gguf_lm.max_length
    assert gguf_lm.loglikelihood_rolling(rolling) == pytest.approx(
        folder_lm.loglikelihood_rolling(rolling), rel=1e-4
    )
    options = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    generations = instances(
        "generate_until", *((s, dict(options)) for s in (long_text, *SENTENCES))
    )
    assert gguf_lm.generate_until(generations) == folder_lm.generate_until(generations)


def test_a_gguf_file_generates_the_text_of_its_folder(out: Path) -> None:
    generations = json.loads((out / EVALUATION).read_text())["generations"]
    assert generations["f32"] == generations["student"]
    assert all(len(answer["text"]) > 0 for answer in generations["f32"])


def test_size_figures_are_those_of_the_file(place: Path, out: Path) -> None:
    measured_figures = measured(out)
    for label in ("f32", "q8"):
        assert measured_figures[label]["bytes"]["value"] == (place / f"{label}.gguf").stat().st_size
        assert (
            measured_figures[label]["parameters"]["value"]
            == measured_figures["student"]["parameters"]["value"]
        )
    assert measured_figures["f32"]["bits_per_weight"]["value"] == 32
    assert 8.5 <= measured_figures["q8"]["bits_per_weight"]["value"] < 9
    assert "bits_per_weight" not in measured_figures["student"]


def test_speed_names_llama_cpp(out: Path) -> None:
    measured_figures = measured(out)
    for name in ("prefill", "decode", "ttft", "time_per_output_token", "prefill/3 x 24"):
        figure = measured_figures["f32"][name]
        assert figure["value"] > 0
        assert "llama.cpp, " in figure["convention"]
        assert figure["convention"].count(" threads") == 1
    assert "3 random tokens after" in measured_figures["f32"]["decode"]["convention"]
    assert "3 greedy tokens after" in measured_figures["student"]["decode"]["convention"]
    assert "llama.cpp, files as warm" in measured_figures["f32"]["load_time"]["convention"]
    assert measured_figures["f32"]["load_time"]["value"] > 0
    # Only speeds of one program compare: the first file is the measure of the others.
    assert "prefill_speedup" not in measured_figures["f32"]
    assert "÷ that of f32," in measured_figures["q8"]["prefill_speedup"]["convention"]
    assert "÷ that of teacher," in measured_figures["student"]["prefill_speedup"]["convention"]


def test_reusing_the_kv_cache_does_not_change_logits(place: Path) -> None:
    tokens = Checkpoint(place / "student").tokenizer()(TEXT)["input_ids"][:700]
    with GgufModel(place / "f32.gguf", 64) as model:
        expected = model.logits(tokens)
        near = 2e-3 * float(abs(expected).max())  # keys and values are kept in F16
        for start in (0, 5, 300, 650):
            model.logits([*tokens[:start], 7, 8, 9])
            assert model.logits(tokens, start) == pytest.approx(expected[start:], abs=near)
        assert model.logits(tokens[:3]) == pytest.approx(expected[:3], abs=near)


def test_an_interrupted_evaluation_resumes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrow.stages.evaluate.metrics import generations

    config = config_of(place, metrics=("perplexity", "kl", "generations"), tasks=())
    plain = generations.measure

    def fails(model: Any, context: Any) -> Any:
        if model.label == "f32":
            raise KeyboardInterrupt
        return plain(model, context)

    monkeypatch.setattr(generations, "measure", fails)
    models = {"f32": place / "f32.gguf"}
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, tmp_path / "out", None, place / "teacher", config)
    monkeypatch.setattr(generations, "measure", plain)

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("regrow.stages.evaluate.gguf_model.GgufEvalModel.sums", never)
    rows = measured(evaluate(models, tmp_path / "out", None, place / "teacher", config))
    assert rows["f32"]["kl/raw"]["value"] > 0.1


def test_a_file_alone_has_its_own_tokenizer(place: Path, tmp_path: Path) -> None:
    config = config_of(place, metrics=("perplexity",), tasks=())
    rows = measured(evaluate({"f32": place / "f32.gguf"}, tmp_path / "out", config=config))
    models = {"f32": place / "f32.gguf", "student": place / "student"}
    other = measured(evaluate(models, tmp_path / "both", config=config))
    assert rows["f32"]["perplexity/raw"] == other["f32"]["perplexity/raw"]


def test_text_that_llama_cpp_tokenizes_differently_has_no_figures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = GgufModel.tokenize

    def other(self: GgufModel, text: str, special: bool = False) -> list[int]:
        tokens = plain(self, text, special)
        return [*tokens, 0] if text.startswith("0 ") else tokens

    monkeypatch.setattr(tokenizer_match.GgufModel, "tokenize", other)
    config = config_of(place, metrics=("perplexity", "kl"), tasks=())
    models = {"f32": place / "f32.gguf"}
    out = evaluate(models, tmp_path / "out", data_of(place), place / "teacher", config)
    assert set(measured(out)["f32"]) == {"perplexity/heldout", "kl/heldout"}
    assert "perplexity/raw" in measured(out)["teacher"]
    output = capsys.readouterr().err
    assert "llama.cpp tokenizes the text 'raw' differently" in output


def test_the_command_line_evaluates_a_gguf_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", f"q8={place / 'q8.gguf'}", "--against", str(place / "teacher")]
    arguments += ["--metrics", "size", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert " parameters, 156 kB, by llama.cpp with " in capsys.readouterr().out
    assert main(arguments) == 0
    assert "bits/weight" in capsys.readouterr().out


def test_bad_gguf_input_is_refused(
    place: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((place / "f32.gguf").read_bytes()[:-20000])
    message = refused("evaluate", cut, "--out", tmp_path / "out")
    assert f"{cut}: llama.cpp cannot load it: " in message
    assert "corrupted or incomplete" in message
    message = refused("evaluate", tmp_path / "no.gguf", "--out", tmp_path / "out")
    assert "no such GGUF file" in message
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "regrow.llama_cpp.find_spec", lambda name: None if name == "cyllama" else find(name)
    )
    message = refused("evaluate", place / "q8.gguf", "--out", tmp_path / "out")
    assert "needs llama.cpp: pip install 'regrow[llama]'" in message


def test_a_folder_with_other_tokens_lends_no_tokenizer(place: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(place / "teacher", tmp_path / "teacher"))
    tokens = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[60:62]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (teacher / "tokenizer.json").write_text(json.dumps(tokens))
    file = GgufFile(place / "q8.gguf")
    assert file.has_tokens_of(Checkpoint(place / "student").tokenizer())
    assert not file.has_tokens_of(Checkpoint(teacher).tokenizer())
