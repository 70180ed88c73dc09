"""lm_eval's interface to a GGUF file that llama.cpp runs."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import postprocess_generated_text

from regrow.runtime.progress import progress
from regrow.stages.evaluate.engine_lm import EngineLM
from regrow.stages.evaluate.gguf_model import GgufEvalModel


class GgufLM(EngineLM):
    """lm_eval's interface to llama.cpp, which answers one request after the other."""

    engine = "GGUF files"

    def __init__(self, model: GgufEvalModel) -> None:
        super().__init__(model, int(model.file.config["max_position_embeddings"]))
        self.gguf = model
        self._encoded: dict[str, bool] = {}

    @property
    def remark(self) -> str:  # type: ignore[override]
        """States how many of the strings so far llama.cpp tokenizes differently."""
        num_different = sum(not same for same in self._encoded.values())
        if not num_different:
            return "tokens by transformers and llama.cpp alike"
        return (
            f"tokens by transformers: llama.cpp's differ in {num_different} of {len(self._encoded)}"
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids by transformers; notes whether llama.cpp's are the same."""
        if string not in self._encoded:
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            self._encoded[string] = ids == self.gguf.model.tokenize(string, special=True)
        return super().tok_encode(string, add_special_tokens, **kwargs)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy generation after each context, up to a stop string."""
        for request in requests:
            self.tok_encode(request.args[0])  # in every process, for `remark`
        return super().generate_until(requests)

    def score_all(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores in the order of the tokens."""
        # Sorted neighbours share long prefixes, which llama.cpp keeps in its KV cache.
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0] + pairs[i][1])
        scores: dict[int, tuple[float, bool]] = {}
        with progress(self.title, len(pairs), "requests") as counter:
            for i in order:
                scores[i] = self._score(*pairs[i])
                counter.advance(1)
        return [scores[i] for i in range(len(pairs))]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = self.window(context, continuation)[:-1]
        first = len(ids) - len(continuation)
        logits_NV = torch.from_numpy(self.gguf.model.logits(ids, first))
        targets_N = torch.tensor(continuation)
        chosen_N = logits_NV.log_softmax(-1).gather(1, targets_N[:, None])
        return float(chosen_N.sum()), bool((logits_NV.argmax(-1) == targets_N).all())

    def generate_all(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        """The continuations, one after the other."""
        answers = []
        with progress(self.title, len(requests), "requests") as counter:
            for context, options in requests:
                answers.append(self._generate(context, options))
                counter.advance(1)
        return answers

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        ids, max_new_tokens, stops = self.settings(context, options)
        new: list[int] = []
        text = ""
        for token in islice(self.gguf.model.continuation(ids), max_new_tokens):
            if token in self.gguf.ends:
                break
            new.append(token)
            text = str(self.tokenizer.decode(new, skip_special_tokens=True))
            if any(stop in text for stop in stops):
                break
        return postprocess_generated_text(text, stops, None)
