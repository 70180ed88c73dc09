"""Which answers are kept, prompts that the model writes itself, and log-probabilities."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_generate import ALL, PROMPTS, data, options, rows_of, write_rows
from tiny_folders import data_of, write_model
from tiny_job import refused
from tiny_tokenizer import tiny_tokenizer

from regrow.checkpoint import Checkpoint
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.runtime.batch_generator import BatchGenerator
from regrow.stage_dir import read as read_manifest
from regrow.stages.generate import check
from regrow.stages.generate.keep import diverse, fault, plain, repetition
from regrow.stages.generate.local import _token
from regrow.stages.generate.self_prompts import beginning
from regrow.stages.generate.stage import generate
from regrow.training.answer_targets import TOP_LOGPROBS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("keep")
    write_model(place / "model", num_hidden_layers=2, hidden_size=24)
    write_rows(place / "prompts.jsonl", [{"prompt": p} for p in PROMPTS])
    return place


def test_faults_by_hand() -> None:
    row: Any = {"answer": "a b c a b c a b c", "finished": True, "tokens": 9}
    assert fault(row, ALL, None) is None
    assert repetition(row["answer"]) == pytest.approx(4 / 7)
    assert repetition("a b") == 0.0
    limits = {"min_new_tokens": 10, "max_repetition": 0.5, "max_perplexity": 20.0}
    for name, reason in zip(limits, ["too short", "repeats itself", "too unlikely"], strict=True):
        one = ALL.model_copy(update={name: limits[name]})
        assert fault(row, one, 20.5) == reason
    assert fault(row, ALL.model_copy(update=limits | {"min_new_tokens": 9}), 1.0) is not None
    loose = ALL.model_copy(update={"max_repetition": 0.6, "max_perplexity": 20.0})
    assert fault(row, loose, 20.0) is None
    assert fault(row, loose, math.nan) == "too unlikely"
    assert fault({**row, "answer": " "}, ALL, None) == "empty"
    assert fault({**row, "error": "no"}, ALL, None) == "refused by the endpoint"
    unfinished = ALL.model_copy(update={"keep_unfinished": False})
    assert fault({**row, "finished": False}, unfinished, None) == "unfinished"


def test_answers_in_another_language_are_left_out() -> None:
    pytest.importorskip("py3langid")
    german = "Die Hauptstadt von Frankreich ist Paris, und sie liegt an der Seine."
    english = "The capital of France is Paris, and it lies on the river Seine."
    unclear = ["42", "Paris.", "f(x) = x + 1", "e4 e5 Nf3 Nc6 Bb5 a6 Ba4 Nf6 O-O Be7"]
    for languages, other in ((("en",), {german}), (("de",), {english}), (("en", "de"), set())):
        config = ALL.model_copy(update={"languages": languages})
        for text in (german, english, *unclear):
            row: Any = {"answer": text, "finished": True, "tokens": 9}
            expected = "in another language" if text in other else None
            assert fault(row, config, None) == expected, text
            assert fault(row, ALL, None) is None


def test_wrong_languages_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("py3langid")
    config = ALL.model_copy(update={"languages": ("en", "english")})
    with pytest.raises(UserError, match="languages 'english': allowed are ISO 639 codes"):
        check(config, prompts=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'regrow\[language\]'"):
        check(config, prompts=True)


def test_duplicates_are_of_case_and_space_alone() -> None:
    assert plain("What  is\n1 + 2?") == plain("what is 1 + 2?")
    assert plain("1 + 2") != plain("1 - 2")


def test_a_diverse_choice_has_one_of_each_group() -> None:
    groups = [
        ["The cat sat on the mat.", "A cat sat on the mat.", "The cat sat on a mat!"],
        ["Compute 17 times 23 for me.", "Compute 17 times 24 for me."],
        ["Paris is the capital of France.", "paris is the capital of France"],
        ["def f(x): return x", "def g(x): return x"],
    ]
    texts = [text for group in groups for text in group]
    group_of = [number for number, group in enumerate(groups) for _ in group]
    chosen = diverse(texts, 4)
    assert sorted({group_of[n] for n in chosen}) == [0, 1, 2, 3]
    assert chosen == sorted(chosen) == diverse(texts, 4)
    assert set(chosen) <= set(diverse(texts, 6))
    assert diverse(texts, 99) == list(range(len(texts)))


def test_rows_that_are_alike_are_left_out(place: Path, tmp_path: Path) -> None:
    said = [*PROMPTS, PROMPTS[0].upper(), f"  {PROMPTS[3]} "]
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": p} for p in said])
    config = ALL.model_copy(update={"select": 4, "max_repetition": 0.99})
    out = generate(place / "model", data(tmp_path), tmp_path / "out", config, options())
    assert len(rows_of(out)) == 4
    manifest = read_manifest(out)
    assert manifest is not None
    figures = {each["name"]: each["value"] for each in manifest["figures"]}
    assert figures["prompts"] == 9  # two were duplicates
    assert sum(manifest["left_out"].values()) == 5
    assert manifest["answered_by"]["licence"] == "unknown"


@torch.no_grad()
def test_perplexity_is_that_of_the_answer_alone(place: Path, tmp_path: Path) -> None:
    """The limit is the third largest; the expected values come token by token in float64."""
    checkpoint = Checkpoint(place / "model")
    model, tokenizer = checkpoint.model(torch.float64), checkpoint.tokenizer()
    whole = generate(place / "model", data(place), tmp_path / "whole", ALL, options())
    expected = {}
    for row in rows_of(whole):
        texts = [
            tokenizer.apply_chat_template(
                row["messages"][:turns], tokenize=False, add_generation_prompt=turns == 1
            )
            for turns in (1, 2)
        ]
        text = texts[1].rstrip()
        ids = tokenizer(text, return_offsets_mapping=True)
        log_p = model(torch.tensor([ids["input_ids"]])).logits[0].log_softmax(-1)
        losses = [
            -float(log_p[at - 1, token])
            for at, (token, (_, end)) in enumerate(
                zip(ids["input_ids"], ids["offset_mapping"], strict=True)
            )
            if end > len(texts[0])
        ]
        expected[row["id"]] = math.exp(sum(losses) / len(losses))
    limit = sorted(expected.values())[-3] * 0.999
    config = ALL.model_copy(update={"max_perplexity": limit})
    out = generate(place / "model", data(place), tmp_path / "out", config, options())
    kept = {row["id"] for row in rows_of(out)}
    assert kept == {key for key, value in expected.items() if value <= limit}
    assert len(kept) == len(expected) - 3


def test_top_log_probabilities_are_those_of_the_model(place: Path, tmp_path: Path) -> None:
    """Of each token of each answer, given the tokens before it, whatever the batch and draws."""
    checkpoint = Checkpoint(place / "model")
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    config = ALL.model_copy(update={"top_logprobs": 3, "temperature": 3.0, "top_p": 0.8})
    out = generate(place / "model", data(place), tmp_path / "out", config, options(4))
    rows = [json.loads(line) for line in (out / TOP_LOGPROBS).read_text().splitlines()]
    assert len(rows) == 9
    for answered, row in zip(rows_of(out), rows, strict=True):
        prompt = tokenizer.apply_chat_template(
            answered["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(prompt)["input_ids"]
        ids = start + tokenizer.convert_tokens_to_ids([each["token"] for each in row["tokens"]])
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for at, each in enumerate(row["tokens"], len(start)):
            values, tops = log_p[at - 1].topk(3)
            assert each["logprob"] == pytest.approx(float(log_p[at - 1, ids[at]]), abs=1e-3)
            assert [pair[0] for pair in each["top"]] == tokenizer.convert_ids_to_tokens(tops)
            assert [pair[1] for pair in each["top"]] == pytest.approx(values.tolist(), abs=1e-3)


@pytest.fixture(scope="module")
def padded(place: Path) -> Checkpoint:
    """A model with 128 more rows than its tokenizer has ids, which are the most likely ones."""
    folder = place / "padded"
    more: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 24, "tie_word_embeddings": False}
    model = write_model(folder, vocab_size=512, **more).model(torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight[len(tiny_tokenizer()) :] *= 3
    model.save_pretrained(str(folder))
    return Checkpoint(folder)


@pytest.mark.parametrize("greedy", [True, False])
def test_rows_without_a_token_are_not_used(
    place: Path, padded: Checkpoint, tmp_path: Path, greedy: bool
) -> None:
    """Neither drawn nor counted: the softmax is that of the rows that the tokenizer names."""
    tokenizer, size = tiny_tokenizer(), len(tiny_tokenizer())
    config = ALL.model_copy(update={"top_logprobs": 3, "greedy": greedy, "temperature": 3.0})
    out = generate(padded, data(place), tmp_path / "out", config, options(4))
    model, beyond = padded.model(torch.float32), 0
    rows = [json.loads(line) for line in (out / TOP_LOGPROBS).read_text().splitlines()]
    for answered, row in zip(rows_of(out), rows, strict=True):
        prompt = tokenizer.apply_chat_template(
            answered["messages"][:1], tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(prompt)["input_ids"]
        ids = start + [tokenizer.get_vocab()[each["token"]] for each in row["tokens"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        log_p = logits[:, :size].log_softmax(-1)
        for at, each in enumerate(row["tokens"], len(start)):
            values, tops = log_p[at - 1].topk(3)
            beyond += int(logits[at - 1].argmax()) >= size
            assert ids[at] == int(tops[0]) or not greedy
            assert each["logprob"] == pytest.approx(float(log_p[at - 1, ids[at]]), abs=1e-3)
            assert [pair[0] for pair in each["top"]] == tokenizer.convert_ids_to_tokens(tops)
            assert [pair[1] for pair in each["top"]] == pytest.approx(values.tolist(), abs=1e-3)
    assert beyond > 20


def test_its_own_prompts_have_no_rows_without_a_token(
    padded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, ids = BatchGenerator.answer, list[int]()

    def noted(self: BatchGenerator, *given: Any) -> Any:
        found = original(self, *given)
        ids.extend(i for answer in found for i in answer.ids)
        return found

    monkeypatch.setattr(BatchGenerator, "answer", noted)
    config = ALL.model_copy(update={"self_prompts": 3, "temperature": 30.0, "max_new_tokens": 4})
    generate(padded, None, tmp_path / "out", config, options())
    assert len(ids) > 100
    assert max(ids) < len(tiny_tokenizer())


def test_an_id_without_a_token_gets_the_name_of_no_token() -> None:
    tokenizer = tiny_tokenizer()
    assert _token(tokenizer, 65) == tokenizer.convert_ids_to_tokens(65)
    assert _token(tokenizer, 400) == "<no token 400>"


def test_prompts_of_its_own_without_data(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Distinct, the same after a kill, and in splits of their own."""
    config = ALL.model_copy(update={"self_prompts": 3, "temperature": 30.0, "max_new_tokens": 4})
    whole = generate(place / "model", None, tmp_path / "whole", config, options())
    prompts = [row["messages"][0]["content"] for row in rows_of(whole)]
    assert len({plain(prompt) for prompt in prompts}) == len(prompts) == 3
    original, calls = BatchGenerator.answer, []

    def killed(self: BatchGenerator, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, *given)

    monkeypatch.setattr(BatchGenerator, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(place / "model", None, tmp_path / "cut", config, options())
    monkeypatch.setattr(BatchGenerator, "answer", original)
    cut = generate(place / "model", None, tmp_path / "cut", config, options())
    assert (cut / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == ["answers.jsonl", "manifest.json"]
    text = data_of(cut)
    assert build_sequences(text, tiny_tokenizer(), "train", 1).scored_tokens > 0


def test_a_users_turn_begins_as_the_template_says() -> None:
    tokenizer = tiny_tokenizer()
    prompt = "Well?"
    turn = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False)
    head = tokenizer.decode(beginning(tokenizer))
    assert head
    assert turn.startswith(head)
    assert turn[len(head) :].lstrip().startswith(prompt)
    bare = tiny_tokenizer(chat_template=None)
    assert beginning(bare) in ([bare.bos_token_id], [bare.eos_token_id])


def test_no_prompts_are_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", place / "model", "--out", tmp_path / "out"]
    assert "no prompts: give --data, or --self-prompts" in refused(capsys, *given)
    both = [*given, "--data", place / "prompts.jsonl", "--self-prompts", 3]
    assert "give one of them" in refused(capsys, *both)
