"""Rows with an exact answer: what a model reads, and what it must write.

A row is read as training reads it: the model gets the tokens before the answer, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from transformers import PreTrainedTokenizerBase

from regrow.data.config import SourceConfig
from regrow.data.documents import Passage, read_row, tokenize
from regrow.data.files import sha256_of
from regrow.data.sources import resolve, rows
from regrow.errors import UserError
from regrow.stage_dir import digest

FORMS = "`prompt` + `completion`, `question` + `answer`, or `messages` that end with the assistant"


@dataclass(frozen=True)
class AnswerRow:
    """A row with its answer, without the white space around it."""

    passage: Passage
    answer: str

    def prompt_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The token ids before the answer, as in training.

        Raises UserError, which names the row, for a conversation without a chat template.
        """
        (document,) = tokenize([self.passage], tokenizer)
        start = max(n for n, scored in enumerate(document.scored) if scored)
        while start and document.scored[start - 1]:
            start -= 1
        return document.ids[:start]


def read_answers(source: str, limit: int | None = None) -> list[AnswerRow]:
    """The rows of a file, at most `limit` of them.

    Raises UserError, which names the row, for one without an answer, and for a file without rows.
    """
    found = [
        answer_row(row, location)
        for location, row in islice(rows(SourceConfig(source=source)), limit)
    ]
    if not found:
        raise UserError(f"answers {source}: it has no rows; each line must be one object")
    return found


def answer_row(row: dict[str, object], location: str) -> AnswerRow:
    """A row and its answer; raises UserError for a row without one."""
    passage = read_row(row, location)
    if passage.messages is not None:
        last = passage.messages[-1]
        answer = str(last["content"] or "") if last["role"] == "assistant" else ""
    else:
        answer = passage.text[passage.prompt :] if passage.prompt else ""
    if not answer.strip():
        raise UserError(f"{location}: the row has no answer to compare with; it needs {FORMS}")
    return AnswerRow(passage, answer.strip())


def digest_of(source: str) -> str:
    """The hash of the files; raises UserError for a file that does not exist."""
    return digest([sha256_of(path) for path in resolve(SourceConfig(source=source))])


def check_answers(answers: Mapping[str, str], limit: int | None) -> list[str]:
    """One line per file about its rows; raises UserError for a missing file or a bad row."""
    return [
        f"answers {name}: {len(read_answers(source, limit)):,} rows of {source}"
        for name, source in answers.items()
    ]
