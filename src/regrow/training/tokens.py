"""Which of the teacher's token ids each of the student's stands for, where vocabularies differ."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError


def teacher_ids(student: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """The teacher's id [V] of each student id, by the token's string; None when ids are the same.

    The student's tokens may be some of the teacher's: after a cut of the vocabulary, or of a
    sibling's. Raises UserError when it has a token that the teacher lacks.
    """
    ours, theirs = student.tokenizer(), teacher.tokenizer()
    if ours.get_vocab() == theirs.get_vocab():
        return None
    found = ids_in(ours, theirs, int(teacher.config["vocab_size"]))
    if found is None:
        different = len(set(ours.get_vocab().items()) ^ set(theirs.get_vocab().items()))
        raise UserError(
            f"student {student.folder} and teacher {teacher.folder} have different tokenizers "
            f"({different} entries differ): distillation needs the same tokens in both, or a "
            "student whose tokens are some of the teacher's"
        )
    return found


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


def rows_of(weight_VH: Tensor, ids_V: Tensor) -> Tensor:
    """A head's rows for these ids: the softmax over them is renormalised by itself."""
    return weight_VH.index_select(0, ids_V.to(weight_VH.device))
