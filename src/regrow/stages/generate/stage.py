"""The generate stage reads a model and prompts, and writes rows of prompts with its answers.

During the run it writes a line per answered prompt, so that a killed run can continue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.blend import check_ids, embedding_rows
from regrow.data.prompts import Prompt, prompts
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.progress import Progress, progress, say
from regrow.stage_dir import Figure, StageDir, digest, refuse_input, require_space
from regrow.stages.generate import GenerateConfig
from regrow.training.cache.folder import tokenizer_fingerprint

Row = dict[str, Any]


def read(folder: Path) -> dict[str, Row]:
    """Read the rows {id, answer, finished, tokens} of all processes; skips incomplete lines.

    Returns them by the prompt's key.
    """
    rows: dict[str, Row] = {}
    for path in sorted(folder.glob("done-*.jsonl")):
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.endswith("\n"):
                    row = json.loads(line)
                    rows[row["id"]] = row
    return rows


def tidy(folder: Path) -> None:
    """Write all rows to one file, so that no row is appended to an incomplete line."""
    rows = read(folder)
    partial = folder / "done.partial"
    partial.write_text("".join(map(line, rows.values())), encoding="utf-8")
    partial.replace(folder / "done-0.jsonl")
    for path in folder.glob("done-*.jsonl"):
        if path.name != "done-0.jsonl":
            path.unlink()


def append(folder: Path, rows: list[Row]) -> None:
    """Add the rows of a batch to this process's file."""
    with (folder / f"done-{distributed.rank()}.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(map(line, rows)))


def line(row: Row) -> str:
    """A row as a JSON line."""
    return json.dumps(row, ensure_ascii=False) + "\n"


ANSWERS = "answers.jsonl"
Asked = list[tuple[Prompt, list[int]]]


def generate(
    model: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: GenerateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Let `model` answer the prompts of `data`; write `answers.jsonl`, which can be used as data.

    A plain prompt is a user's turn if the tokenizer has a chat template; otherwise it is continued.
    Every prompt begins with BOS if the tokenizer puts it before any text. Rows are in the prompts'
    order, for all batch sizes. An interrupted run continues; several processes share the prompts.
    Raises UserError for missing or empty prompts, for a token id beyond the model's embedding, and
    if no answer was finished.
    """
    out, config, options = Path(out), config or GenerateConfig(), options or Options()
    device = options.torch_device()
    checkpoint = model if isinstance(model, Checkpoint) else load(model, quantized=True)
    check_out(out)
    refuse_input(out, checkpoint.folder)
    tokenizer = checkpoint.tokenizer()
    stage = _stage(out, config, inputs_of(checkpoint, tokenizer, data))
    if stage.complete:
        say(f"generate: {out} is complete and unchanged")
        return out
    asked = ask(data, config, checkpoint, tokenizer)
    require_space(out, 16 * sum(len(ids) + config.max_new_tokens for _, ids in asked))
    distributed.join(cpu=device.type == "cpu")
    with stage as folder:
        if distributed.is_main():
            tidy(folder)
        distributed.wait()
        known = read(folder)
        distributed.wait()  # before anything is written, so that all ranks see the same work
        todo = [(prompt, ids) for prompt, ids in asked if prompt.key not in known]
        if todo:
            loaded = checkpoint.model(checkpoint.compute_dtype(), device)
            answerer = BatchGenerator(loaded, tokenizer, sampling_of(config))
            _answer(folder, answerer, tokenizer, todo, len(asked), options.batch_size)
        distributed.wait()
        if distributed.is_main():
            _finish(stage, folder, [prompt for prompt, _ in asked])
    return out


def _stage(out: Path, config: GenerateConfig, inputs: dict[str, str]) -> StageDir:
    # These fields only select the answers to write, so earlier answers stay valid.
    same = config.model_copy(update={"limit": None, "keep_unfinished": False})
    resume = StageDir(out, "generate", same, inputs).digest
    return StageDir(out, "generate", config, inputs, resumable=True, resume_digest=resume)


def sampling_of(config: GenerateConfig) -> Sampling:
    """How the tokens are chosen."""
    return Sampling(
        config.max_new_tokens, config.temperature, config.top_p, config.seed, config.greedy
    )


def inputs_of(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> dict[str, str]:
    """Hashes of the inputs on which the answers depend, besides the config."""
    return {
        "model": checkpoint.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": digest(tokenizer.chat_template),
        "data": data_digest(data),
    }


def check_out(out: Path) -> None:
    """Raise UserError for a name that looks like a file name."""
    if out.suffix in (".jsonl", ".json"):
        raise UserError(
            f"{out} looks like a file: give --out a folder; the rows go to {ANSWERS} in it, and "
            "the folder itself can be given as --data"
        )


def ask(
    data: DataConfig,
    config: GenerateConfig,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
) -> Asked:
    """The distinct prompts with their token ids; too long ones are skipped, with a warning.

    Raises UserError if there is no prompt, and for a token id beyond the model's embedding.
    """
    room = int(checkpoint.config.get("max_position_embeddings") or 1 << 30) - config.max_new_tokens
    asked: dict[str, tuple[Prompt, list[int]]] = {}
    long, counter = 0, Progress("reading prompts", config.limit or 0, "prompts")
    for prompt in islice(prompts(data, config.split, bool(tokenizer.chat_template)), config.limit):
        ids = prompt.ids(tokenizer)
        check_ids(ids, tokenizer, embedding_rows(checkpoint), checkpoint.folder)
        long += len(ids) > room
        if len(ids) <= room:
            asked.setdefault(prompt.key, (prompt, ids))
        counter.advance(1)
    if long:
        say(
            f"generate: {long} prompts are skipped: they are longer than {room} tokens, the room "
            f"that max_new_tokens {config.max_new_tokens} leaves of the model's positions"
        )
    if not asked:
        raise UserError(
            f"no prompt to answer in the {config.split} split: give more prompts, shorter ones, or "
            "--split all"
        )
    return list(asked.values())


def _answer(
    folder: Path,
    answerer: BatchGenerator,
    tokenizer: PreTrainedTokenizerBase,
    todo: Asked,
    total: int,
    batch_size: int,
) -> None:
    """Answer this rank's share of the prompts in batches of similar length, the longest first."""
    tokens = 0
    with progress("generate", total, "answers") as counter:
        counter.resume_at(total - len(todo))
        for batch in list(_batches(todo, batch_size))[
            distributed.rank() :: distributed.world_size()
        ]:
            keys = [prompt.key for prompt, _ in batch]
            answers = answerer.answer([ids for _, ids in batch], keys)
            rows: list[dict[str, Any]] = [
                {
                    "id": key,
                    "answer": tokenizer.decode(
                        answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ),
                    "finished": answer.finished,
                    "tokens": len(answer.ids) + answer.finished,
                }
                for key, answer in zip(keys, answers, strict=True)
            ]
            append(folder, rows)
            tokens += sum(row["tokens"] for row in rows) * distributed.world_size()
            rate = tokens / max(counter.seconds(), 1e-9)
            counter.advance(len(batch) * distributed.world_size(), f"{rate:,.0f} tokens/s")


def _batches(todo: Asked, size: int) -> Iterator[Asked]:
    by_length = sorted(todo, key=lambda pair: -len(pair[1]))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


def _finish(stage: StageDir, folder: Path, asked: list[Prompt]) -> None:
    """Write the answers in the prompts' order."""
    config, answers = stage.config, read(folder)
    assert isinstance(config, GenerateConfig)
    rows = [answers[prompt.key] for prompt in asked]
    whole = sum(row["finished"] for row in rows)
    written = len(rows) if config.keep_unfinished else whole
    if not written:
        raise UserError(
            f"none of {len(rows)} answers ended within {config.max_new_tokens} tokens: raise "
            "max_new_tokens, or set keep_unfinished"
        )
    with (folder / ANSWERS).open("w", encoding="utf-8") as file:
        for prompt, row in zip(asked, rows, strict=True):
            if row["finished"] or config.keep_unfinished:
                file.write(line(prompt.answered(row["answer"])))
    for path in folder.glob("done-*.jsonl"):
        path.unlink()
    tokens = sum(row["tokens"] for row in rows)
    stage.figures += [
        Figure(name="prompts", value=len(rows)),
        Figure(name="answers", value=written, convention="written"),
        Figure(name="finished", value=whole / len(rows), unit="share", n=len(rows)),
        Figure(name="tokens", value=tokens, unit="tokens", convention="generated"),
    ]
    say(f"generate: {written:,} answers written, {whole:,} of {len(rows):,} finished")
