"""KL divergence from the teacher, exact over the whole vocabulary, on every text."""

from __future__ import annotations

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, mean_loss


def measure(subject: EvalModel, context: Context) -> MetricResult:
    """Mean Σ_v p (log p − log q) in nats per scored token; p the teacher's, q this model's."""
    teacher = context.teacher
    if teacher is None:
        return MetricResult()
    figures = []
    for text in subject.texts:
        mean, stderr, tokens = mean_loss(subject, text, "forward_kl", teacher)
        how = f"KL({teacher.label} || model) per scored token over all token ids that both have"
        if teacher.restricted:
            how += f" (in the model's own tokens, {teacher.label} renormalised over them)"
        figures.append(
            Figure(
                name=f"kl/{text.name}",
                value=mean,
                unit="nats",
                n=tokens,
                stderr=stderr,
                convention=f"{how}; {text.convention}; {subject.arithmetic}",
            )
        )
    return MetricResult(figures)
