"""lm_eval's interface to engines other than transformers: llama.cpp, and a server of vLLM."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.stages.evaluate.eval_model import EvalModel

MAX_GEN_TOKS = 256
"""Default of lm_eval for the maximum number of new tokens, for a task without its own."""
Request = tuple[Any, list[int], list[int]]
"""A name that is not used, the tokens of a context, and those of its continuation."""


class EngineLM(TemplateLM):
    """An engine that scores and continues tokens; a transformers tokenizer makes the tokens."""

    engine: str
    """What is measured by it, in an error."""
    remark = ""
    """A further part of the figures' convention."""

    def __init__(self, model: EvalModel, max_length: int) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = model.tokenizer
        self.arithmetic, self.max_length = model.arithmetic, max_length
        self.label = self.title = f"evaluate {model.label}"

    @abstractmethod
    def score_all(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether greedy decoding would generate it."""

    @abstractmethod
    def generate_all(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """The greedy continuation of each text."""

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
        has_bos = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        without = add_special_tokens is False or (add_special_tokens is None and has_bos)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=not without)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Log-likelihood of each continuation, and whether greedy decoding would generate it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Iterable[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        def score(own: list[Request]) -> list[tuple[float, bool]]:
            return self.score_all([(context, continuation) for _, context, continuation in own])

        return split(list(requests), score, lambda request: tuple(request[1]))

    def window(self, context: list[int], continuation: list[int]) -> list[int]:
        """The tokens to score; a context that is too long is truncated on the left."""
        ids = (context + continuation)[-(self.max_length + 1) :]
        room = len(ids) - 1
        assert 0 < len(continuation) <= room, "a continuation is longer than the model's context"
        return ids

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
        return split([request.args for request in requests], self.generate_all)

    def settings(self, context: str, options: dict[str, Any]) -> tuple[list[int], int, list[str]]:
        """Tokens of a context, the maximum number of new tokens, and the strings to stop at.

        Raises UserError for a task that samples its answers.
        """
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        if settings.get("do_sample"):
            raise UserError(
                f"the task samples its answers, but {self.engine} can only be measured greedily: "
                "leave this task out"
            )
        max_new_tokens = int(settings["max_gen_toks"])
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(settings.get("until"), eos=eos)
        assert max_new_tokens < self.max_length, (
            f"{max_new_tokens} new tokens leave no room in {self.max_length}"
        )
        ids = self.tok_encode(context)[-(self.max_length - max_new_tokens) :]
        return ids, max_new_tokens, [stop for stop in stops if stop]


def split(
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
