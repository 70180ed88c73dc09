"""Perplexity on every text: exp of the mean negative log-likelihood per scored token."""

from __future__ import annotations

import math

from regrow.manifest import Figure
from regrow.stages.evaluate.subject import Context, Measured, Subject, mean_loss

LARGEST = 700.0
"""Nats whose exponential a float can still hold."""
CLUSTERS = "standard error by windows"


def measure(subject: Subject, context: Context) -> Measured:
    """exp(mean −log q(token)); the standard error is that of the mean times the perplexity."""
    figures = []
    for text in subject.texts:
        mean, stderr, tokens = mean_loss(subject, text, "cross_entropy")
        value = math.exp(min(mean, LARGEST))
        figures.append(
            Figure(
                name=f"perplexity/{text.name}",
                value=value,
                n=tokens,
                stderr=value * stderr,
                convention=f"{text.convention}; {context.config.dtype}, {CLUSTERS}",
            )
        )
    return Measured(figures)
