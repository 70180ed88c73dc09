"""The generate stage reads a model and prompts, and writes rows of prompts with its answers.

During the run it writes a line per answered prompt, so that a killed run can continue.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.licence import ONLY_DERIVED, Licence, licence_of
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.blend import check_ids, embedding_rows
from regrow.data.prompts import Prompt, prompts
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.runtime import distributed, vllm_server
from regrow.runtime.progress import Progress, say
from regrow.runtime.rows import Row, Rows, line
from regrow.stage_dir import Figure, StageDir, digest, refuse_input, require_space
from regrow.stages.generate import GenerateConfig, check
from regrow.stages.generate.keep import diverse, fault, plain
from regrow.stages.generate.local import Asked
from regrow.stages.generate.work import Work
from regrow.training.answer_targets import ANSWERS, TOP_LOGPROBS
from regrow.training.cache.folder import tokenizer_fingerprint


def generate(
    model: str | Path | Checkpoint,
    data: DataConfig | None,
    out: str | Path,
    config: GenerateConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Let `model` answer the prompts of `data`; write `answers.jsonl`, which can be used as data.

    Without `data` the model writes `self_prompts` prompts itself. With an `endpoint` its answers
    replace those of `model`, which vLLM runs with `backend` vllm. A plain prompt is a user's turn
    if the tokenizer has a chat template; otherwise it is continued. Every prompt begins with BOS if
    the tokenizer puts it before any text. Rows are in the prompts' order, for all batch sizes. An
    interrupted run continues; several processes share the prompts.
    Raises UserError for missing or empty prompts, for a token id beyond the model's embedding, for
    an endpoint that gives no answers, and if no answer is kept.
    """
    out, config, options = Path(out), config or GenerateConfig(), options or Options()
    check(config, data is not None)
    named = str(model.folder if isinstance(model, Checkpoint) else model)
    licence = licence_for(config, named)
    checkpoint = model if isinstance(model, Checkpoint) else load(model, quantized=True)
    check_out(out)
    refuse_input(out, checkpoint.folder)
    work = Work(checkpoint, checkpoint.tokenizer(), config, options)
    stage = _stage(out, config, inputs_of(checkpoint, work.tokenizer, data, config))
    if stage.complete:
        say(f"generate: {out} is complete and unchanged")
        return out
    asked = [] if data is None else ask(data, config, checkpoint, work.tokenizer)
    read = sum(len(ids) for _, ids in asked)
    count = len(asked) or config.self_prompts
    require_space(out, (16 + 40 * config.top_logprobs) * (read + count * config.max_new_tokens))
    with stage as folder:
        if data is None:
            asked = work.self_written(folder)
        work.answer(folder, asked)
        perplexities = work.judge(folder, asked)
        distributed.wait()
        if distributed.is_main():
            _finish(stage, folder, [prompt for prompt, _ in asked], perplexities)
            stage.extra["answered_by"] = work.answered_by(named, licence)
    return out


def _stage(out: Path, config: GenerateConfig, inputs: dict[str, str]) -> StageDir:
    # These fields only select the answers to write, or say how to ask, so earlier answers stay.
    names = (
        *("limit", "keep_unfinished", "min_new_tokens", "max_repetition", "max_perplexity"),
        *("languages", "select", "licence", "accept_licence", "request_timeout", "max_attempts"),
        *("api_key_variable", "endpoint"),
    )
    fields = GenerateConfig.model_fields
    same = config.model_copy(update={name: fields[name].default for name in names})
    resume = StageDir(out, "generate", same, inputs).digest
    return StageDir(out, "generate", config, inputs, resumable=True, resume_digest=resume)


def inputs_of(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig | None,
    config: GenerateConfig,
) -> dict[str, str]:
    """Hashes of the inputs on which the answers depend, besides the config."""
    inputs = {
        "model": checkpoint.fingerprint,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": digest(tokenizer.chat_template),
    }
    if config.endpoint is not None:
        inputs["endpoint"] = config.served_model or config.endpoint
    if config.backend == "vllm":
        inputs["vllm options"] = digest(vllm_server.options())
    return inputs if data is None else {**inputs, "data": data_digest(data)}


def check_out(out: Path) -> None:
    """Raise UserError for a name that looks like a file name."""
    if out.suffix in (".jsonl", ".json"):
        raise UserError(
            f"{out} looks like a file: give --out a folder; the rows go to {ANSWERS} in it, and "
            "the folder itself can be given as --data"
        )


def licence_for(config: GenerateConfig, model: str) -> Licence:
    """The licence of the answers, as the config or the files of the answering model say.

    Raises UserError for one that limits what may be trained on answers, unless it was accepted.
    """
    if config.licence is not None:
        licence = Licence(config.licence, "given")
    else:
        licence = Licence() if config.endpoint is not None else licence_of(model)
    if licence.id in ONLY_DERIVED and not config.accept_licence:
        raise UserError(
            f"licence {licence}: only models that are derived from this one may be trained on its "
            "answers; if yours is, set accept_licence"
        )
    return licence


def ask(
    data: DataConfig,
    config: GenerateConfig,
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
) -> Asked:
    """The distinct prompts with their token ids; too long ones are skipped, with a warning.

    Prompts that differ only in case and white space count as the same. An endpoint
    says itself what is too long. Raises UserError if there is no prompt, and for a token id beyond
    the model's embedding.
    """
    positions = int(checkpoint.config.get("max_position_embeddings") or 1 << 30)
    local, known, asked = config.endpoint is None, set[str](), Asked()
    room = positions - config.max_new_tokens
    long, counter = 0, Progress("reading prompts", config.limit or 0, "prompts")
    template = bool(config.chat_template and tokenizer.chat_template)
    for prompt in islice(prompts(data, config.split, template), config.limit):
        ids = prompt.ids(tokenizer)
        if local:
            check_ids(ids, tokenizer, embedding_rows(checkpoint), checkpoint.folder)
        long += local and len(ids) > room
        same = plain(prompt.shown)
        if (len(ids) <= room or not local) and same not in known:
            known.add(same)
            asked.append((prompt, ids))
        counter.advance(1)
    if long and room < 1:
        raise UserError(
            f"max_new_tokens {config.max_new_tokens}: {checkpoint.folder} has {positions} "
            f"positions; give at most {positions - 1}"
        )
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
    return asked


def _finish(
    stage: StageDir, folder: Path, asked: list[Prompt], perplexities: dict[str, float]
) -> None:
    """Write the answers that are kept, in the prompts' order."""
    config, answers = stage.config, Rows(folder).read()
    assert isinstance(config, GenerateConfig)
    rows = [answers[prompt.key] for prompt in asked]
    faults = [fault(row, config, perplexities.get(row["id"])) for row in rows]
    kept = [n for n, reason in enumerate(faults) if reason is None]
    left_out = Counter(reason for reason in faults if reason is not None)
    if config.select is not None:
        texts = [f"{asked[n].shown}\n{rows[n]['answer']}" for n in kept]
        chosen = diverse(texts, config.select)
        left_out["like others"] = len(kept) - len(chosen)
        kept = [kept[n] for n in chosen]
    if not kept:
        raise UserError(_none_kept(rows, left_out, config))
    with (folder / ANSWERS).open("w", encoding="utf-8") as file:
        file.writelines(line(asked[n].answered(rows[n]["answer"])) for n in kept)
    if config.top_logprobs:
        with (folder / TOP_LOGPROBS).open("w", encoding="utf-8") as file:
            file.writelines(
                line({"id": rows[n]["id"], "tokens": rows[n].get("scored")}) for n in kept
            )
    for name in ("done", "prompts", "judged"):
        Rows(folder, name).remove()
    stage.extra["left_out"] = dict(left_out)
    stage.figures += _figures(rows, len(kept))
    finished = sum(row["finished"] for row in rows)
    reasons = "".join(f", {count:,} {reason}" for reason, count in left_out.items() if count)
    say(f"generate: {len(kept):,} answers written, {finished:,} of {len(rows):,} finished{reasons}")


def _none_kept(rows: list[Row], left_out: Counter[str], config: GenerateConfig) -> str:
    if left_out["unfinished"] == len(rows):
        return (
            f"none of {len(rows)} answers ended within {config.max_new_tokens} tokens: raise "
            "max_new_tokens, or set keep_unfinished"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    said = next((f" ({row['error']})" for row in rows if row.get("error")), "")
    return f"none of {len(rows)} answers is kept: {reasons}{said}; loosen what leaves them out"


def _figures(rows: list[Row], written: int) -> list[Figure]:
    finished = sum(row["finished"] for row in rows)
    return [
        Figure(name="prompts", value=len(rows)),
        Figure(name="answers", value=written, convention="written"),
        Figure(name="finished", value=finished / len(rows), unit="share", n=len(rows)),
        Figure(
            name="tokens",
            value=sum(row["tokens"] for row in rows),
            unit="tokens",
            convention="generated",
        ),
        Figure(
            name="prompt tokens",
            value=sum(row["read"] for row in rows),
            unit="tokens",
            convention="read",
        ),
    ]
