"""Evaluate: every metric against a slow, obvious version; the stage from folders to JSON."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from regrow.data import DataConfig
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.stage import EVALUATION, evaluate

TEXT = " ".join(f"{n} {sentence}" for n in range(12) for sentence in SENTENCES)
QUICK: dict[str, Any] = {
    "dtype": "float32",
    "new_tokens": 5,
    "prefill_tokens": 24,
    "decode_tokens": 3,
    "repeats": 2,
    "prompts": ("Hello there", "1 2 3"),
}


def write_model(folder: Path, model: PreTrainedModel, **tokenizer: Any) -> Path:
    model.to(torch.float32).save_pretrained(str(folder))
    tiny_tokenizer(**tokenizer).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders teacher, copy and student (another random model), and texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "teacher", tiny_model("llama", seed=1))
    shutil.copytree(folder / "teacher", folder / "copy")
    write_model(folder / "student", tiny_model("llama", seed=2, intermediate_size=40))
    (folder / "raw.txt").write_text(TEXT)
    rows = [{"context": s[:9], "continuation": s[10:]} for s in SENTENCES]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stories = [{"text": f"Story {n}. {SENTENCES[n % 5]}"} for n in range(80)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stories))
    return folder


@pytest.fixture(scope="module")
def evaluation(place: Path) -> dict[str, Any]:
    """All metrics on all models, held-out blocks and two further texts."""
    config = EvaluateConfig(
        texts={"raw": f"{place}/raw.txt", "pairs": f"{place}/pairs.jsonl"},
        text_tokens=150,
        window=32,
        heldout_sequences=3,
        **QUICK,
    )
    models = {"copy": place / "copy", "student": place / "student"}
    out = evaluate(models, place / "out", data_of(place), place / "teacher", config)
    evaluation: dict[str, Any] = json.loads((out / EVALUATION).read_text())
    return evaluation


def data_of(place: Path) -> DataConfig:
    return DataConfig.model_validate(
        {"sources": [f"{place}/data.jsonl"], "sequence_length": 48, "heldout_fraction": 0.3}
    )


def figures(evaluation: dict[str, Any], label: str) -> dict[str, dict[str, Any]]:
    return {figure["name"]: figure for figure in evaluation["figures"][label]}


def log_probabilities(folder: Path, ids: list[int]) -> torch.Tensor:
    """Float64 log softmax [T, V] of one sequence on its own, by the stock model."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float64)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)


def per_window(place: Path, name: str, ids: list[int], window: int) -> list[tuple[float, float]]:
    """(Σ nll, Σ KL from the teacher) of each window of the raw text, one token at a time."""
    values = []
    for begin in range(0, len(ids), window):
        part = ids[begin : begin + window]
        log_q, log_p = (
            log_probabilities(place / name, part),
            log_probabilities(place / "teacher", part),
        )
        nll = kl = 0.0
        for t in range(len(part) - 1):
            nll -= float(log_q[t, part[t + 1]])
            kl += float((log_p[t].exp() * (log_p[t] - log_q[t])).sum())
        values.append((nll, kl))
    return values


def test_perplexity_and_kl_on_raw_text(place: Path, evaluation: dict[str, Any]) -> None:
    ids = tiny_tokenizer()(TEXT)["input_ids"][:150]
    assert len(ids) == 150
    slow = per_window(place, "student", ids, 32)  # 4 full windows and one of 22 tokens
    scored = 150 - 5
    measured = figures(evaluation, "student")
    mean = sum(nll for nll, _ in slow) / scored
    assert measured["perplexity/raw"]["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert measured["perplexity/raw"]["n"] == measured["kl/raw"]["n"] == scored
    assert measured["kl/raw"]["value"] == pytest.approx(
        sum(kl for _, kl in slow) / scored, rel=1e-4
    )
    assert measured["kl/raw"]["value"] > 0.1
    residuals = [nll - mean * n for (nll, _), n in zip(slow, [31] * 4 + [21], strict=True)]
    stderr = math.sqrt(5 / 4 * sum(r * r for r in residuals)) / scored * math.exp(mean)
    assert measured["perplexity/raw"]["stderr"] == pytest.approx(stderr, rel=1e-3)


def test_heldout_scores_only_labels_and_keeps_documents_apart(
    place: Path, evaluation: dict[str, Any]
) -> None:
    sequences = build_sequences(data_of(place), tiny_tokenizer(), "heldout", 3)
    assert len(sequences) == 3
    assert sequences.num_documents > 6
    total, count = 0.0, 0
    for ids, positions, labels in zip(
        sequences.input_ids, sequences.position_ids, sequences.labels, strict=True
    ):
        starts = [t for t, p in enumerate(positions.tolist()) if p == 0] + [len(ids)]
        for begin, end in pairwise(starts):
            document = ids[begin:end].tolist()
            log_q = log_probabilities(place / "student", document)
            for t in range(1, len(document)):
                if labels[begin + t] != -100:
                    total -= float(log_q[t - 1, document[t]])
                    count += 1
    measured = figures(evaluation, "student")["perplexity/heldout"]
    assert measured["n"] == count == sequences.scored_tokens
    assert measured["value"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_an_equal_model_has_zero_kl(evaluation: dict[str, Any]) -> None:
    measured = figures(evaluation, "copy")
    for name in ("kl/heldout", "kl/raw", "kl/pairs"):
        assert measured[name]["value"] == 0.0
        assert measured[name]["stderr"] == 0.0
    assert measured["perplexity/raw"] == figures(evaluation, "teacher")["perplexity/raw"]


def test_the_teacher_comes_first_and_has_no_kl(evaluation: dict[str, Any]) -> None:
    assert evaluation["labels"] == ["teacher", "copy", "student"]
    assert evaluation["teacher"] == "teacher"
    assert not [name for name in figures(evaluation, "teacher") if name.startswith("kl/")]


def test_size_counts_tied_weights_once(place: Path, evaluation: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(place / "student"))
    sizes = {parameter.data_ptr(): parameter.numel() for parameter in model.parameters()}
    measured = figures(evaluation, "student")
    assert measured["parameters"]["value"] == sum(sizes.values())
    assert measured["bytes"]["value"] == 4 * sum(sizes.values())
    assert model.config.tie_word_embeddings


def test_speed_is_a_median_with_its_spread(evaluation: dict[str, Any]) -> None:
    for name in ("prefill", "decode"):
        figure = figures(evaluation, "student")[name]
        low, high = figure["convention"].rpartition("runs from ")[2].split(" to ")
        low, high = float(low.replace(",", "")), float(high.replace(",", ""))
        assert low - 0.06 <= figure["value"] <= high + 0.06
        assert figure["n"] == 2
        assert "float32 on cpu with" in figure["convention"]
        assert "runs from" not in evaluation["conventions"][name]
        assert "warm-up" in evaluation["conventions"][name]


def test_generations_go_through_the_chat_template(place: Path, evaluation: dict[str, Any]) -> None:
    tokenizer = tiny_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(str(place / "student"), dtype=torch.float32)
    prompt = "<|im_start|>user\n1 2 3<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    output = model.generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=0, pad_token_id=1)
    expected = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    generation = evaluation["generations"]["student"][1]
    assert generation == {"prompt": "1 2 3", "text": expected}


def test_a_base_model_continues_the_plain_prompt(place: Path, tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", tiny_model("llama", seed=2), chat_template=None)
    config = EvaluateConfig(metrics=("generations",), **QUICK)
    out = evaluate({"base": base}, tmp_path / "out", config=config)
    generation = json.loads((out / EVALUATION).read_text())["generations"]["base"][0]
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Hello there", return_tensors="pt").input_ids
    output = model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=1)
    assert (
        generation["text"]
        == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    )


def test_a_second_run_prints_the_same_table(
    place: Path, evaluation: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(metrics=("size",))
    models = {"my [red]model": place / "teacher", "student": place / "student"}
    evaluate(models, tmp_path / "out", against=place / "teacher", config=config)
    first = capsys.readouterr().out
    parameters = f"{figures(evaluation, 'student')['parameters']['value']:,.0f}"
    assert "my [red]model" in first
    assert parameters in first
    written = (tmp_path / "out" / EVALUATION).stat().st_mtime_ns
    evaluate(models, tmp_path / "out", against=place / "teacher", config=config)
    second = capsys.readouterr()
    assert second.out == first
    assert "unchanged" in second.err
    assert (tmp_path / "out" / EVALUATION).stat().st_mtime_ns == written
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    names = [figure["name"] for figure in manifest["figures"]]
    assert names[0] == "my [red]model/parameters"
    assert len(names) == 4


def test_another_tokenizer_has_no_kl(place: Path, tmp_path: Path) -> None:
    """The teacher has fewer tokens, two of them under each other's ids."""
    teacher = write_model(tmp_path / "teacher", tiny_model("llama"), vocab_size=300)
    config_path = teacher / "tokenizer.json"
    tokens = json.loads(config_path.read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[200:202]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    config_path.write_text(json.dumps(tokens))
    config = EvaluateConfig(texts={"raw": f"{place}/raw.txt"}, window=32, **QUICK)
    with pytest.raises(UserError, match="cannot compare other with teacher: token 20") as caught:
        evaluate({"other": place / "copy"}, tmp_path / "out", against=teacher, config=config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_input_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    def run(match: str, **fields: Any) -> None:
        with pytest.raises(UserError, match=match) as caught:
            evaluate(
                {"m": place / "student"}, tmp_path / "out", config=EvaluateConfig(**QUICK, **fields)
            )
        assert "\n" not in str(caught.value)
        assert list(tmp_path.glob("out*")) == list(tmp_path.glob(".out*")) == []

    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"body": "x"}\n')
    run("no such file", texts={"t": f"{tmp_path}/missing.txt"}, window=32)
    run("0 tokens; at least 2", texts={"t": f"{tmp_path}/empty.txt"}, window=32)
    run("row 1: has body", texts={"t": f"{tmp_path}/odd.jsonl"}, window=32)
    run("512 is longer than m supports .256", texts={"t": f"{place}/raw.txt"})
    with pytest.raises(UserError, match="name at least one model"):
        evaluate({}, tmp_path / "out")
    with pytest.raises(ValueError, match="did you mean 'perplexity'"):
        EvaluateConfig(metrics=("perplexty",))
    with pytest.raises(ValueError, match="'heldout' is the name"):
        EvaluateConfig(texts={"heldout": "x.txt"})
