"""The model as a draft for its teacher in speculative decoding (Leviathan et al., 2211.17192)."""

from __future__ import annotations

from torch import Tensor

from regrow.stage_dir import Figure
from regrow.stages.evaluate.eval_model import Context, EvalModel, MetricResult, mean_per_token
from regrow.stages.evaluate.metrics import size

READS_TEACHER = True
DRAFTED = 4
"""γ: tokens that the model drafts before the teacher checks them."""


def per_token(logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Σ_v min(p_v, q_v), which is 1 minus the total variation distance.

    It is the probability that the teacher p accepts a token that was drawn from the model q.
    """
    return teacher_NV.softmax(-1).minimum(logits_NV.softmax(-1)).sum(-1)


def measure(model: EvalModel, context: Context) -> MetricResult:
    """The acceptance α on each text, and the expected tokens and speed of drafting γ tokens.

    Expected tokens per pass of the teacher: (1 − α^(γ+1)) / (1 − α). The speed divides them by
    γ c + 1, where c is the model's time per token as a share of the teacher's: decoding reads all
    weights for each token, so c is the ratio of the bytes of their weights.
    """
    assert context.teacher is not None, "acceptance is measured against a teacher"
    teacher, figures = context.teacher.label, list[Figure]()
    for text in model.texts:
        mean, stderr, tokens = mean_per_token(model, text, "acceptance")
        where = f"{text.convention}; {model.arithmetic}"
        figures.append(
            Figure(
                name=f"acceptance/{text.name}",
                value=mean,
                n=tokens,
                stderr=stderr,
                convention=f"Σ min(p, q), p of {teacher}: 1 − total variation distance; {where}",
            )
        )
        length = accepted_length(mean, DRAFTED)
        figures.append(
            Figure(
                name=f"accepted_length/{text.name}",
                value=length,
                unit="tokens",
                n=tokens,
                convention=f"(1 − α^{DRAFTED + 1}) / (1 − α): tokens per pass of {teacher} if this "
                f"model drafts {DRAFTED} tokens by sampling, α the acceptance; {where}",
            )
        )
        if (cost := _cost(model, context)) is not None:
            figures.append(
                Figure(
                    name=f"draft_speedup/{text.name}",
                    value=length / (DRAFTED * cost + 1),
                    n=tokens,
                    convention=f"expected tokens ÷ ({DRAFTED} · {cost:.3f} + 1): speed of "
                    f"{teacher} with this model as draft ÷ its speed alone, if the time of a token "
                    f"is proportional to the bytes of the weights; {where}",
                )
            )
    return MetricResult(figures)


def accepted_length(acceptance: float, drafted: int) -> float:
    """Σ_{k=0..γ} α^k: the expected tokens per pass of the teacher, its own token included."""
    return sum(acceptance**power for power in range(drafted + 1))


def _cost(model: EvalModel, context: Context) -> float | None:
    """The model's bytes ÷ the teacher's; None if the size of the teacher was not measured."""
    if context.teacher_result is None:
        return None
    of_teacher = {figure.name: figure.value for figure in context.teacher_result.figures}
    if "bytes" not in of_teacher:
        return None
    own = {figure.name: figure.value for figure in size.measure(model, context).figures}
    return own["bytes"] / of_teacher["bytes"]
