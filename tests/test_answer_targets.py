"""Stored log-probabilities of answers as the teacher's distributions."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from test_answers import write_prompts
from tiny_distillation import CONFIG, OPTIONS, held_out, rows_of, write_place
from tiny_folders import data_of, write_text
from tiny_job import DISTILL, PROFILE, PRUNE, recipe_fields
from tiny_job import write_model as write_job_model
from tiny_tokenizer import SENTENCES

from regrow.checkpoint import Checkpoint
from regrow.config import parse
from regrow.data import DataConfig
from regrow.data.documents import read_row, tokenize
from regrow.data.sequences import IGNORED, Sequences, build_sequences
from regrow.errors import UserError
from regrow.recipe.recipe import Recipe, check
from regrow.stages.distill import estimate
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.stage import distill
from regrow.stages.distill.student import Student
from regrow.training.answer_targets import (
    ANSWERS,
    TOP_LOGPROBS,
    AnswerTargets,
    _keys,
    _places,
    _Vocabulary,
)
from regrow.training.cache.sparse import PADDING
from regrow.training.teacher import Teacher

TOP = 6
SPELLINGS = ("as in the vocabulary", "as text")
Row = dict[str, Any]


def write_answers(folder: Path, teacher: Path, spelling: str, count: int = 60) -> Path:
    """Answers of a teacher on a server: here the sentences, with its float64 probabilities."""
    folder.mkdir()
    checkpoint = Checkpoint(teacher)
    model, tokenizer = checkpoint.model(torch.float64), checkpoint.tokenizer()
    answers, scored = [], []
    for number in range(count):
        said = f"{number} {SENTENCES[number % 3]}"
        turns = [{"role": "user", "content": f"Say {number}!"}, {"role": "assistant"}]
        row: Row = {"id": f"{number}", "messages": [turns[0], {**turns[1], "content": said}]}
        (document,) = tokenize([read_row(row, "")], tokenizer)
        with torch.no_grad():
            log_p_TV = model(torch.tensor([document.ids])).logits[0].log_softmax(-1)
        entries = []
        for at, own in enumerate(document.scored):
            if own:
                values, ids = log_p_TV[at - 1].topk(TOP)
                top = [[i, float(v)] for i, v in zip(ids.tolist(), values, strict=True)]
                logprob = float(log_p_TV[at - 1, document.ids[at]])
                entries.append({"token": document.ids[at], "logprob": logprob, "top": top})
        for entry in entries:
            entry["token"] = spelled(entry["token"], tokenizer, spelling)
            entry["top"] = [[spelled(i, tokenizer, spelling), v] for i, v in entry["top"]]
        answers.append(row)
        scored.append({"id": row["id"], "tokens": entries})
    for name, rows in ((ANSWERS, answers), (TOP_LOGPROBS, scored)):
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def spelled(number: int, tokenizer: Any, spelling: str) -> str:
    """A token as a local model (`ĠParis`) or a server (` Paris`) names it."""
    if spelling == SPELLINGS[0]:
        return str(tokenizer.convert_ids_to_tokens(number))
    return str(tokenizer.decode([number], clean_up_tokenization_spaces=False))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_place(tmp_path_factory.mktemp("targets") / "place")
    for spelling in SPELLINGS:
        write_answers(place / spelling, place / "teacher", spelling)
    return place


def sequences_of(folder: Path, tokenizer: Any) -> Sequences:
    data = DataConfig(
        sources=[str(folder)],  # type: ignore[list-item]
        sequence_length=44,
        heldout_fraction=0.2,
        calibration_fraction=0.2,
    )
    return build_sequences(data, tokenizer, "train", 24)


def targets_of(place: Path, spelling: str) -> AnswerTargets:
    checkpoint = Checkpoint(place / "teacher")
    return AnswerTargets(place / spelling, checkpoint.tokenizer(), checkpoint.config["vocab_size"])


def slow_rows(place: Path, sequences: Sequences) -> list[tuple[int, dict[int, float], bool]]:
    """Each scored token, the teacher's largest probabilities there, and whether all of the document
    before it is in the sequence: by a run over each document alone.
    """
    model, rows = Checkpoint(place / "teacher").model(torch.float64), []
    start_of_turn = Checkpoint(place / "teacher").tokenizer().convert_tokens_to_ids("<|im_start|>")
    for sequence in (sequences[n] for n in range(len(sequences))):
        ids, labels = sequence["input_ids"], sequence["labels"].tolist()
        starts = (sequence["position_ids"] == 0).nonzero().flatten().tolist()
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            with torch.no_grad():
                p_TV = model(ids[None, first:end]).logits[0].softmax(-1)
            whole = int(ids[first]) == start_of_turn and "user" in chat_of(place, ids[first:end])
            for at in range(first + 1, end):
                if labels[at] == IGNORED:
                    continue
                p_V = p_TV[at - 1 - first]
                known = {int(i): float(p_V[i]) for i in p_V.topk(TOP).indices}
                known[labels[at]] = float(p_V[labels[at]])
                rows.append((labels[at], known, whole))
    return rows


def chat_of(place: Path, ids: torch.Tensor) -> str:
    return str(Checkpoint(place / "teacher").tokenizer().decode(ids))[:20]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_targets_are_the_teachers_probabilities_of_the_packed_text(
    place: Path, spelling: str
) -> None:
    """The tokens of a document that is longer than a sequence are learned as text in its rest."""
    sequences = sequences_of(place / spelling, Checkpoint(place / "teacher").tokenizer())
    targets = targets_of(place, spelling)
    batch = next(sequences.batches(len(sequences)))
    sparse, expected = targets.sparse(batch), slow_rows(place, sequences)
    assert len(sparse.ids_NK) == len(expected) > 400
    assert sparse.tail_N is not None
    dropped = 0
    for row, (own, known, whole) in enumerate(expected):
        given = zip(sparse.ids_NK[row].tolist(), sparse.probability_NK[row].tolist(), strict=True)
        found = {i: p for i, p in given if i != PADDING}
        if not whole:
            assert found == {own: 1.0}
            continue
        assert own in found
        dropped += len(known) - len(found)
        for number, probability in found.items():
            assert probability == pytest.approx(known[number], abs=1e-6)
        assert float(sparse.tail_N[row]) == pytest.approx(1 - sum(found.values()), abs=1e-6)
    share = sum(whole for *_, whole in expected) / len(expected)
    assert targets.coverage(sequences) == pytest.approx(share)
    assert 0.5 < share < 1
    # Parts of characters have no text of their own, so a server's names do not tell them apart.
    assert dropped == 0 if spelling == SPELLINGS[0] else 0 < dropped < TOP * len(expected)


@pytest.mark.parametrize("other", ["Ġthe", "Ġnone of the tokens"])
def test_what_follows_another_token_is_left_out(place: Path, tmp_path: Path, other: str) -> None:
    """Its own distribution is not: the text before it is the same."""
    (tmp_path / "changed").mkdir()
    for name in (ANSWERS, TOP_LOGPROBS):
        lines = (place / SPELLINGS[0] / name).read_text().splitlines()[:1]
        row = json.loads(lines[0])
        if name == TOP_LOGPROBS:
            row["tokens"][3]["token"] = other
        (tmp_path / "changed" / name).write_text(json.dumps(row) + "\n")
    checkpoint = Checkpoint(place / "teacher")
    vocabulary = checkpoint.config["vocab_size"]
    found = AnswerTargets(tmp_path / "changed", checkpoint.tokenizer(), vocabulary)
    assert len(found.read().keys_N) == 4
    assert len(targets_of(place, SPELLINGS[0]).read().keys_N) > 60 * 4


def slow_targets(folder: Path, tokenizer: Any, size: int) -> dict[int, dict[int, float]]:
    """The distributions by their keys: all rows at once, each distribution a dict."""
    answers, scored = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in (ANSWERS, TOP_LOGPROBS)
    )
    said = {row["id"]: row["tokens"] or [] for row in scored}
    vocabulary, found = _Vocabulary(tokenizer), dict[int, dict[int, float]]()
    for row in answers:
        if said.get(row["id"]):
            (document,) = tokenize([read_row(row, "")], tokenizer)
            keys = list(_keys(document.ids, range(len(document.ids))))
            for at, known in _places(document, said[row["id"]], vocabulary, size):
                found[keys[at]] = known
    return found


def test_files_are_read_row_by_row_into_the_same_arrays(place: Path, tmp_path: Path) -> None:
    """In any order, with rows that the other file lacks, and of equal texts the later one."""
    answers, scored = (
        [json.loads(line) for line in (place / SPELLINGS[0] / name).read_text().splitlines()]
        for name in (ANSWERS, TOP_LOGPROBS)
    )
    again = [{**row, "id": f"again {row['id']}"} for row in answers[:9]]
    likelier: list[Row] = [
        {"id": row["id"], "tokens": [{**each, "logprob": -0.01} for each in scored[n]["tokens"]]}
        for n, row in enumerate(again)
    ]
    scored[3]["tokens"] = scored[4]["tokens"] = None
    random.Random(0).shuffle(scored)
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = {ANSWERS: [*answers[:40], *again], TOP_LOGPROBS: [*likelier, *scored[:50], likelier[2]]}
    for name, each in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in each))
    checkpoint = Checkpoint(place / "teacher")
    given = (checkpoint.tokenizer(), checkpoint.config["vocab_size"])
    found, expected = AnswerTargets(folder, *given).read(), slow_targets(folder, *given)
    assert found.keys_N.tolist() == sorted(expected)
    assert len(expected) > 300
    assert (
        max(map(len, expected.values())) == found.ids_NK.shape[1] > min(map(len, expected.values()))
    )
    for row, known in enumerate(map(expected.__getitem__, sorted(expected))):
        rest = found.ids_NK.shape[1] - len(known)
        assert found.ids_NK[row].tolist() == [*known, *[PADDING] * rest]
        values = torch.tensor([*known.values(), *[0.0] * rest])
        assert torch.equal(found.probability_NK[row], values)


def test_reading_takes_little_memory(place: Path, tmp_path: Path) -> None:
    """A few times the arrays that are kept, at most; as lists and dicts it was thirty times."""
    folder, copies = tmp_path / "many", 8
    folder.mkdir()
    for name in (ANSWERS, TOP_LOGPROBS):
        text = (place / SPELLINGS[0] / name).read_text()
        with (folder / name).open("w") as file:
            for copy in range(copies):
                each = text.replace("Say ", f"Say {copy} ").replace('"id": "', f'"id": "{copy}-')
                file.write(each)
    checkpoint = Checkpoint(place / "teacher")
    tokenizer = checkpoint.tokenizer()
    tracemalloc.start()
    stored = AnswerTargets(folder, tokenizer, checkpoint.config["vocab_size"]).read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = stored.keys_N.nbytes + stored.ids_NK.nbytes + stored.probability_NK.nbytes
    assert len(stored.keys_N) > copies * 400
    assert peak < 10 * arrays


def test_a_complete_stage_and_a_dry_run_do_not_read_the_log_probabilities(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(write_text(tmp_path / "text.jsonl"), sequence_length=64)
    fields = {"answers": str(place / SPELLINGS[0]), "answer_targets": "top_logprobs"}
    config = CONFIG.model_copy(update={**fields, "tokens": 256})
    given = (place / "pruned", place / "teacher", data)
    out = distill(*given, tmp_path / "out", config, OPTIONS)
    monkeypatch.setattr(AnswerTargets, "read", lambda _: pytest.fail("reads the answers"))
    assert distill(*given, out, config, OPTIONS) == out
    teacher = Checkpoint(place / "teacher")
    lines = estimate(Student(Checkpoint(place / "pruned")), teacher, data, config, OPTIONS)
    assert "2 steps of 128 tokens" in lines[0]
    lacking = folder_without(place, tmp_path, TOP_LOGPROBS)
    config = config.model_copy(update={"answers": str(lacking)})
    with pytest.raises(UserError, match=r"has no top_logprobs\.jsonlines"):
        estimate(Student(teacher), teacher, data, config, OPTIONS)


def test_frozen_layers_run_in_the_student_where_the_teacher_does_not(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Even if they are the teacher's, as in this student that is the teacher itself."""
    data = data_of(write_text(tmp_path / "text.jsonl"), sequence_length=64)
    fields = {"answers": str(place / SPELLINGS[0]), "answer_targets": "top_logprobs"}
    config = CONFIG.model_copy(update={**fields, "tokens": 256, "freeze_layers": 1})
    teacher = place / "teacher"
    out = distill(teacher, teacher, data, tmp_path / "out", config, OPTIONS)
    assert "run once for both" not in capsys.readouterr().err
    before, after = Checkpoint(teacher), Checkpoint(out)
    for name in before.names():
        fixed = ".layers.0." in name or "embed" in name
        assert torch.equal(before.tensor(name), after.tensor(name)) == fixed, name


def test_a_distillation_learns_the_stored_distributions(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The teacher does not run in training, and is still what the student is measured by."""
    reads, hidden = [], Teacher.hidden

    def counted(self: Teacher, batch: Any, *given: Any, **named: Any) -> Any:
        reads.append(len(batch["input_ids"]))
        return hidden(self, batch, *given, **named)

    monkeypatch.setattr(Teacher, "hidden", counted)
    data = data_of(write_text(tmp_path / "text.jsonl"), sequence_length=64)
    given = (place / "pruned", place / "teacher", data)
    base = CONFIG.model_copy(update={"answers": str(place / SPELLINGS[0]), "tokens": 32 * 128})
    config = base.model_copy(update={"answer_targets": "top_logprobs"})
    stored = distill(*given, tmp_path / "stored", config, OPTIONS)
    at_measurements = sum(reads)
    assert 0 < at_measurements <= len(held_out(stored)) * CONFIG.heldout_sequences
    distill(*given, tmp_path / "read", base, OPTIONS)
    assert sum(reads) == 2 * at_measurements + 32 * 128 // 64  # each training sequence once
    losses = [row["forward_kl"] for row in rows_of(stored) if "loss" in row]
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def folder_without(place: Path, tmp_path: Path, name: str) -> Path:
    folder = tmp_path / "lacking"
    folder.mkdir()
    for other in {ANSWERS, TOP_LOGPROBS} - {name}:
        (folder / other).write_text((place / SPELLINGS[0] / other).read_text())
    return folder


def test_a_folder_without_fitting_log_probabilities_is_refused(place: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(place / "teacher")
    given = (checkpoint.tokenizer(), checkpoint.config["vocab_size"])
    folder = folder_without(place, tmp_path, TOP_LOGPROBS)
    with pytest.raises(UserError, match=r"has no top_logprobs\.jsonlines: generate"):
        AnswerTargets(folder, *given)
    (folder / TOP_LOGPROBS).write_text('{"id": "0", "tokens"\n')
    with pytest.raises(UserError, match=r"top_logprobs.jsonlines is broken"):
        AnswerTargets(folder, *given)
    foreign = {"token": "Zürich", "logprob": -0.1, "top": [["Zürich", -0.1], ["Bern", -3.0]]}
    (folder / TOP_LOGPROBS).write_text(json.dumps({"id": "0", "tokens": [foreign]}) + "\n")
    with pytest.raises(UserError, match="no token of the answers is a token of this model"):
        AnswerTargets(folder, *given).read()
    with (folder / TOP_LOGPROBS).open("a") as file:
        file.write('{"id": "1", "tokens"\n')
    with pytest.raises(UserError, match=r"top_logprobs.jsonlines is broken"):
        AnswerTargets(folder, *given).read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answers": None}, "there are no answers"),
        ({"losses": {"reverse_kl": 1.0}}, "the loss reverse_kl needs all of the teacher's logits"),
        ({"temperature": 2.0}, "temperature 2 needs all of the teacher's logits"),
        (
            {"on_policy_share": 0.5, "on_policy_new_tokens": 8, "on_policy_prompt_tokens": 8},
            "with on_policy_share 0.5",
        ),
        ({"own_answers": "own"}, "with own_answers"),
        ({"feature_losses": {"hidden": 1.0}}, "with feature_losses"),
    ],
)
def test_what_needs_the_whole_distribution_is_refused(
    place: Path, tmp_path: Path, fields: Row, message: str
) -> None:
    given = {"answers": str(place / SPELLINGS[0]), "answer_targets": "top_logprobs", **fields}
    config = parse(DistillConfig, {**CONFIG.model_dump(exclude_defaults=True), **given}, "config")
    data = data_of(write_text(tmp_path / "text.jsonl"))
    with pytest.raises(UserError, match=message) as caught:
        distill(place / "pruned", place / "teacher", data, tmp_path / "out", config, OPTIONS)
    assert "\n" not in str(caught.value)


def test_a_recipe_needs_log_probabilities_of_the_stage_before(tmp_path: Path) -> None:
    write_job_model(tmp_path / "model")
    text = write_prompts(tmp_path / "prompts.jsonl")
    learn = {"distill": {**DISTILL["distill"], "answer_targets": "top_logprobs"}}
    for stored in (0, 5):
        answer = {"generate": {"by": "teacher", "max_new_tokens": 8, "top_logprobs": stored}}
        fields = recipe_fields(tmp_path / "model", text, PROFILE, PRUNE, answer, learn)
        recipe = parse(Recipe, fields, "recipe")
        if stored:
            check(recipe, OPTIONS)
        else:
            with pytest.raises(UserError, match="give it top_logprobs: 20"):
                check(recipe, OPTIONS)
