"""Tasks on GGUF files: lm_eval's requests, answered by llama.cpp one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from regrow.errors import UserError
from regrow.progress import progress
from regrow.stages.evaluate.gguf_subject import GgufSubject

MAX_GEN_TOKS = 256
"""lm_eval's own, of a task that names no number."""


class GgufLM(TemplateLM):
    """lm_eval's class for a model around llama.cpp, with the tokens that transformers gives."""

    def __init__(self, subject: GgufSubject) -> None:
        super().__init__()
        self.subject, self.tokenizer = subject, subject.tokenizer
        self.label = self.title = f"evaluate {subject.label}"
        self.max_length = int(subject.file.config["max_position_embeddings"])
        self._encoded: dict[str, bool] = {}

    @property
    def remark(self) -> str:
        """How many of the strings that it was asked about llama.cpp splits into other tokens."""
        apart = sum(not same for same in self._encoded.values())
        if not apart:
            return "tokens by transformers and llama.cpp alike"
        return f"tokens by transformers: llama.cpp's differ in {apart} of {len(self._encoded)}"

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands for an empty context: the first token of a text, if there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids as lm_eval's class for transformers has them."""
        bare: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        if string not in self._encoded:
            self._encoded[string] = bare == self.subject.model.tokenize(string, special=True)
        begun = has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        if add_special_tokens is False or (add_special_tokens is None and begun):
            return bare
        found: list[int] = self.tokenizer.encode(string)
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> Any:
        """Log-likelihood of each continuation, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Iterable[Any], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [(context, continuation) for _, context, continuation in requests]
        # Neighbours have the most in common, which llama.cpp then keeps.
        order = sorted(range(len(asked)), key=lambda i: asked[i][0] + asked[i][1])
        found: dict[int, tuple[float, bool]] = {}
        with progress(self.title, len(asked), "requests") as counter:
            for i in order:
                found[i] = self._score(*asked[i])
                counter.advance(1)
        return [found[i] for i in range(len(asked))]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Of one continuation; what is too long loses the beginning of its context."""
        read = (context + continuation)[-(self.max_length + 1) :][:-1]
        count = len(continuation)
        assert 0 < count <= len(read), "a continuation is not longer than the model's context"
        logits_NV = torch.from_numpy(self.subject.model.logits(read, len(read) - count))
        targets_N = torch.tensor(continuation)
        chosen_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
        return float(chosen_N.sum()), bool((logits_NV.argmax(-1) == targets_N).all())

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-likelihood of each whole text, in windows of the model's context."""
        found = []
        for (string,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(parts)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy text after each context, up to a stop string."""
        found = []
        with progress(self.title, len(requests), "requests") as counter:
            for context, options in (request.args for request in requests):
                found.append(self._generate(context, options))
                counter.advance(1)
        return found

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        if wanted.get("do_sample"):
            raise UserError("the task samples its answers: GGUF files are measured greedily alone")
        most = int(wanted["max_gen_toks"])
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(wanted.get("until"), eos=eos)
        assert most < self.max_length, f"{most} new tokens leave no room in {self.max_length}"
        ids = self.tok_encode(context)[-(self.max_length - most) :]
        new: list[int] = []
        text = ""
        for token in islice(self.subject.model.continuation(ids), most):
            if token in self.subject.ends:
                break
            new.append(token)
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if any(stop in text for stop in stops if stop):
                break
        return postprocess_generated_text(text, stops, None)
