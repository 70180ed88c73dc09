"""Ranks a student's answers to a prompt by their log-probability under the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """Token ids of a prompt with a better and a worse answer, including their end marks."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    scores: tuple[float, float]
    """Mean log-probability per token under the teacher, of the chosen and the rejected answer."""


@torch.inference_mode()
def rank(
    model: PreTrainedModel, prompt: list[int], answers: Sequence[list[int]], batch_size: int
) -> list[float]:
    """The mean log p per token of each answer after the prompt, in nats, in float32."""
    scores = []
    for start in range(0, len(answers), batch_size):
        part = answers[start : start + batch_size]
        longest = max(map(len, part))
        ids = torch.zeros(len(part), len(prompt) + longest, dtype=torch.int64)
        for row, answer in enumerate(part):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        ids = ids.to(model.device)  # padding on the right: no scored token attends to it
        logits_BTV = model(input_ids=ids, logits_to_keep=longest + 1).logits[:, :-1].float()
        for row, answer in enumerate(part):
            own_T = torch.tensor(answer, device=ids.device)
            scores.append(-float(functional.cross_entropy(logits_BTV[row, : len(answer)], own_T)))
    return scores


def pair_of(
    prompt: list[int], answers: Sequence[list[int]], scores: Sequence[float], min_margin: float
) -> Pair | None:
    """The best and the worst answer; None if they are equal or differ by less than `min_margin`."""
    if len(answers) < 2:
        return None
    order = sorted(range(len(answers)), key=lambda n: scores[n])
    worst, best = order[0], order[-1]
    if answers[best] == answers[worst] or not scores[best] - scores[worst] >= min_margin:
        return None
    return Pair(prompt, answers[best], answers[worst], (scores[best], scores[worst]))
