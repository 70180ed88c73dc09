"""Runs lm_eval tasks on a loaded transformers model, or on llama.cpp."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.progress import Progress, progress, say
from regrow.stages.evaluate.eval_model import EvalModel
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.gguf_model import GgufEvalModel
from regrow.stages.evaluate.task_rows import Rows, manager

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
        self.remark = ""
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

        return _split(requests, generate)

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        def score(own: list[Any]) -> Any:
            kwargs["disable_tqdm"] = True
            with progress(self.title, len(set(map(_sent, own))), "requests") as self.counter:
                return super(Model, self)._loglikelihood_tokens(own, **kwargs)

        return _split(requests, score, _sent)

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


def _split(
    requests: list[Any],
    work: Callable[[list[Any]], Any],
    group: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Results of `work` by the processes of a job; requests of one `group` stay in one process."""
    groups = [n if group is None else group(request) for n, request in enumerate(requests)]
    own = set(distributed.share(list(dict.fromkeys(groups))))
    numbers = [number for number, name in enumerate(groups) if name in own]
    results = work([requests[number] for number in numbers]) if numbers else []
    results = distributed.merged(dict(zip(numbers, results, strict=True)))
    return [results[number] for number in range(len(requests))]


def model_of(model: EvalModel) -> Model | GgufLM:
    """Wrap a model in the lm_eval interface."""
    if isinstance(model, GgufEvalModel):
        return GgufLM(model)
    assert isinstance(model, FolderEvalModel)
    return Model(model)


def run(model: Model | GgufLM, rows: Rows, limit: int | None) -> dict[str, Any]:
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


MAX_GEN_TOKS = 256
"""Default of lm_eval for the maximum number of new tokens, for a task without its own."""


class GgufLM(TemplateLM):
    """lm_eval's interface to llama.cpp; a transformers tokenizer does the tokenization."""

    def __init__(self, model: GgufEvalModel) -> None:
        super().__init__()
        self.gguf, self.tokenizer = model, model.tokenizer
        self.label = self.title = f"evaluate {model.label}"
        self.max_length = int(model.file.config["max_position_embeddings"])
        self._encoded: dict[str, bool] = {}

    @property
    def remark(self) -> str:
        """States how many of the strings so far llama.cpp tokenizes differently."""
        num_different = sum(not same for same in self._encoded.values())
        if not num_different:
            return "tokens by transformers and llama.cpp alike"
        return (
            f"tokens by transformers: llama.cpp's differ in {num_different} of {len(self._encoded)}"
        )

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that replaces an empty context: BOS, or EOS if there is no BOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the same rules for special tokens as lm_eval's class for transformers."""
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        if string not in self._encoded:
            self._encoded[string] = ids == self.gguf.model.tokenize(string, special=True)
        has_bos = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is False or (add_special_tokens is None and has_bos):
            return ids
        ids_with_bos: list[int] = self.tokenizer.encode(string)
        return ids_with_bos

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Log-likelihood of each continuation, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Iterable[Any], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return _split(list(requests), self._score_all, lambda request: tuple(request[1]))

    def _score_all(self, requests: list[Any]) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        # Sorted neighbours share long prefixes, which llama.cpp keeps in its KV cache.
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0] + pairs[i][1])
        scores: dict[int, tuple[float, bool]] = {}
        with progress(self.title, len(pairs), "requests") as counter:
            for i in order:
                scores[i] = self._score(*pairs[i])
                counter.advance(1)
        return [scores[i] for i in range(len(pairs))]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Score one continuation; a context that is too long is truncated on the left."""
        ids = (context + continuation)[-(self.max_length + 1) :][:-1]
        count = len(continuation)
        assert 0 < count <= len(ids), "a continuation is not longer than the model's context"
        logits_NV = torch.from_numpy(self.gguf.model.logits(ids, len(ids) - count))
        targets_N = torch.tensor(continuation)
        chosen_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
        return float(chosen_N.sum()), bool((logits_NV.argmax(-1) == targets_N).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context length."""
        scores = []
        for (string,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            scores.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy generation after each context, up to a stop string."""
        for request in requests:
            self.tok_encode(request.args[0])  # in every process, for `remark`
        return _split(requests, self._generate_all)

    def _generate_all(self, requests: list[Instance]) -> list[str]:
        answers = []
        with progress(self.title, len(requests), "requests") as counter:
            for context, options in (request.args for request in requests):
                answers.append(self._generate(context, options))
                counter.advance(1)
        return answers

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        if settings.get("do_sample"):
            raise UserError(
                "the task samples its answers, but GGUF files can only be measured greedily: leave "
                "this task out"
            )
        max_new_tokens = int(settings["max_gen_toks"])
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(settings.get("until"), eos=eos)
        assert max_new_tokens < self.max_length, (
            f"{max_new_tokens} new tokens leave no room in {self.max_length}"
        )
        ids = self.tok_encode(context)[-(self.max_length - max_new_tokens) :]
        new: list[int] = []
        text = ""
        for token in islice(self.gguf.model.continuation(ids), max_new_tokens):
            if token in self.gguf.ends:
                break
            new.append(token)
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if any(stop in text for stop in stops if stop):
                break
        return postprocess_generated_text(text, stops, None)
