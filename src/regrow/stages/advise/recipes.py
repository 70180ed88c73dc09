"""The recipe of an answer: fields that `regrow run` accepts."""

from __future__ import annotations

from typing import Any

from regrow.cost.steps import usual_batch
from regrow.stages.advise.config import AdviseConfig

PLACEHOLDER = "text.jsonl"
"""The source of text in a recipe when the request names none: write your own there."""
GGUF = {"Q8_0", "Q4_K_M"}
"""Formats that `export` writes; the others are schemes of `quantize`."""
HALF = 0.6
"""Below this share of the parameters, a cut is made in two rounds."""
LARGE = 50_000_000
"""Tokens from which on the published settings are used instead of our own."""
OWN_BATCH = 2048
"""The most tokens of a step in our own runs."""

Stages = list[dict[str, Any] | str]


def schedule(tokens: float) -> dict[str, Any]:
    """Batch and rate for a number of tokens; from a billion on the rate falls to a tenth.

    Batches of our own runs have the rate of `distill`, which follows the size of the weights.
    """
    fields: dict[str, Any] = {"tokens": int(tokens), "batch_tokens": usual_batch(tokens)}
    if fields["batch_tokens"] > OWN_BATCH:
        fields["learning_rate"] = 1e-4
    if tokens >= 1e9:
        fields["min_learning_rate_ratio"] = 0.1
    return fields


def length(tokens: float) -> int:
    """Tokens of a sequence."""
    return 512 if tokens < LARGE else 1024 if tokens < 1e9 else 4096


def pruned(
    model: str, keep: float, tokens: float, format: str, config: AdviseConfig
) -> dict[str, Any]:
    """Profile, prune and distil, in two rounds for a deep cut, then store in a format.

    Budgets that our own runs come near to also reconstruct before they distil.
    """
    stages: Stages = []
    rounds = [keep] if keep >= HALF else [round(keep**0.5, 3)] * 2
    for share in rounds:
        multiple = 256 if format == "Q4_K_M" else 128
        stages += [
            {"profile": {"samples": 1024 if tokens >= LARGE else 128}},
            {"prune": {"keep_params": share, "multiple_of": multiple}},
            *(["reconstruct"] if tokens < LARGE else []),
            {"distill": schedule(tokens / len(rounds))},
        ]
    return _recipe(model, stages, format, tokens, config)


def taught(
    student: str, teacher: str, tokens: float, format: str, config: AdviseConfig
) -> dict[str, Any]:
    """Distil a pretrained smaller model, then store it in a format."""
    stages: Stages = [{"distill": {"teacher": teacher, **schedule(tokens)}}]
    return _recipe(student, stages, format, tokens, config)


def stored(model: str, format: str, config: AdviseConfig) -> dict[str, Any]:
    """Store a model in a format, and compare it."""
    return _recipe(model, [], format, 0, config)


def _recipe(
    model: str, stages: Stages, format: str, tokens: float, config: AdviseConfig
) -> dict[str, Any]:
    last: Stages = ["evaluate"]
    if format in GGUF:
        last.append({"export": {"type": format}})
    elif format != "bf16":
        last.insert(0, {"quantize": {"scheme": format}})
    data = {
        "sources": list(config.data) or [PLACEHOLDER],
        "sequence_length": length(tokens),
    }
    return {"model": model, "data": data, "stages": [*stages, *last, "report"]}
