"""The loss of a distillation, computed inside the student's forward method.

Shapes: B sequences, T tokens, N scored tokens.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from regrow.training.cache.sparse import Sparse
from regrow.training.cache.teacher import CachedTeacher
from regrow.training.callbacks import CHOSEN_BY
from regrow.training.cross_tokenizer.teacher import CrossTokenizerTeacher
from regrow.training.features import FeatureLosses, model_features
from regrow.training.head import head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import MixedTeacher, States, Teacher, hidden_states, scored

AnyTeacher: TypeAlias = Teacher | CachedTeacher | MixedTeacher | CrossTokenizerTeacher
Batch: TypeAlias = dict[str, Tensor]


def bind_loss(
    student: PreTrainedModel,
    teacher: AnyTeacher | None,
    loss_weights: LossWeights,
    feature_losses: FeatureLosses | None = None,
    measured_first: tuple[str, ...] = (CHOSEN_BY,),
) -> Callable[[], None]:
    """Make `student(**batch)` return the summed loss; returns a function that undoes this.

    The loss is computed inside the student's forward method, so it passes through any wrapper of
    the student (DDP, FSDP), while the student stays the stock model that Trainer saves. The outputs
    are `loss` (the sum of all weighted losses), `main` (the same without feature losses), `parts`
    (the unweighted sum of each loss by name), `tokens` (the number of scored tokens) and `counts`
    (the number of tokens, by name, of each loss that only some sources have). In eval mode all
    losses are measured at temperature 1 and with exact products. The losses `measured_first` are
    then measured first, even if they are not training losses; a training step computes only those.
    """
    stock = student.forward
    measured = loss_weights if teacher is None else loss_weights.validation(*measured_first)
    objective = _Objective(teacher, loss_weights, measured, feature_losses)

    def forward(
        self: PreTrainedModel,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: Tensor,
        source: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        batch = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return objective.outputs(self, batch, source)

    student.forward = types.MethodType(forward, student)  # type: ignore[method-assign]

    def undo() -> None:
        student.forward = stock  # type: ignore[method-assign]

    return undo


@dataclass(frozen=True)
class _Objective:
    """The teacher of a student and the losses between them."""

    teacher: AnyTeacher | None
    learned: LossWeights
    measured: LossWeights
    """Replaces `learned` while the student is in eval mode."""
    feature_losses: FeatureLosses | None

    def outputs(
        self, student: PreTrainedModel, batch: Batch, source_BT: Tensor | None
    ) -> dict[str, Any]:
        """The outputs that `bind_loss` defines, for one batch."""
        loss_weights = self.learned if student.training else self.measured
        teacher = self.teacher
        if isinstance(teacher, CrossTokenizerTeacher):
            return teacher.outputs(student, batch, loss_weights)
        mask = scored(batch)
        targets_N = batch["labels"][:, 1:][mask]
        source_N = None if source_BT is None else source_BT[:, 1:][mask]
        reads = {} if self.feature_losses is None else self.feature_losses.reads
        teacher_states, sparse = self._of_teacher(
            teacher, batch, loss_weights, reads, student.training
        )
        student_states, head = hidden_states(student, batch, **reads), head_of(student)
        if teacher is not None:
            head, targets_N = teacher.compared(head, targets_N)
        total, parts = head_loss(
            student_states.final[mask],
            head,
            targets_N,
            loss_weights,
            None if teacher_states is None else teacher_states.final[mask],
            None if teacher is None else teacher.head,  # only its ids are compared
            sparse=sparse,
            source_N=source_N,
        )
        outputs = {"loss": total, "main": total.detach(), "parts": parts, "tokens": mask.sum()}
        outputs["counts"] = {} if source_N is None else loss_weights.counts(source_N)
        if self.feature_losses is None or not isinstance(teacher, Teacher):
            return outputs
        assert teacher_states is not None, "feature losses need the teacher's states"
        features = (
            model_features(student, student_states, head),
            model_features(teacher.model, teacher_states, teacher.head),
        )
        more, more_parts = self.feature_losses.loss(*features, functional.pad(mask, (0, 1)))
        return {**outputs, "loss": total + more, "parts": {**parts, **more_parts}}

    def _of_teacher(
        self,
        teacher: Teacher | CachedTeacher | MixedTeacher | None,
        batch: Batch,
        loss_weights: LossWeights,
        reads: dict[str, bool],
        training: bool,
    ) -> tuple[States | None, Sparse | None]:
        """The teacher's states if a loss needs them, or stored distributions instead."""
        targets = teacher.targets if training and isinstance(teacher, Teacher) else None
        if targets is not None and loss_weights.needs_teacher:
            return None, targets.sparse(batch)
        if isinstance(teacher, CachedTeacher) and loss_weights.needs_teacher:
            sparse = teacher.sparse(batch)
            if sparse is not None:
                return None, sparse
        if teacher is None or not (loss_weights.needs_teacher or self.feature_losses is not None):
            return None, None
        return teacher.hidden(batch, **reads), None
