"""The loss of a distillation, computed inside the student's forward.

Shapes: B blocks, T tokens, N scored tokens.
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
from regrow.training.feature_loss_weights import FeatureLosses
from regrow.training.head import head_loss, head_of
from regrow.training.layer_mapping import model_features
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import MixedTeacher, States, Teacher, hidden_states, scored

AnyTeacher: TypeAlias = Teacher | CachedTeacher | MixedTeacher | CrossTokenizerTeacher
Batch: TypeAlias = dict[str, Tensor]


def bind_loss(
    student: PreTrainedModel,
    teacher: AnyTeacher | None,
    mix: LossWeights,
    feature_losses: FeatureLosses | None = None,
) -> Callable[[], None]:
    """Make `student(**batch)` return the summed loss; returns what undoes it.

    The loss is computed inside the student's forward, so that it goes through whatever wraps the
    student (DDP, FSDP), and the student itself stays the stock model that Trainer saves. Outputs:
    `loss` (sum of all weighted losses), `main` (without feature losses), `parts` {name of a
    loss: its plain sum}, `tokens` (how many were scored), `counts` {name of a loss that
    some sources' tokens alone have: how many those are}. In eval mode all is measured at
    temperature 1, and the forward KL comes first, whether the student learns by it or not; a
    training step computes it only if it does.
    """
    stock = student.forward
    measured = mix if teacher is None else mix.measuring(CHOSEN_BY)
    objective = _Objective(teacher, mix, measured, feature_losses)

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
    """What a student is compared with, and by what."""

    teacher: AnyTeacher | None
    learned: LossWeights
    measured: LossWeights
    """In place of `learned` when the student is in eval mode."""
    feature_losses: FeatureLosses | None

    def outputs(
        self, student: PreTrainedModel, batch: Batch, source_BT: Tensor | None
    ) -> dict[str, Any]:
        """What `bind_loss` promises of a batch."""
        mix, teacher = self.learned if student.training else self.measured, self.teacher
        if isinstance(teacher, CrossTokenizerTeacher):
            return teacher.outputs(student, batch, mix)
        mask = scored(batch)
        targets_N = batch["labels"][:, 1:][mask]
        source_N = None if source_BT is None else source_BT[:, 1:][mask]
        reads = {} if self.feature_losses is None else self.feature_losses.reads
        taught, sparse = self._said(teacher, batch, mix, reads)
        own, head = hidden_states(student, batch, **reads), head_of(student)
        if teacher is not None:
            head, targets_N = teacher.compared(head, targets_N)
        total, parts = head_loss(
            own.final[mask],
            head,
            targets_N,
            mix,
            None if taught is None else taught.final[mask],
            None if teacher is None else teacher.head,  # its ids are compared, if given
            sparse=sparse,
            source_N=source_N,
        )
        found = {"loss": total, "main": total.detach(), "parts": parts, "tokens": mask.sum()}
        found["counts"] = {} if source_N is None else mix.counts(source_N)
        if self.feature_losses is None or taught is None or not isinstance(teacher, Teacher):
            return found
        ours, theirs = (
            model_features(student, own, head),
            model_features(teacher.model, taught, teacher.head),
        )
        more, inner = self.feature_losses.loss(ours, theirs, functional.pad(mask, (0, 1)))
        return {**found, "loss": total + more, "parts": {**parts, **inner}}

    def _said(
        self,
        teacher: Teacher | CachedTeacher | MixedTeacher | None,
        batch: Batch,
        mix: LossWeights,
        reads: dict[str, bool],
    ) -> tuple[States | None, Sparse | None]:
        """What is needed of a teacher: its states, or stored distributions in their place."""
        if isinstance(teacher, CachedTeacher) and mix.needs_teacher:
            sparse = teacher.sparse(batch)
            if sparse is not None:
                return None, sparse
        if teacher is None or not (mix.needs_teacher or self.feature_losses is not None):
            return None, None
        return teacher.hidden(batch, **reads), None
