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
    answers = [{"question": s, "answer": s[:3]} for s in SENTENCES]
    for name, rows in (
        *(("data", stories), ("choices", choices)),
        *(("pairs", pairs), ("answers", answers)),
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
    found = json.loads((out / EVALUATION).read_text())["figures"]
    return {label: {row["name"]: row for row in rows} for label, rows in found.items()}


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """Everything measured of all of them."""
    models = {"student": place / "student", "f32": place / "f32.gguf", "q8": place / "q8.gguf"}
    config = config_of(place)
    return evaluate(models, place / "out", data_of(place), place / "teacher", config)


@pytest.mark.parametrize("text", ["raw", "heldout"])
def test_the_same_figures_on_text(text: str, out: Path) -> None:
    found = measured(out)
    kinds = ["perplexity", "kl", *(["bits_per_byte"] if text == "raw" else [])]
    for kind in kinds:
        theirs, ours = (found[label][f"{kind}/{text}"] for label in ("student", "f32"))
        assert ours["value"] == pytest.approx(theirs["value"], rel=2e-4)
        assert ours["stderr"] == pytest.approx(theirs["stderr"], rel=2e-3)
        assert ours["n"] == theirs["n"]
        assert "llama.cpp, " in ours["convention"]
        assert "float32" not in ours["convention"]
        rounded = found["q8"][f"{kind}/{text}"]["value"]
        assert rounded != ours["value"]
        assert rounded == pytest.approx(ours["value"], rel=0.05)


def test_a_file_of_the_teacher_is_at_no_distance(place: Path, tmp_path: Path) -> None:
    path = exported(Checkpoint(place / "teacher"), tmp_path / "t.gguf", "F32", verify="never")
    config = config_of(place, metrics=("kl",), tasks=())
    found = measured(evaluate({"t": path}, tmp_path / "out", None, place / "teacher", config))
    assert abs(found["t"]["kl/raw"]["value"]) < 1e-6


def test_the_same_scores_of_tasks(out: Path) -> None:
    found, items = measured(out), json.loads((out / ITEMS).read_text())
    names = [name for name in items["student"] if not name.startswith("task_")]
    assert {name.partition("/")[2] for name in names} == {"choices", "pairs", "answers"}
    for name in names:
        assert items["f32"][name] == items["student"][name], name
        assert found["f32"][name]["value"] == found["student"][name]["value"]
    perplexity = "task_perplexity/pairs"
    assert items["f32"][perplexity] == pytest.approx(items["student"][perplexity], rel=1e-4)
    assert found["f32"]["acc/choices"]["convention"].endswith(
        "tokens by transformers and llama.cpp alike"
    )
    assert "llama.cpp, " in found["f32"]["acc/choices"]["convention"]


def test_scores_on_the_way(place: Path) -> None:
    """Log-likelihoods one by one in any order, whole texts in windows, and answers."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from regrow.stages.evaluate.folder_model import FolderEvalModel
    from regrow.stages.evaluate.gguf_model import GgufEvalModel
    from regrow.stages.evaluate.harness import model_of

    checkpoint = Checkpoint(place / "student")
    file = GgufFile(place / "f32.gguf")
    tokenizer, options = checkpoint.tokenizer(), Options(device="cpu", batch_size=2)
    theirs = model_of(FolderEvalModel("s", checkpoint, tokenizer, [], torch.float32, options, {}))
    ours = model_of(GgufEvalModel("f", file, tokenizer, [], {}))

    def asked(kind: Any, *arguments: Any) -> list[Instance]:
        return [
            Instance(request_type=kind, doc={}, arguments=each, idx=n)
            for n, each in enumerate(arguments)
        ]

    long = " ".join(SENTENCES * 12)
    pairs = [
        ("", "Hello"),
        (long, "the end"),
        ("The cat", " sat"),
        ("The cat", " on"),
        ("T", " he"),
    ]
    requests = asked("loglikelihood", *pairs)
    expected, found = theirs.loglikelihood(requests), ours.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], rel=1e-4)
    assert [top for _, top in found] == [top for _, top in expected]
    rolling = asked("loglikelihood_rolling", (long,), ("Short.",))
    assert len(checkpoint.tokenizer()(long)["input_ids"]) > ours.max_length
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling), rel=1e-4
    )
    options = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    answers = asked("generate_until", *((s, dict(options)) for s in (long, *SENTENCES)))
    assert ours.generate_until(answers) == theirs.generate_until(answers)


def test_the_same_generations(out: Path) -> None:
    found = json.loads((out / EVALUATION).read_text())["generations"]
    assert found["f32"] == found["student"]
    assert all(len(answer["text"]) > 0 for answer in found["f32"])


def test_size_is_the_files(place: Path, out: Path) -> None:
    found = measured(out)
    for label in ("f32", "q8"):
        assert found[label]["bytes"]["value"] == (place / f"{label}.gguf").stat().st_size
        assert found[label]["parameters"]["value"] == found["student"]["parameters"]["value"]
    assert found["f32"]["bits_per_weight"]["value"] == 32
    assert 8.5 <= found["q8"]["bits_per_weight"]["value"] < 9
    assert "bits_per_weight" not in found["student"]


def test_speed_names_llama_cpp(out: Path) -> None:
    found = measured(out)
    for name in ("prefill", "decode", "ttft", "time_per_output_token", "prefill/3 x 24"):
        figure = found["f32"][name]
        assert figure["value"] > 0
        assert "llama.cpp, " in figure["convention"]
        assert figure["convention"].count(" threads") == 1
    assert "3 random tokens after" in found["f32"]["decode"]["convention"]
    assert "3 greedy tokens after" in found["student"]["decode"]["convention"]
    assert "llama.cpp, files as warm" in found["f32"]["load_time"]["convention"]
    assert found["f32"]["load_time"]["value"] > 0
    # Only speeds of one program compare: the first file is the measure of the others.
    assert "prefill_speedup" not in found["f32"]
    assert "÷ that of f32," in found["q8"]["prefill_speedup"]["convention"]
    assert "÷ that of teacher," in found["student"]["prefill_speedup"]["convention"]


def test_what_is_kept_of_the_cache_changes_nothing(place: Path) -> None:
    tokens = Checkpoint(place / "student").tokenizer()(TEXT)["input_ids"][:700]
    with GgufModel(place / "f32.gguf", 64) as model:
        whole = model.logits(tokens)
        near = 2e-3 * float(abs(whole).max())  # keys and values are kept in F16
        for start in (0, 5, 300, 650):
            model.logits([*tokens[:start], 7, 8, 9])
            assert model.logits(tokens, start) == pytest.approx(whole[start:], abs=near)
        assert model.logits(tokens[:3]) == pytest.approx(whole[:3], abs=near)


def test_goes_on_where_it_stopped(
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
    found = measured(evaluate(models, tmp_path / "out", None, place / "teacher", config))
    assert found["f32"]["kl/raw"]["value"] > 0.1


def test_a_file_alone_has_its_own_tokenizer(place: Path, tmp_path: Path) -> None:
    config = config_of(place, metrics=("perplexity",), tasks=())
    found = measured(evaluate({"f32": place / "f32.gguf"}, tmp_path / "out", config=config))
    both = {"f32": place / "f32.gguf", "student": place / "student"}
    other = measured(evaluate(both, tmp_path / "both", config=config))
    assert found["f32"]["perplexity/raw"] == other["f32"]["perplexity/raw"]


def test_text_that_llama_cpp_splits_otherwise_has_no_figures(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = GgufModel.tokenize

    def other(self: GgufModel, text: str, special: bool = False) -> list[int]:
        found = plain(self, text, special)
        return [*found, 0] if text.startswith("0 ") else found

    monkeypatch.setattr(tokenizer_match.GgufModel, "tokenize", other)
    config = config_of(place, metrics=("perplexity", "kl"), tasks=())
    models = {"f32": place / "f32.gguf"}
    out = evaluate(models, tmp_path / "out", data_of(place), place / "teacher", config)
    assert set(measured(out)["f32"]) == {"perplexity/heldout", "kl/heldout"}
    assert "perplexity/raw" in measured(out)["teacher"]
    said = capsys.readouterr().err
    assert "llama.cpp tokenizes the text 'raw' differently" in said


def test_by_the_command_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", f"q8={place / 'q8.gguf'}", "--against", str(place / "teacher")]
    arguments += ["--metrics", "size", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--dry-run"]) == 0
    assert "MB, by llama.cpp with " in capsys.readouterr().out
    assert main(arguments) == 0
    assert "bits/weight" in capsys.readouterr().out


def test_refused(
    place: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes((place / "f32.gguf").read_bytes()[:-20000])
    said = refused("evaluate", cut, "--out", tmp_path / "out")
    assert f"{cut}: llama.cpp cannot load it: " in said
    assert "corrupted or incomplete" in said
    said = refused("evaluate", tmp_path / "no.gguf", "--out", tmp_path / "out")
    assert "no such GGUF file" in said
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "regrow.llama_cpp.find_spec", lambda name: None if name == "cyllama" else find(name)
    )
    said = refused("evaluate", place / "q8.gguf", "--out", tmp_path / "out")
    assert "needs llama.cpp: pip install 'regrow[llama]'" in said


def test_a_folder_of_other_tokens_is_no_parent(place: Path, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(place / "teacher", tmp_path / "teacher"))
    tokens = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[60:62]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (teacher / "tokenizer.json").write_text(json.dumps(tokens))
    file = GgufFile(place / "q8.gguf")
    assert file.has_tokens_of(Checkpoint(place / "student").tokenizer())
    assert not file.has_tokens_of(Checkpoint(teacher).tokenizer())
