"""A teacher of another tokenizer: it reads the text of a batch in its own tokens.

Shapes: B sequences, T tokens of the student, N tokens in spans, M spans, H hidden.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.training.cross_tokenizer.align import Aligner, Tokens
from regrow.training.cross_tokenizer.loss import log_probabilities, span_loss
from regrow.training.head import Head, head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import Teacher, hidden_states, scored

INSIDE = "in_spans"
"""Logged: the share of the scored tokens that lie in spans."""


class CrossTokenizerTeacher:
    """Compares the likelihoods of spans of text instead of distributions over tokens."""

    def __init__(self, teacher: Teacher, aligner: Aligner, temperature: float) -> None:
        self.teacher, self.aligner, self.temperature = teacher, aligner, temperature

    def outputs(
        self, student: PreTrainedModel, batch: dict[str, Tensor], mix: LossWeights
    ) -> dict[str, Any]:
        """What `bind_loss` gives for a batch; names of losses over spans begin with `span_`."""
        mask = scored(batch)
        final_BTH, head = hidden_states(student, batch).final, head_of(student)
        plain = {name: weight for name, weight, _, needs in mix.terms() if not needs}
        total, parts = torch.zeros((), device=final_BTH.device), dict[str, Tensor]()
        if plain:
            size = len(self.aligner.ours)
            own = replace(head, weight_VH=head.weight_VH[:size])
            targets_N = batch["labels"][:, 1:][mask]
            only = replace(mix, weights=plain)
            total, parts = head_loss(final_BTH[mask], own, targets_N, only)
        if mix.needs_teacher:
            more, found, inside = self._compare(final_BTH, head, batch, mix)
            total = total + more
            parts = {**{f"span_{name}": value for name, value in found.items()}, **parts}
            parts[INSIDE] = torch.tensor(float(inside), device=final_BTH.device)
        made: dict[str, Any] = {"loss": total, "main": total.detach(), "parts": parts}
        return {**made, "tokens": mask.sum(), "counts": {}}

    def _compare(
        self, final_BTH: Tensor, head: Head, batch: dict[str, Tensor], mix: LossWeights
    ) -> tuple[Tensor, dict[str, Tensor], int]:
        aligned = self.aligner.batch(batch)
        device = self.teacher.model.device
        given = {name: tensor.to(device) for name, tensor in aligned.batch.items()}
        with torch.no_grad():
            states = self.teacher.hidden(given).final
            theirs_M = _summed(
                states, self.teacher.head, aligned.teacher, aligned.spans, None, mix.exact
            )
        ours_M = _summed(
            final_BTH, head, aligned.student, aligned.spans, len(self.aligner.ours), mix.exact
        )
        loss, parts = span_loss(ours_M, theirs_M.to(ours_M.device), mix, self.temperature)
        return loss, parts, len(aligned.student.at)


def _summed(
    final_BTH: Tensor, head: Head, tokens: Tokens, spans: int, size: int | None, exact: bool
) -> Tensor:
    """The log-probability [M] of each span: the sum of its tokens', in float64."""
    device = final_BTH.device
    at, targets_N, span_N = (
        torch.tensor(values, dtype=torch.int64, device=device)
        for values in (tokens.at, tokens.target, tokens.span)
    )
    hidden_NH = final_BTH.flatten(0, 1).index_select(0, at)
    ids = min(head.rows, size or head.rows)
    log_N = log_probabilities(hidden_NH, head, targets_N, ids, exact).double()
    return torch.zeros(spans, dtype=torch.float64, device=device).index_add(0, span_N, log_N)
