"""Answers from an endpoint, for many prompts at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from transformers import PreTrainedTokenizerBase

from regrow.data.prompts import Prompt
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.progress import progress
from regrow.runtime.rows import Row, Rows
from regrow.stages.generate.endpoint import Endpoint, Reply, UnansweredError

FAILURES = 8
"""Prompts in a row without an answer after which the endpoint counts as broken."""


def answer_remotely(
    rows: Rows,
    endpoint: Endpoint,
    tokenizer: PreTrainedTokenizerBase,
    todo: list[Prompt],
    total: int,
    at_once: int,
) -> None:
    """Ask the endpoint for this rank's share of the answers, `at_once` at a time.

    Each answer is written when it arrives. Raises UserError at the end if some prompts have none.
    """
    mine = todo[distributed.rank() :: distributed.world_size()]
    failed, in_a_row, tokens = [], 0, 0
    with progress("generate", total, "answers") as counter:
        counter.resume_at(total - len(todo))
        for prompt, future in _in_flight(endpoint, mine, at_once):
            try:
                row = _row(prompt, future.result(), tokenizer)
                in_a_row = 0
            except UnansweredError as error:
                row = {"id": prompt.key, "answer": "", "finished": False, "error": str(error)}
                row |= {"tokens": 0, "read": 0}
                in_a_row += 1
                if in_a_row >= FAILURES + at_once:
                    raise UserError(
                        _stopped(endpoint, f"{in_a_row} prompts in a row", row)
                    ) from None
                if not error.final:
                    failed.append(row)
                    continue
            rows.append([row])
            tokens += row["tokens"] * distributed.world_size()
            rate = tokens / max(counter.seconds(), 1e-9)
            counter.advance(distributed.world_size(), f"{rate:,.0f} tokens/s")
    if failed:
        raise UserError(_stopped(endpoint, f"{len(failed)} of {len(mine)} prompts", failed[-1]))


def _in_flight(
    endpoint: Endpoint, prompts: list[Prompt], at_once: int
) -> Iterator[tuple[Prompt, Future[Reply]]]:
    """Each prompt with its finished request; at most `at_once` requests run."""
    pool, waiting = ThreadPoolExecutor(at_once), dict[Future[Reply], Prompt]()
    try:
        for prompt in prompts:
            if len(waiting) == at_once:
                for done in wait(waiting, return_when="FIRST_COMPLETED").done:
                    yield waiting.pop(done), done
            waiting[pool.submit(endpoint.answer, prompt)] = prompt
        while waiting:
            for done in wait(waiting, return_when="FIRST_COMPLETED").done:
                yield waiting.pop(done), done
    finally:
        endpoint.stopped.set()
        pool.shutdown(cancel_futures=True)


def _row(prompt: Prompt, reply: Reply, tokenizer: PreTrainedTokenizerBase) -> Row:
    tokens = reply.tokens or len(tokenizer(reply.text, verbose=False)["input_ids"])
    row: Row = {"id": prompt.key, "answer": reply.text, "finished": reply.finished}
    row |= {"tokens": tokens, "read": reply.read}
    return row if reply.scored is None else {**row, "scored": reply.scored}


def _stopped(endpoint: Endpoint, what: str, row: Row) -> str:
    return (
        f"endpoint {endpoint.url}: {what} got no answer in {endpoint.config.max_attempts} "
        f"attempts; the last one: {row['error']}. All answers so far are kept: run the same "
        "command again"
    )
