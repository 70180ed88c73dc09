"""The prefer stage: a student, a teacher and prompts in, a better student out.

It writes answers, ranks them, and trains on the pairs. Each part continues after an interruption.
"""

from __future__ import annotations

import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.prompts import prompts
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.plan import copy_plans
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.progress import progress, say
from regrow.runtime.rows import Row, Rows, line
from regrow.stage_dir import Figure, refuse_input, require_space
from regrow.stages.prefer import PreferConfig, require_trl
from regrow.stages.prefer.rank import Pair, pair_of, rank
from regrow.training.shared_tokens import NONE, comparable, shared_ids, teacher_ids
from regrow.training.teacher import place_teacher

PAIRS = "pairs.ndjson"
"""The pairs as text, for a reader of the result."""


def prefer(
    student: str | Path | Checkpoint,
    teacher: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: PreferConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Train `student` by DPO on pairs of its answers to the prompts of `data`; return `out`.

    The teacher ranks the answers to a prompt by their mean log-probability per token. It needs all
    tokens of the student, and may have more (after a vocabulary cut). The best and the worst answer
    make a pair (DPO; Rafailov et al., 2023, arXiv:2305.18290). The student as it was is the
    reference. Writes the pairs as text to `pairs.ndjson`. An interrupted run continues.
    Raises UserError for a teacher that lacks tokens, for prompts that need a chat template where
    there is none, and if no pair is left.
    """
    require_trl()
    out, config, options = Path(out), config or PreferConfig(), options or Options()
    first = student if isinstance(student, Checkpoint) else load(student)
    second = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    refuse_input(out, first.folder, second.folder)
    ids_V = ids_of_teacher(first, second)
    inputs = {"student": first.fingerprint, "teacher": second.fingerprint}
    inputs["data"] = data_digest(data)
    stage = ModelDir(out, "prefer", config, inputs, first, data, teachers=(second,), resumable=True)
    if stage.complete:
        say(f"prefer: {out} is complete and unchanged")
        return out
    asked = questions(data, first, config)
    require_space(out, 12 * 3 * sum(int(first.meta(name).numel()) for name in first.names()))
    with stage as folder:
        answers = _written(folder, first, asked, config, options)
        pairs = _ranked(folder, second, ids_V, asked, answers, config, options)
        from regrow.stages.prefer.dpo import TRAINER, train_pairs

        model, logged = train_pairs(first, pairs, folder, config, options)
        _write(folder, first, pairs, model)
        shutil.rmtree(folder / TRAINER)
        stage.figures += _figures(len(asked), pairs, logged)
        share = _changed(first, folder)
        stage.figures.append(
            Figure(name="weights changed", value=share, convention="share, in the stored dtype")
        )
    return out


def ids_of_teacher(student: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """The teacher's id [V] of each token of the student; None if all ids are equal.

    Raises UserError if the teacher lacks a token that the student may write.
    """
    known = comparable(student, teacher)
    ids_V = teacher_ids(student, teacher) if known else None
    if not known or (ids_V is not None and bool((ids_V == NONE).any())):
        raise UserError(
            f"prefer: the student {student.folder} has tokens that the teacher lacks: the teacher "
            "ranks its answers token by token, so give a teacher that has all of them"
        )
    return ids_V


def questions(data: DataConfig, student: Checkpoint, config: PreferConfig) -> dict[str, list[int]]:
    """The token ids of the distinct prompts by their keys.

    Raises UserError for turns without a chat template, and if no prompt fits.
    """
    tokenizer = student.tokenizer()
    room = int(student.config.get("max_position_embeddings") or 1 << 30) - config.max_new_tokens
    template = config.chat_template and bool(tokenizer.chat_template)
    read = islice(prompts(data, "train", template), config.limit)
    asked = {prompt.key: prompt.ids(tokenizer) for prompt in read}
    fitting = {key: ids for key, ids in asked.items() if len(ids) <= room}
    if not fitting:
        raise UserError(
            f"no prompt of the train split leaves room for max_new_tokens {config.max_new_tokens}: "
            "give more prompts, or shorter ones"
        )
    return fitting


def _written(
    folder: Path,
    student: Checkpoint,
    asked: dict[str, list[int]],
    config: PreferConfig,
    options: Options,
) -> dict[str, Row]:
    """The student's answers by prompt: rows {id, answers: token ids with the end mark}."""
    rows = Rows(folder, "written")
    rows.tidy()
    known = rows.read()
    todo = sorted((key for key in asked if key not in known), key=lambda key: -len(asked[key]))
    if todo:
        device = options.torch_device()
        model = student.model(student.compute_dtype(device), device)
        tokenizer = student.tokenizer()
        sampling = Sampling(
            config.max_new_tokens,
            config.temperature,
            seed=config.seed,
            vocab_size=shared_ids(student, tokenizer),
        )
        generator = BatchGenerator(model, tokenizer, sampling)
        with progress("writing answers", len(asked), "prompts") as counter:
            counter.resume_at(len(asked) - len(todo))
            for start in range(0, len(todo), options.batch_size):
                part = todo[start : start + options.batch_size]
                rows.append(_answers(generator, part, asked, config))
                counter.advance(len(part))
    return rows.read()


def _answers(
    generator: BatchGenerator, keys: list[str], asked: dict[str, list[int]], config: PreferConfig
) -> list[Row]:
    each = [(key, f"{key}/{n}") for key in keys for n in range(config.answers)]
    answers = generator.answer([asked[key] for key, _ in each], [name for _, name in each])
    rows: list[Row] = [{"id": key, "answers": []} for key in keys]
    by_key = {row["id"]: row["answers"] for row in rows}
    for (key, _), answer in zip(each, answers, strict=True):
        if answer.finished or config.keep_unfinished:
            by_key[key].append(answer.written)
    return rows


def _ranked(
    folder: Path,
    teacher: Checkpoint,
    ids_V: Tensor | None,
    asked: dict[str, list[int]],
    answers: dict[str, Row],
    config: PreferConfig,
    options: Options,
) -> list[Pair]:
    """The pairs, in the prompts' order; raises UserError if there is none."""
    rows = Rows(folder, "ranked")
    rows.tidy()
    known = rows.read()
    todo = [key for key in asked if key not in known]
    if todo:
        model = place_teacher(teacher, "whole", options.torch_device())
        with progress("ranking answers", len(asked), "prompts") as counter:
            counter.resume_at(len(asked) - len(todo))
            for key in todo:
                prompt, *given = _as_teacher([asked[key], *answers[key]["answers"]], ids_V)
                scores = rank(model, prompt, given, options.batch_size)
                rows.append([{"id": key, "scores": scores}])
                counter.advance(1)
    scored = rows.read()
    found = [
        pair_of(asked[key], answers[key]["answers"], scored[key]["scores"], config.min_margin)
        for key in asked
    ]
    pairs = [pair for pair in found if pair is not None]
    if not pairs:
        raise UserError(
            f"none of {len(asked)} prompts has two answers that differ by min_margin "
            f"{config.min_margin:g}: lower it, raise max_new_tokens, or set keep_unfinished"
        )
    say(f"prefer: {len(pairs):,} pairs from {len(asked):,} prompts")
    return pairs


def _as_teacher(texts: list[list[int]], ids_V: Tensor | None) -> list[list[int]]:
    """The same tokens by the teacher's ids."""
    return texts if ids_V is None else [ids_V[torch.tensor(ids)].tolist() for ids in texts]


def _write(folder: Path, student: Checkpoint, pairs: list[Pair], model: Any) -> None:
    tokenizer = student.tokenizer()
    with (folder / PAIRS).open("w", encoding="utf-8") as file:
        for pair in pairs:
            ids = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
            texts = {name: tokenizer.decode(each) for name, each in ids.items()}
            file.write(line({**texts, "scores": list(pair.scores)}))
    checkpoints.write_model(model, folder, student)
    copy_plans(student.folder, folder)
    for name in ("written", "ranked"):
        Rows(folder, name).remove()


def _changed(before: Checkpoint, after: Path) -> float:
    """The share of the weights whose stored value is another one than before.

    A small learning rate and few steps are lost in the rounding to a stored bfloat16.
    """
    trained = load(after)
    pairs = ((before.tensor(name), trained.tensor(name)) for name in before.names())
    counts = [(int((one != other).sum()), one.numel()) for one, other in pairs]
    return sum(changed for changed, _ in counts) / sum(size for _, size in counts)


def _figures(prompts: int, pairs: list[Pair], logged: dict[str, float]) -> list[Figure]:
    margin = sum(pair.scores[0] - pair.scores[1] for pair in pairs) / len(pairs)
    convention = "mean of the last tenth of the steps, on pairs that are trained on"
    return [
        Figure(name="prompts", value=prompts),
        Figure(name="pairs", value=len(pairs)),
        Figure(name="margin under the teacher", value=margin, unit="nats/token", n=len(pairs)),
        *(Figure(name=name, value=v, convention=convention) for name, v in logged.items()),
    ]
