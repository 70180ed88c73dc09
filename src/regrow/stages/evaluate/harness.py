"""Tasks through lm_eval: its requests, its model class around ours, its scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from regrow.errors import UserError
from regrow.progress import Progress, progress, say
from regrow.stages.evaluate.folder_subject import FolderSubject
from regrow.stages.evaluate.gguf_subject import GgufSubject
from regrow.stages.evaluate.harness_gguf import GgufLM
from regrow.stages.evaluate.subject import Subject
from regrow.stages.evaluate.task_names import manager
from regrow.stages.evaluate.task_rows import Rows

SEED = 1234
"""lm_eval's own, by which worked examples are drawn."""
KINDS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")
        ],
    },
    "continuation": {
        "output_type": "loglikelihood",
        "doc_to_text": "context",
        "doc_to_target": "target",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
            }
        ],
        "filter_list": [
            {
                "name": "none",
                "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
            }
        ],
    },
}
"""lm_eval's task config by the kind of rows."""


class RowsTask(ConfigurableTask):
    """A task of lm_eval whose rows are at hand; if no others are, they serve as worked examples."""

    def __init__(self, rows: Rows) -> None:
        self.given = {"test": _dataset(rows.rows)}
        if rows.shots:
            self.given["train"] = _dataset(rows.shots)
        overrides = dict(rows.source.task.config) if rows.source.task is not None else {}
        shots = {"fewshot_split": "train" if rows.shots else "test"}
        config = {"num_fewshot": 0, **KINDS[rows.kind], **overrides}
        name = {"task": rows.source.name, "test_split": "test"}
        super().__init__(config={**config, **name, **(shots if config["num_fewshot"] else {})})

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to fetch."""
        self.dataset = self.given


class Model(HFLM):
    """lm_eval's class for transformers models around a loaded one, with our progress."""

    def __init__(self, subject: FolderSubject) -> None:
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.checkpoint.tokenizer(),  # its own: lm_eval may add a pad token
            batch_size=subject.batch_size,
        )
        self.label = self.title = f"evaluate {subject.label}"
        self.remark = ""
        self.counter: Progress

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm_eval would ask the hub."""
        return {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Greedy text after each context, up to a stop string."""
        with progress(self.title, len(requests), "requests") as self.counter:
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        # lm_eval asks once about continuations that differ in their last token alone.
        asked = {(*context, *continuation[:-1]) for _, context, continuation in requests}
        kwargs["disable_tqdm"] = True
        with progress(self.title, len(asked), "requests") as self.counter:
            return super()._loglikelihood_tokens(requests, **kwargs)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self.counter.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self.counter.advance(len(context))
        return found


def model_of(subject: Subject) -> Model | GgufLM:
    """lm_eval's model around a subject."""
    if isinstance(subject, GgufSubject):
        return GgufLM(subject)
    assert isinstance(subject, FolderSubject)
    return Model(subject)


def run(model: Model | GgufLM, rows: Rows, limit: int | None) -> dict[str, Any]:
    """lm_eval's results of the first `limit` rows: `results`, `samples`, `n-shot` and so on.

    Standard errors are left out. Raises UserError for what lm_eval refuses: a task whose data
    cannot be had, a model of too few positions.
    """
    model.title = f"{model.label} on {rows.source.name}"
    try:
        with few_words(rows.source.name):
            loaded = _load(rows)
            found = evaluator.evaluate(
                lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True
            )
    except (OSError, ValueError, ImportError, AssertionError) as error:
        if rows.kind and not isinstance(error, AssertionError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"task {rows.source.name} cannot be run by lm_eval: {reason}") from error
    assert found is not None
    return dict(found)


def _load(rows: Rows) -> Any:
    """The task as lm_eval's simple_evaluate makes it ready: worked examples as the task says."""
    if rows.kind:
        loaded = TaskManager(include_defaults=False).load([RowsTask(rows)])
    else:
        loaded = manager().load([rows.source.name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
    return loaded


@contextmanager
def few_words(name: str | None) -> Iterator[None]:
    """lm_eval's log held back; of its warnings on a task the first is told, and how many more."""
    logger, kept = logging.getLogger("lm_eval"), _Kept()
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(kept)
    try:
        yield
    finally:
        logger.removeHandler(kept)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    if kept.told and name is not None:
        more = f" (and {len(kept.told) - 1} more such lines)" if len(kept.told) > 1 else ""
        say(f"lm_eval on {name}: {' '.join(kept.told[0].split())}{more}")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """As lm_eval wants them; a continuation follows its context after a space."""
    return Dataset.from_list(
        [
            {**row, "target": f" {row['continuation']}"} if "continuation" in row else row
            for row in rows
        ]
    )
