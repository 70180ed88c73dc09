"""Runs lm_eval tasks on a loaded transformers model, on llama.cpp, or on a vLLM server."""

from __future__ import annotations

import copy
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
from regrow.runtime import vllm_server
from regrow.runtime.progress import Progress, progress, say
from regrow.stages.evaluate.engine_lm import EngineLM, split
from regrow.stages.evaluate.eval_model import EvalModel
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_lm import GgufLM
from regrow.stages.evaluate.gguf_model import GgufEvalModel
from regrow.stages.evaluate.task_rows import Rows, manager
from regrow.stages.evaluate.vllm_lm import VllmLM

SEED = 1234
"""Default seed of lm_eval; it selects the few-shot examples."""
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
"""Task config for lm_eval, by kind of rows."""


class RowsTask(ConfigurableTask):
    """An lm_eval task with given rows; without `rows.shots`, few-shot examples are other rows."""

    def __init__(self, rows: Rows) -> None:
        self.splits = {"test": _dataset(rows.rows)}
        if rows.shots:
            self.splits["train"] = _dataset(rows.shots)
        overrides = dict(rows.source.task.config) if rows.source.task is not None else {}
        shots = {"fewshot_split": "train" if rows.shots else "test"}
        config = {"num_fewshot": 0, **KINDS[rows.kind], **overrides}
        name = {"task": rows.source.name, "test_split": "test"}
        super().__init__(config={**config, **name, **(shots if config["num_fewshot"] else {})})

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Use the given rows, where lm_eval would download them."""
        self.dataset = self.splits


class Model(HFLM):
    """lm_eval's class for transformers models, with a loaded model and a progress line."""

    def __init__(self, model: FolderEvalModel) -> None:
        super().__init__(
            pretrained=model.model,
            tokenizer=copy.deepcopy(model.tokenizer),  # lm_eval may add a pad token
            batch_size=model.batch_size,
        )
        self.label = self.title = f"evaluate {model.label}"
        self.arithmetic, self.remark = model.arithmetic, ""
        self.counter: Progress

    def get_model_info(self) -> dict[str, Any]:
        """Return an empty dict, because lm_eval would query the hub."""
        return {}

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Log-likelihood of each continuation, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Greedy generation after each context, up to a stop string."""

        def generate(own: list[Instance]) -> Any:
            with progress(self.title, len(own), "requests") as self.counter:
                return super(Model, self).generate_until(own, disable_tqdm=True)

        return split(requests, generate)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        def score(own: list[Any]) -> Any:
            kwargs["disable_tqdm"] = True
            with progress(self.title, len(set(map(_sent, own))), "requests") as self.counter:
                return super(Model, self)._loglikelihood_tokens(own, **kwargs)

        return split(requests, score, _sent)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        self.counter.advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens: torch.Tensor = super()._model_generate(context, *args, **kwargs)
        self.counter.advance(len(context))
        return tokens


def _sent(request: Any) -> tuple[int, ...]:
    """The tokens that lm_eval sends: continuations may differ in the last token only."""
    _, context, continuation = request
    return (*context, *continuation[:-1])


@contextmanager
def opened(model: EvalModel, backend: str) -> Iterator[Model | EngineLM]:
    """A model in the lm_eval interface; `backend` says what runs a folder."""
    if isinstance(model, GgufEvalModel):
        yield GgufLM(model)
        return
    assert isinstance(model, FolderEvalModel)
    if backend == "transformers":
        yield Model(model)
        return
    model.unload()  # which makes room for the server's copy
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    with vllm_server.serve(model.checkpoint.folder, model.dtype, model.device) as server:
        yield VllmLM(model, server)


def run(model: Model | EngineLM, rows: Rows, limit: int | None) -> dict[str, Any]:
    """Return lm_eval's results on the first `limit` rows: `results`, `samples`, `n-shot` and so on.

    The results have no standard errors. Raises UserError if lm_eval cannot run the task: its data
    cannot be downloaded, or the model has too few positions.
    """
    model.title = f"{model.label} on {rows.source.name}"
    try:
        with quiet_log(rows.source.name):
            loaded = _load(rows)
            results = evaluator.evaluate(
                lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True
            )
    except (OSError, ValueError, ImportError, AssertionError) as error:
        if rows.kind and not isinstance(error, AssertionError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"task {rows.source.name} cannot be run by lm_eval: {reason}") from error
    assert results is not None
    return dict(results)


def _load(rows: Rows) -> Any:
    """Load the task as lm_eval's simple_evaluate does, with the task's own few-shot setting."""
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
def quiet_log(task: str | None) -> Iterator[None]:
    """Suppress lm_eval's log; print only the first warning on a task and the number of warnings."""
    logger, captured = logging.getLogger("lm_eval"), _CapturedLog()
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(captured)
    try:
        yield
    finally:
        logger.removeHandler(captured)
        logger.setLevel(before[0])
        logger.propagate = before[1]
    if captured.lines and task is not None:
        count = len(captured.lines)
        more = f" (and {count - 1} more such lines)" if count > 1 else ""
        say(f"lm_eval on {task}: {' '.join(captured.lines[0].split())}{more}")


class _CapturedLog(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    """Rows in the format of lm_eval; a space separates a context and its continuation."""
    return Dataset.from_list(
        [
            {**row, "target": f" {row['continuation']}"} if "continuation" in row else row
            for row in rows
        ]
    )
