"""Maps the student's token ids to the teacher's, if their vocabularies differ.

Shapes: V token ids of the student.
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
"""The id used for a token that the teacher lacks."""


def teacher_ids(student: Checkpoint, teacher: Checkpoint) -> Tensor | None:
    """The teacher's id [V] of each student id, by the token's string; None if all ids are equal.

    The student may have only some of the teacher's tokens, for example after a vocabulary cut. If
    the two differ only in added tokens, the id is NONE for tokens that the teacher lacks. Raises
    UserError for other tokenizers.
    """
    of_student, of_teacher = student.tokenizer(), teacher.tokenizer()
    if of_student.get_vocab() == of_teacher.get_vocab():
        return None
    ids_V = _ids_of(of_student, of_teacher, int(teacher.config["vocab_size"]))
    if ids_V is None:
        entries = (set(each.get_vocab().items()) for each in (of_student, of_teacher))
        different = len(set.symmetric_difference(*entries))
        raise UserError(
            f"student {student.folder} and teacher {teacher.folder} have different tokenizers "
            f"({different} entries differ): distillation needs the same tokens in both, or a "
            "student whose tokens are some of the teacher's, or differ only in added tokens; "
            "otherwise give --cross-tokenizer spans"
        )
    return ids_V


def comparable(student: Checkpoint, teacher: Checkpoint) -> bool:
    """Whether single tokens of the two can be compared: `teacher_ids` raises no error."""
    of_student, of_teacher = student.tokenizer(), teacher.tokenizer()
    if of_student.get_vocab() == of_teacher.get_vocab():
        return True
    return _ids_of(of_student, of_teacher, int(teacher.config["vocab_size"])) is not None


def _ids_of(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor | None:
    ids_V = ids_in(student, teacher, vocab_size)
    if ids_V is None and same_rules(student, teacher):
        return common_ids(student, teacher, vocab_size)
    return ids_V


def token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that a tokenizer uses; all further rows of an embedding are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def shared_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids in a distribution; padding rows of the embedding are left out."""
    return min(int(checkpoint.config["vocab_size"]), token_ids(tokenizer))


def ids_in(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor | None:
    """The teacher's id [V] of each student id 0 to V − 1; None if the teacher lacks a token.

    `vocab_size` is the number of rows of the teacher's embedding.
    """
    token_of = {i: token for token, i in student.get_vocab().items()}
    id_of = teacher.get_vocab()
    tokens = [token_of.get(i) for i in range(len(token_of))]  # None for a gap in the ids
    if any(token not in id_of or id_of[token] >= vocab_size for token in tokens):
        return None
    return torch.tensor([id_of[token] for token in tokens if token is not None])


def common_ids(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int
) -> Tensor:
    """The teacher's id [V] of each student id; NONE for tokens that the teacher lacks.

    Tokens with the same string are paired first, then unpaired tokens with the same role (end of
    sequence, …).
    """
    id_of = {token: i for token, i in teacher.get_vocab().items() if i < vocab_size}
    ids_V = torch.full((token_ids(student),), NONE)
    for token, i in student.get_vocab().items():
        ids_V[i] = id_of.get(token, NONE)
    for role in ROLES:
        token, other = getattr(student, role), getattr(teacher, role)
        if token is None or other not in id_of:
            continue
        place = student.get_vocab()[token]
        if ids_V[place] == NONE and id_of[other] not in ids_V:
            ids_V[place] = id_of[other]
    return ids_V


def same_rules(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether both tokenize text in the same way, except for added tokens that differ."""
    if not (student.is_fast and teacher.is_fast):
        return False
    return _rules(student) == _rules(teacher)


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The rules for splitting text into tokens, without ids and added tokens."""
    tokenizer_json = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["content"] for token in tokenizer_json["added_tokens"]}
    model = tokenizer_json["model"]
    vocab = model.pop("vocab")
    if isinstance(vocab, list):
        model.pop("unk_id", None)
        kept: Any = sorted((piece, score) for piece, score in vocab if piece not in added)
    else:
        kept = sorted(vocab.keys() - added)
    return tokenizer_json["normalizer"], tokenizer_json["pre_tokenizer"], model, kept


def check_text(
    sequences: Sequences,
    tokenizer: PreTrainedTokenizerBase,
    rows: tuple[int, int],
    ids_V: Tensor | None,
) -> None:
    """Raise UserError for text with a token that one of the models lacks.

    `rows` are the numbers of rows of the student's and the teacher's embedding.
    """
    used = sequences.ids_used()
    most = min(rows) if ids_V is None else rows[0]
    lacking, reason = used >= most, f"an embedding of {most} rows lacks"
    if ids_V is not None and not lacking.any():
        lacking, reason = ids_V[used] == NONE, "the teacher's tokenizer lacks"
    if lacking.any():
        first = int(used[lacking][0])
        token = tokenizer.convert_ids_to_tokens(first)
        raise UserError(
            f"the text has token {first} ({token!r}), which {reason}: take it out of the text or "
            "of the chat template, or give that model the token"
        )


def rows_of(weight_VH: Tensor, ids_V: Tensor) -> Tensor:
    """The rows of a head for these ids; their softmax is a distribution over these ids only."""
    return weight_VH.index_select(0, ids_V.to(weight_VH.device))
