"""lm_eval's interface to a vLLM server of a model folder."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lm_eval.models.utils import postprocess_generated_text

from regrow.checkpoint.model_config import read_json
from regrow.errors import UserError
from regrow.runtime.precision import name_of
from regrow.runtime.progress import progress
from regrow.runtime.vllm_server import AT_ONCE, Server
from regrow.stages.evaluate.engine_lm import EngineLM
from regrow.stages.evaluate.folder_model import FolderEvalModel

AFTER = 2
"""Positions that the server needs besides: for the last token, which is only scored, and for the
one that it always generates. So much more of a context that is too long is cut off."""


class VllmLM(EngineLM):
    """lm_eval's interface to vLLM, which has many requests at the same time."""

    engine = "vLLM"

    def __init__(self, model: FolderEvalModel, server: Server) -> None:
        config, folder = model.checkpoint.config, model.checkpoint.folder
        positions = int(config.get("max_position_embeddings") or server.room)
        super().__init__(model, positions - AFTER)
        self.server = server
        quantized = " from quantized weights" if model.checkpoint.quantized else ""
        self.arithmetic = f"vLLM {server.version}, {name_of(model.dtype)}{quantized}"
        # transformers, which the scores are compared with, applies it to greedy answers as well.
        file = folder / "generation_config.json"
        penalty = read_json(file).get("repetition_penalty") if file.is_file() else None
        self.penalty = {"repetition_penalty": penalty} if penalty else {}

    def score_all(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores from the log-probabilities of the prompts' tokens."""
        return self._at_once(lambda pair: self._score(*pair), pairs)

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = self.window(context, continuation)
        choice = self._asked(ids, 1, prompt_logprobs=1)
        total, greedy = 0.0, True
        for token, row in zip(
            continuation, choice["prompt_logprobs"][-len(continuation) :], strict=True
        ):
            log_p = {int(each): values["logprob"] for each, values in row.items()}
            total += log_p[token]
            # The most likely token; of equal ones the first, as argmax takes it.
            greedy = greedy and token == min(log_p, key=lambda each: (-log_p[each], each))
        return total, greedy

    def generate_all(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """The greedy continuations."""
        return self._at_once(lambda request: self._generate(*request), requests)

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        ids, max_new_tokens, stops = self.settings(context, options)
        choice = self._asked(ids, max_new_tokens, stop=stops, return_token_ids=True, **self.penalty)
        text = self.tokenizer.decode(choice["token_ids"], skip_special_tokens=True)
        return postprocess_generated_text(str(text), stops, None)

    def _asked(self, ids: list[int], max_new_tokens: int, **fields: Any) -> dict[str, Any]:
        needed = len(ids) + max_new_tokens
        if needed > self.server.room:
            raise UserError(
                f"the task has a request of {needed:,} tokens, but vLLM has memory for "
                f"{self.server.room:,}: free memory, or use backend transformers"
            )
        return self.server.complete(ids, max_tokens=max_new_tokens, temperature=0, **fields)

    def _at_once(self, ask: Callable[[Any], Any], requests: list[Any]) -> list[Any]:
        """The answers in the order of the requests."""
        pool, answers = ThreadPoolExecutor(AT_ONCE), []
        try:
            with progress(self.title, len(requests), "requests") as counter:
                for answer in pool.map(ask, requests):
                    answers.append(answer)
                    counter.advance(1)
        finally:
            pool.shutdown(cancel_futures=True)
        return answers
