"""Which of the teacher's token ids each of the student's stands for, where vocabularies differ.

Shapes: V the student's token ids.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError

if TYPE_CHECKING:
    from regrow.data.sequences import Sequences

ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
NONE = -1
"""In place of the teacher's id of a token that it lacks."""


def teacher_ids(student: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """The teacher's id [V] of each student id, by the token's string; None when ids are the same.

    The student's tokens may be some of the teacher's: after a cut of the vocabulary, or of a
    sibling's. Where the two differ in added tokens alone, NONE stands for those that the teacher
    lacks. Raises UserError for other tokenizers.
    """
    ours, theirs = student.tokenizer(), teacher.tokenizer()
    if ours.get_vocab() == theirs.get_vocab():
        return None
    found = _ids_of(ours, theirs, int(teacher.config["vocab_size"]))
    if found is None:
        different = len(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()))
        raise UserError(
            f"student {student.folder} and teacher {teacher.folder} have different tokenizers "
            f"({different} entries differ): distillation needs the same tokens in both, or a "
            "student whose tokens are some of the teacher's, or differ in added tokens alone; "
            "else give --cross-tokenizer spans"
        )
    return found


def comparable(student: Checkpoint, teacher: Checkpoint) -> bool:
    """Whether `teacher_ids` finds the tokens of one among those of the other."""
    ours, theirs = student.tokenizer(), teacher.tokenizer()
    if ours.get_vocab() == theirs.get_vocab():
        return True
    return _ids_of(ours, theirs, int(teacher.config["vocab_size"])) is not None


def _ids_of(
    ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor | None:
    found = ids_in(ours, theirs, vocab_size)
    if found is None and same_rules(ours, theirs):
        return common_ids(ours, theirs, vocab_size)
    return found


def token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many ids a tokenizer uses; what an embedding has beyond them is padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def ids_in(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor | None:
    """The teacher's id [V] of each student id 0 to V − 1; None when a token has no counterpart.

    `vocab_size` is how many ids the teacher's embedding has.
    """
    token_of = {i: token for token, i in student.get_vocab().items()}
    theirs = teacher.get_vocab()
    tokens = [token_of.get(i) for i in range(len(token_of))]  # a gap in the ids leaves a None
    if any(token not in theirs or theirs[token] >= vocab_size for token in tokens):
        return None
    return torch.tensor([theirs[token] for token in tokens if token is not None])


def common_ids(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor:
    """The teacher's id [V] of each student id, NONE without a counterpart.

    Tokens of the same string answer to each other, then those of the same role (end of sequence,
    …) that have found none.
    """
    theirs = {token: i for token, i in teacher.get_vocab().items() if i < vocab_size}
    ids_V = torch.full((token_ids(student),), NONE)
    for token, i in student.get_vocab().items():
        ids_V[i] = theirs.get(token, NONE)
    for role in ROLES:
        ours, other = getattr(student, role), getattr(teacher, role)
        if ours is None or other not in theirs:
            continue
        place = student.get_vocab()[ours]
        if ids_V[place] == NONE and theirs[other] not in ids_V:
            ids_V[place] = theirs[other]
    return ids_V


def same_rules(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether both make the same tokens of any text without the added tokens that differ."""
    if not (student.is_fast and teacher.is_fast):
        return False
    return _rules(student) == _rules(teacher)


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What decides how text is split, without ids and without added tokens."""
    found = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in found["added_tokens"]}
    model = found["model"]
    vocab = model.pop("vocab")
    if isinstance(vocab, list):
        model.pop("unk_id", None)
        kept: Any = sorted((piece, score) for piece, score in vocab if piece not in added)
    else:
        kept = sorted(vocab.keys() - added)
    return found["normalizer"], found["pre_tokenizer"], model, kept


def check_text(
    sequences: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[int, int],
    ids_V: Tensor | None,
) -> None:
    """Raise UserError for text with a token that one of the models cannot read.

    `rows`: how many ids the student's and the teacher's embedding have.
    """
    used = sequences.input_ids.unique()
    most = min(rows) if ids_V is None else rows[0]
    lacking, why = used >= most, f"an embedding of {most} rows lacks"
    if ids_V is not None and not lacking.any():
        lacking, why = ids_V[used] == NONE, "the teacher's tokenizer lacks"
    if lacking.any():
        first = int(used[lacking][0])
        token = tokenizer.convert_ids_to_tokens(first)
        raise UserError(
            f"the text has token {first} ({token!r}), which {why}: take it out of the text or of "
            "the chat template, or give that model the token"
        )


def rows_of(weight_VH: Tensor, ids_V: Tensor) -> Tensor:
    """A head's rows for these ids: the softmax over them is renormalised by itself."""
    return weight_VH.index_select(0, ids_V.to(weight_VH.device))
