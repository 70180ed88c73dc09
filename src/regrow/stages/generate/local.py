"""Answers of a local model, in batches, and the perplexity of answers under it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from regrow.data.documents import read_row, tokenize
from regrow.data.prompts import Prompt
from regrow.runtime import distributed
from regrow.runtime.batch_generator import Answer, BatchGenerator
from regrow.runtime.progress import progress
from regrow.runtime.rows import Row, Rows
from regrow.stages.generate.endpoint import scored_token

Asked = list[tuple[Prompt, list[int]]]


def answer_locally(
    rows: Rows,
    generator: BatchGenerator,
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
            answers = generator.answer([ids for _, ids in batch], keys)
            done = [
                _row(key, len(ids), answer, tokenizer)
                for key, (_, ids), answer in zip(keys, batch, answers, strict=True)
            ]
            rows.append(done)
            tokens += sum(row["tokens"] for row in done) * distributed.world_size()
            rate = tokens / max(counter.seconds(), 1e-9)
            counter.advance(len(batch) * distributed.world_size(), f"{rate:,.0f} tokens/s")


def _row(key: str, read: int, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> Row:
    text = tokenizer.decode(
        answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    row: Row = {"id": key, "answer": text, "finished": answer.finished}
    row |= {"tokens": len(answer.written), "read": read}
    if answer.scored is not None:
        row["scored"] = [
            scored_token(
                _token(tokenizer, each.id),
                round(each.logprob, 5),
                [(_token(tokenizer, i), round(value, 5)) for i, value in each.top],
            )
            for each in answer.scored
        ]
    return row


def _token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The token as in the vocabulary; an id without a token has a name that no token has."""
    return str(tokenizer.convert_ids_to_tokens(token) or f"<no token {token}>")


def _batches(todo: Asked, size: int) -> Iterator[Asked]:
    by_length = sorted(todo, key=lambda pair: -len(pair[1]))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]


@torch.inference_mode()
def judge(
    rows: Rows,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[dict[str, Any]],
    total: int,
) -> None:
    """Write {id, perplexity}: exp of the mean −log p of an answer's tokens, given its prompt."""
    with progress("judging answers", total, "answers") as counter:
        counter.resume_at(total - len(answered))
        for row in answered[distributed.rank() :: distributed.world_size()]:
            (document,) = tokenize([read_row(row, str(row["id"]))], tokenizer)
            ids = torch.tensor([document.ids], device=model.device)
            first = next((at for at, own in enumerate(document.scored) if own and at), None)
            if first is None:
                continue
            keep = len(document.ids) - first + 1
            logits_TV = model(input_ids=ids, logits_to_keep=keep).logits[0, :-1].float()
            loss_T = functional.cross_entropy(logits_TV, ids[0, first:], reduction="none")
            own_T = torch.tensor(document.scored[first:], device=loss_T.device)
            rows.append([{"id": row["id"], "perplexity": math.exp(float(loss_T[own_T].mean()))}])
            counter.advance(distributed.world_size())
