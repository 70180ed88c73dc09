"""Perplexity on every text, per token and, if the tokenizers differ, per byte."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import cross_entropy

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, mean_per_token
from regrow.stages.evaluate.texts import Text

READS_TEACHER = False
LARGEST = 700.0
"""Largest number of nats whose exponential fits in a float."""
CLUSTERS = "standard error by windows"


def per_token(logits_NV: Tensor, teacher_NV: None, targets_N: Tensor) -> Tensor:
    """−log q(token) in nats; q is the softmax of the logits."""
    return cross_entropy(logits_NV, targets_N, reduction="none")


def measure(model: EvalModel, context: Context) -> MetricResult:
    """exp(mean −log q(token)); its standard error is the mean's times the perplexity.

    If the text's bytes are known, also bits per byte: Σ −log2 q(token) ÷ bytes. If the tokenizers
    differ, the perplexity is replaced by exp(Σ −log q(token) ÷ bytes · bytes per token of the
    reference model). For the reference model, this equals its perplexity.
    """
    figures = []
    for text in model.texts:
        mean, stderr, tokens = mean_per_token(model, text, "perplexity")
        value = math.exp(min(mean, LARGEST))
        convention = f"{text.convention}; {model.arithmetic}, {CLUSTERS}"
        figure = Figure(
            name=f"perplexity/{text.name}",
            value=value,
            n=tokens,
            stderr=value * stderr,
            convention=convention,
        )
        if text.per_token:
            figures.append(figure)
        if text.num_bytes:
            figures += _per_byte(text, mean * tokens, stderr * tokens, convention)
    return MetricResult(figures)


def _per_byte(text: Text, nats: float, stderr: float, convention: str) -> list[Figure]:
    assert text.num_bytes is not None
    nats, stderr = nats / text.num_bytes, stderr / text.num_bytes
    figures = [
        Figure(
            name=f"bits_per_byte/{text.name}",
            value=nats / math.log(2),
            n=text.num_bytes,
            stderr=stderr / math.log(2),
            convention=f"Σ −log2 q(token) ÷ UTF-8 bytes of the scored tokens; {convention}",
        )
    ]
    if (reference := text.reference) is not None:
        value = math.exp(min(nats * reference.bytes_per_token, LARGEST))
        convention = (
            f"exp(nats per byte · {reference.bytes_per_token:.4f} bytes per token of "
            f"{reference.label}): compares with the perplexity of {reference.label}; {convention}"
        )
        figures.append(
            Figure(
                name=f"perplexity_per_reference_token/{text.name}",
                value=value,
                n=text.num_bytes,
                stderr=value * stderr * reference.bytes_per_token,
                convention=convention,
            )
        )
    return figures
