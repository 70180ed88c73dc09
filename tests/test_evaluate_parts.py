"""The parts of evaluate, each against a value by hand or a slow, obvious version."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_ids, tiny_model
from tiny_tokenizer import SENTENCES, tiny_tokenizer

from regrow.runtime.greedy import continuation, decode, prefill
from regrow.stages.evaluate import table
from regrow.stages.evaluate.eval_model import ratio
from regrow.stages.evaluate.stage import conventions
from regrow.stages.evaluate.texts import opening, text_files, windows

CPU = torch.device("cpu")
TEXT = " ".join(f"{n} {sentence}" for n in range(12) for sentence in SENTENCES)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2"])
def test_greedy_with_the_cache_equals_without(model_type: str) -> None:
    model = tiny_model(model_type, seed=3)
    prompt = tiny_ids(1, 20)
    ids = prompt.clone()
    with torch.no_grad():
        for _ in range(9):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    expected = ids[0, 20:].tolist()
    token, cache = prefill(model, prompt)
    follow = decode(model, token, cache)
    assert [token, *(next(follow) for _ in range(8))] == expected
    assert continuation(model, prompt[0].tolist(), 9, ends=set()) == expected
    first = expected.index(expected[4])
    assert continuation(model, prompt[0].tolist(), 9, ends={expected[4]}) == expected[:first]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "raw.txt").write_text(TEXT)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps({"text": s}) + "\n" for s in SENTENCES))
    rows = [{"context": s[:9], "continuation": s[10:]} for s in SENTENCES]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_text_is_read_as_far_as_needed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow.stages.evaluate.texts.CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr("regrow.stages.evaluate.texts.MARGIN", 4)
    tokenizer = tiny_tokenizer()
    all_ids = tokenizer(TEXT)["input_ids"]
    for count in (1, 7, 200, len(all_ids), len(all_ids) + 99):
        assert opening(text_files(f"{place}/raw.txt"), tokenizer, count)[1] == all_ids[:count]
    rows = opening(text_files(f"{place}/rows.jsonl.gz"), tokenizer, 9999)[1]
    assert tokenizer.decode(rows) == "\n\n".join(SENTENCES)
    pairs = opening(text_files(f"{place}/pairs.jsonl"), tokenizer, 9999)[1]
    assert tokenizer.decode(pairs) == "\n\n".join(f"{s[:9]} {s[10:]}" for s in SENTENCES)


def test_windows_score_all_but_their_first_token() -> None:
    sequences = windows([5, 6, 7, 8, 9], 3)
    assert sequences.input_ids.tolist()[0] == [5, 6, 7]
    assert sequences.labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]
    assert sequences.real.tolist() == [[True] * 3, [True, True, False]]
    assert sequences.position_ids.tolist() == [[0, 1, 2]] * 2


def test_the_ratio_estimator_equals_hand_computed_values() -> None:
    # m = 12/4 = 3; residuals 2−3 = −1 and 10−9 = 1; sqrt(2/1 · 2)/4 = 0.5
    assert ratio([2.0, 10.0], [1, 3]) == (3.0, 0.5)
    assert ratio([6.0], [3]) == (2.0, 0.0)


def test_conventions_keep_what_models_share() -> None:
    def named(convention: str) -> list[dict[str, Any]]:
        return [{"name": "decode", "convention": convention}]

    same = conventions({"a": named("batch 1; x"), "b": named("batch 1; x")})
    assert same == {"decode": "batch 1; x"}
    differ = conventions({"a": named("batch 1; runs 1"), "b": named("batch 1; runs 12")})
    assert differ == {"decode": "batch 1"}


def test_a_wide_table_is_split_and_loses_no_figure(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"perplexity/text {number}" for number in range(30)]
    figures = [{"name": name, "value": 100.25 + number} for number, name in enumerate(names)]
    labels = ["teacher", "a student with a long name"]
    table.show({"labels": labels, "figures": dict.fromkeys(labels, figures), "metrics": []})
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert all(f"ppl text {number} " in shown for number in range(30))
    assert all(shown.count(f" {value['value']:.2f} ") == 2 for value in figures)
    assert 2 < shown.count("a student with a long name") < 8


def test_columns_that_fit_stay_in_one_table() -> None:
    figures = [{"name": "parameters", "value": 5.0}, {"name": "kl/x", "value": 0.5}]
    evaluation = {"labels": ["a"], "figures": {"a": figures}}
    assert table.fitting(evaluation, ["parameters", "kl/x"], 160) == [["parameters", "kl/x"]]
    assert table.fitting(evaluation, ["parameters", "kl/x"], 10) == [["parameters"], ["kl/x"]]
    assert table.fitting(evaluation, [], 160) == []
