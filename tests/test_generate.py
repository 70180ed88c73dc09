"""Answers to prompts: as the model gives them, drawn by their probability, kept when killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import data_of, write_model
from tiny_job import refused
from tiny_tokenizer import SENTENCES, tiny_tokenizer
from tiny_training import start_ranks

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.documents import read_row, split_of
from regrow.data.prompts import read_prompt
from regrow.data.sequences import build_sequences
from regrow.errors import UserError
from regrow.runtime.batch_generator import BatchGenerator, draw_ids
from regrow.stage_dir import read as read_manifest
from regrow.stages.generate import GenerateConfig
from regrow.stages.generate.stage import generate
from regrow.stages.generate.work import sampling_of

NEW = 12
ALL = GenerateConfig(split="all", max_new_tokens=NEW, keep_unfinished=True)
GREEDY = ALL.model_copy(update={"greedy": True})
HOT = 2.0
"""A temperature at which the tiny model is unsure."""
PROMPTS = [" ".join(SENTENCES[n % 5].split()[: 1 + n]) + f" {n}" for n in range(9)]


def options(batch_size: int = 4) -> Options:
    return Options(device="cpu", batch_size=batch_size)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("generate")
    write_model(place / "model", num_hidden_layers=2, hidden_size=24)
    rows: list[dict[str, Any]] = [{"prompt": p, "completion": "No."} for p in PROMPTS[:3]]
    rows += [{"question": p, "answer": "No."} for p in PROMPTS[3:5]]
    rows += [{"messages": [{"role": "user", "content": p}]} for p in PROMPTS[5:7]]
    said = {"role": "assistant", "content": "No."}
    rows += [
        {"messages": [{"role": "user", "content": p}, said, {"role": "user", "content": p}, said]}
        for p in PROMPTS[7:]
    ]
    write_rows(place / "prompts.jsonl", rows)
    return place


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def data(place: Path) -> DataConfig:
    return data_of(place / "prompts.jsonl")


@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_greedy_answers_are_those_of_prompts_one_by_one(
    place: Path, tmp_path: Path, batch_size: int
) -> None:
    """What a row is padded with on the left, and how long the others go on, changes nothing."""
    generate(place / "model", data(place), tmp_path / "out", GREEDY, options(batch_size))
    checkpoint = Checkpoint(place / "model")
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    found = rows_of(tmp_path / "out")
    assert [row["messages"][0]["content"] for row in found] == PROMPTS
    for row in found:
        turns, answer = row["messages"][:-1], row["messages"][-1]
        assert turns[-1]["role"] == "user"
        assert len(turns) == (3 if turns[0]["content"] in PROMPTS[7:] else 1)
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        alone = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=1,
        )
        expected = tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer == {"role": "assistant", "content": expected}


def test_draws_follow_from_the_seed_and_not_from_the_batch(place: Path, tmp_path: Path) -> None:
    texts = []
    for number, (seed, size) in enumerate([(0, 1), (0, 4), (0, 9), (1, 4)]):
        config = ALL.model_copy(update={"seed": seed, "temperature": 8.0, "top_p": 0.9})
        out = generate(place / "model", data(place), tmp_path / f"{number}", config, options(size))
        texts.append((out / "answers.jsonl").read_bytes())
    assert texts[0] == texts[1] == texts[2]
    assert texts[0] != texts[3]


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_ids_are_drawn_by_their_probability(top_p: float) -> None:
    """A uniform number each from an even grid: ids come as often as their share says."""
    p = torch.tensor([0.05, 0.3, 0.0, 0.4, 0.25], dtype=torch.float64)
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    ids = draw_ids(p.log().expand(count, -1).float(), top_p, uniform)
    expected = p if top_p == 1.0 else torch.tensor([0, 3 / 7, 0, 4 / 7, 0], dtype=torch.float64)
    found = torch.bincount(ids, minlength=5).double() / count
    torch.testing.assert_close(found, expected, atol=2 / count, rtol=0)
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert (p[draw_ids(p.log().expand(2, -1).float(), top_p, edges)] > 0).all()


def test_the_sampler_divides_by_the_temperature(place: Path) -> None:
    """As often as softmax(logits / T) says, over many prompts' draws of one next token."""
    checkpoint = Checkpoint(place / "model")
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    config = ALL.model_copy(update={"max_new_tokens": 1, "temperature": HOT})
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits[0, -1].double()
    expected, likeliest = (logits / HOT).softmax(-1).max(0)
    assert 0.1 < float(expected) < 0.9
    count = 2_000
    answerer = BatchGenerator(model, tokenizer, sampling_of(config, len(tokenizer)))
    answers = answerer.answer([[5, 6, 7]] * count, [str(n) for n in range(count)])
    share = sum(answer.ids == [int(likeliest)] for answer in answers) / count
    assert share == pytest.approx(float(expected), abs=4 * (0.25 / count) ** 0.5)


def test_an_interrupted_run_goes_on_to_the_same_file(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(place / "model", data(place), tmp_path / "whole", ALL, options(2))
    original, calls = BatchGenerator.answer, []

    def killed(self: BatchGenerator, prompts: Any, keys: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(len(keys))
        return original(self, prompts, keys)

    monkeypatch.setattr(BatchGenerator, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        generate(place / "model", data(place), tmp_path / "cut", ALL, options(2))
    done = tmp_path / ".cut.partial" / "done-0.jsonl"
    assert len(done.read_text().splitlines()) == 4
    with done.open("a") as file:
        file.write('{"id": "half a li')
    asked: list[str] = []

    def counting(self: BatchGenerator, prompts: Any, keys: Any) -> Any:
        asked.extend(keys)
        return original(self, prompts, keys)

    monkeypatch.setattr(BatchGenerator, "answer", counting)
    cut = generate(place / "model", data(place), tmp_path / "cut", ALL, options(3))
    assert len(asked) == 5
    assert (cut / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == ["answers.jsonl", "manifest.json"]
    generate(place / "model", data(place), cut, ALL, options(3))
    assert len(asked) == 5  # complete: nothing was asked again


def _share(rank: int, folder: str, out: str) -> None:
    place = Path(folder)
    generate(place / "model", data(place), out, ALL, options(2))


def test_several_processes_write_the_file_of_one(place: Path, tmp_path: Path) -> None:
    start_ranks(2, _share, str(place), str(tmp_path / "two"))
    one = generate(place / "model", data(place), tmp_path / "one", ALL, options())
    assert (tmp_path / "two" / "answers.jsonl").read_bytes() == (one / "answers.jsonl").read_bytes()
    assert len(list((tmp_path / "two").iterdir())) == 2


def test_the_manifest_names_model_and_counts(place: Path, tmp_path: Path) -> None:
    out = generate(place / "model", data(place), tmp_path / "out", ALL, options())
    found = read_manifest(out)
    assert found is not None
    assert found["inputs"]["model"] == Checkpoint(place / "model").fingerprint
    figures = {figure["name"]: figure["value"] for figure in found["figures"]}
    assert (figures["prompts"], figures["answers"]) == (9, 9)


def test_an_answer_ends_at_an_end_mark_of_the_folder_or_the_tokenizer(place: Path) -> None:
    checkpoint = Checkpoint(place / "model")
    model, tokenizer = checkpoint.model(torch.float32), checkpoint.tokenizer()
    model.generation_config.eos_token_id = [3, 9]
    answerer = BatchGenerator(model, tokenizer, sampling_of(GREEDY, len(tokenizer)))
    assert answerer.ends == [0, 3, 9]
    assert answerer._cut([5, 6, 3, 7, 0]).ids == [5, 6]
    assert answerer._cut([5, 6, 3]).finished
    assert not answerer._cut([5, 6, 7]).finished


def test_unfinished_answers_are_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = BatchGenerator.answer

    def every_other(self: BatchGenerator, prompts: Any, keys: Any) -> Any:
        found = original(self, prompts, keys)
        return [type(a)(a.ids, int(key, 16) % 2 == 0) for a, key in zip(found, keys, strict=True)]

    monkeypatch.setattr(BatchGenerator, "answer", every_other)
    config = ALL.model_copy(update={"keep_unfinished": False})
    out = generate(place / "model", data(place), tmp_path / "out", config, options())
    ids = [row["id"] for row in rows_of(out)]
    assert 0 < len(ids) < 9
    assert all(int(key, 16) % 2 == 0 for key in ids)


def test_answers_are_in_the_split_of_their_prompts_rows(place: Path, tmp_path: Path) -> None:
    """Whatever was said: so no prompt that is measured on is trained on."""
    rows = [{"prompt": f"Say {n}.", "completion": "Well."} for n in range(40)]
    write_rows(tmp_path / "many.jsonl", rows)
    blend = data_of(tmp_path / "many.jsonl")
    splits = {str(row["prompt"]): split_of(read_row(row, "here").text, blend) for row in rows}
    config = GREEDY.model_copy(update={"max_new_tokens": 1})
    out = generate(place / "model", blend, tmp_path / "all", config, options(40))
    for row in rows_of(out):
        passage = read_row(row, "here")
        prompt = row["messages"][0]["content"]
        assert split_of(passage.text, blend, passage.split_at) == splits[prompt]
    config = config.model_copy(update={"split": "train"})
    out = generate(place / "model", blend, tmp_path / "train", config, options(40))
    train = [row["messages"][0]["content"] for row in rows_of(out)]
    assert train == [prompt for prompt, split in splits.items() if split == "train"]
    again = data_of(out)
    with pytest.raises(UserError, match="too little text"):
        build_sequences(again, tiny_tokenizer(), "heldout", 1)
    assert build_sequences(again, tiny_tokenizer(), "train", 2).scored_tokens > 0


def test_without_a_template_prompts_are_continued() -> None:
    row = {"prompt": "The capital of France is", "completion": "Paris."}
    prompt = read_prompt(row, "here", 0, with_template=False)
    ids = prompt.ids(tiny_tokenizer(chat_template=None))
    assert tiny_tokenizer().decode(ids) == "The capital of France is\n"
    again = read_row(prompt.answered("Rome"), "there")
    assert again.text == "The capital of France is\nRome"
    assert again.prompt == len("The capital of France is\n")
    bare = read_prompt({"question": "Who?"}, "here", 0, with_template=True)
    assert bare.messages == [{"role": "user", "content": "Who?"}]


def test_a_plain_prompt_can_be_continued_in_spite_of_a_template(
    place: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "turn on the light\\n"}\n')
    config = ALL.model_copy(update={"chat_template": False, "greedy": True})
    out = generate(place / "model", data_of(tmp_path / "prompts.jsonl"), tmp_path / "out", config)
    (row,) = rows_of(out)
    checkpoint = Checkpoint(place / "model")
    tokenizer = checkpoint.tokenizer()
    ids = torch.tensor([tokenizer("turn on the light\n")["input_ids"]])
    alone = checkpoint.model(torch.float32).generate(
        ids, do_sample=False, max_new_tokens=NEW, pad_token_id=1
    )
    expected = tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
    assert (row["prompt"], row["completion"]) == ("turn on the light\n", expected)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": " \n", "completion": "x"}, "the prompt is empty"),
        ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the prompt is empty"),
        ({"text": "Only text."}, "which are no prompt"),
        ({"prompt": 3}, "`prompt` is of type int"),
    ],
)
def test_rows_without_a_prompt_are_refused(
    place: Path, tmp_path: Path, row: Any, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Well?"}, row])
    out = tmp_path / "out"
    given = ["generate", place / "model", "--data", path, "--split", "all", "--out", out]
    said = refused(capsys, *given)
    assert told in said
    assert "row 2" in said
    assert not out.exists()
    assert not (tmp_path / ".out.partial").exists()


def test_what_else_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["generate", place / "model", "--data", place / "prompts.jsonl"]
    assert "a folder" in refused(capsys, *given, "--out", tmp_path / "x.jsonl")
    long = refused(capsys, *given, "--out", tmp_path / "x", "--max-new-tokens", 256, at_once=False)
    assert "max_new_tokens 256: " in long and "256 positions; give at most 255" in long
    some = [*given, "--split", "all", "--max-new-tokens", 1, "--greedy"]
    ended = refused(capsys, *some, "--out", tmp_path / "x", at_once=False)
    assert "none of 9 answers ended within 1 tokens" in ended
