"""A Hugging Face model folder under evaluation, run by transformers.

Shapes: B sequences of a batch, T tokens, N scored tokens, H hidden, V vocabulary. Logits are
computed in chunks, never for all tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import count

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.cost import forward_flops
from regrow.errors import UserError
from regrow.runtime import distributed
from regrow.runtime.batch_generator import BatchGenerator, Sampling
from regrow.runtime.chunks import CHUNK_ELEMENTS
from regrow.runtime.greedy import continuation, step
from regrow.runtime.progress import Progress, progress
from regrow.stages.evaluate.eval_model import (
    EvalModel,
    LogitMetric,
    TeacherOutputs,
    Window,
    now,
)
from regrow.stages.evaluate.texts import IGNORED, Text, in_other_ids
from regrow.training.head import Head, head_of
from regrow.training.model_check import check_model
from regrow.training.shared_tokens import rows_of, token_ids


class FolderEvalModel(EvalModel):
    """A model on its device, and its texts.

    `keep_states` keeps the final hidden states of the texts in host memory, for `as_teacher`.
    """

    engine, next_tokens = "transformers", "greedy"

    def __init__(
        self,
        label: str,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[Text],
        dtype: torch.dtype,
        options: Options,
        logit_metrics: Mapping[str, LogitMetric],
        keep_states: bool = False,
    ) -> None:
        super().__init__(label, tokenizer, texts, logit_metrics)
        self.checkpoint, self.dtype = checkpoint, dtype
        self.device, self.batch_size = options.torch_device(), options.batch_size
        self.source, self.arithmetic = checkpoint.folder, str(dtype).removeprefix("torch.")
        if checkpoint.quantized:
            self.arithmetic += " from decompressed weights"
        self.share_size = options.batch_size
        self.keep_states = keep_states
        self._kept: dict[str, dict[int, Window]] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded on first use; raises UserError if it cannot be evaluated."""
        model = self.checkpoint.model(self.dtype, self.device)
        packed = any(text.sequences.num_documents > len(text.sequences) for text in self.texts)
        check_model(model, packed)
        return model

    def load(self) -> None:
        """Load the model on its device if it is not loaded yet."""
        _ = self.model

    def unload(self) -> None:
        """Free the memory of the model; it is loaded again on the next use."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("head", None)

    @property
    def hardware(self) -> str:
        """Data type, device and threads."""
        if self.device.type == "cuda":
            return f"{self.arithmetic} on {torch.cuda.get_device_name(self.device)}"
        return f"{self.arithmetic} on {self.device.type} with {torch.get_num_threads()} threads"

    @property
    def bytes_to_load(self) -> float:
        """Bytes of the weights in the compute dtype."""
        shapes = self.checkpoint.shapes.values()
        return sum(numpy.prod(shape, dtype=float) for shape in shapes) * self.dtype.itemsize

    @cached_property
    def head(self) -> Head:
        """The output projection, detached from autograd."""
        head = head_of(self.model)
        return replace(head, weight_VH=head.weight_VH.detach())

    def logits(self, text: Text, counter: Progress) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Logits from final hidden states, in chunks; exact to float32 in any compute dtype."""
        size = max(16, CHUNK_ELEMENTS // self.head.rows)
        kept = {}
        for number, window in self._windows(text, counter):
            for states_NH, targets_N in zip(
                window.states_NH.split(size), window.targets_N.split(size), strict=True
            ):
                states_NH = states_NH.to(self.device)
                logits_NV = self.head.logits(states_NH, self.head.weight_VH, exact=True)
                yield number, logits_NV, targets_N.to(self.device)
            if self.keep_states:
                kept[number] = window
        if self.keep_states:
            self._kept[text.name] = kept

    def _windows(self, text: Text, counter: Progress) -> Iterator[tuple[int, Window]]:
        """Yield (number, final hidden states at the scored positions) of this process's windows.

        The states are in host memory.
        """
        batches = text.sequences.batches(self.batch_size)
        for start, batch in zip(
            range(0, len(text.sequences), self.batch_size), batches, strict=True
        ):
            if not self.has_window(start):
                continue
            states_BTH = self.model.base_model(
                input_ids=batch["input_ids"].to(self.device),
                position_ids=batch["position_ids"].to(self.device),
                use_cache=False,
            ).last_hidden_state
            # Position t predicts token t + 1.
            for number, states_TH, labels_T, real_T in zip(
                count(start), states_BTH, batch["labels"], batch["real"], strict=False
            ):
                scored = labels_T[1:] != IGNORED
                states_NH = states_TH[:-1][scored.to(self.device)].cpu()
                yield number, Window(states_NH, labels_T[1:][scored])
                counter.advance(int(real_T.sum()) * distributed.world_size())

    @torch.no_grad()
    def as_teacher(self, texts: list[Text], ids_V: Tensor | None) -> TeacherOutputs:
        """Return the outputs of this model as the teacher of a model with `texts`.

        `ids_V` maps the token ids of that model to ids of this one. If given, this model reads
        `texts` instead of its own texts, and its head has only the rows `ids_V`.
        """
        weight_VH, vocab_size = self.head.weight_VH, token_ids(self.tokenizer)
        if ids_V is None:
            windows = {}
            for text in self.texts:
                windows[text.name] = self._kept.get(text.name) or self._states(text)
            return TeacherOutputs(self.label, self.head, vocab_size, windows)
        windows = {text.name: self._states(in_other_ids(text, ids_V)) for text in texts}
        head = replace(self.head, weight_VH=rows_of(weight_VH, ids_V))
        return TeacherOutputs(self.label, head, len(ids_V), windows, restricted=True)

    def _states(self, text: Text) -> dict[int, Window]:
        with progress(
            f"evaluate {self.label} as the teacher on {text.name}", int(text.sequences.real.sum())
        ) as counter:
            return dict(self._windows(text, counter))

    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """Uses the KV cache; stops at an end token of the generation config or the tokenizer."""
        return continuation(self.model, ids, new_tokens, self._end_ids())

    def continuations(
        self, prompts: Sequence[list[int]], new_tokens: int, counter: Progress
    ) -> list[list[int]]:
        """Answers prompts of similar lengths in one batch, padded on the left."""
        sampling = Sampling(new_tokens, greedy=True)
        generator = BatchGenerator(self.model, self.tokenizer, sampling)
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        answers: list[list[int]] = [[]] * len(prompts)
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            found = generator.answer([prompts[number] for number in batch], [""] * len(batch))
            for number, answer in zip(batch, found, strict=True):
                answers[number] = answer.ids
            counter.advance(len(batch))
        return answers

    def _end_ids(self) -> set[int]:
        config = self.model.generation_config
        eos = config.eos_token_id if config is not None else None
        ids = eos if isinstance(eos, list) else [eos]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int)}

    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Prompts are random, and equal for models of one vocabulary size; decoding is greedy."""
        model = self.model
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        ids_BT = torch.randint(vocabulary, (batch, prompt), generator=generator).to(self.device)
        cache = DynamicCache(config=model.config)
        times = [now(self.device)]
        for _ in range(new + 1):
            ids_BT = step(model, ids_BT, cache)
            times.append(now(self.device))
        seconds: list[float] = numpy.diff(times).tolist()
        return seconds

    def flops(self, tokens: int, past: int = 0) -> int | None:
        """Computed from the family's table; None for a model of no known family."""
        try:
            family = families.of(self.checkpoint)
        except UserError:
            return None
        return forward_flops(family, self.checkpoint.config, tokens, past)
