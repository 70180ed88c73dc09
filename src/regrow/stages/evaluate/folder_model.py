"""A Hugging Face folder under measurement, run by transformers; logits are never kept."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.cost import forward_flops
from regrow.errors import UserError
from regrow.runtime.greedy import continuation, step
from regrow.runtime.progress import progress
from regrow.stages.evaluate.eval_model import EvalModel, TeacherOutputs, Window, now
from regrow.stages.evaluate.texts import IGNORED, Text, in_other_ids
from regrow.training.head import Head, head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.model_check import check_model
from regrow.training.shared_tokens import rows_of, token_ids


class FolderEvalModel(EvalModel):
    """A model on its device, with its texts; final hidden states are kept, logits never are."""

    def __init__(
        self,
        label: str,
        checkpoint: Checkpoint,
        texts: list[Text],
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
    ) -> None:
        self.label, self.checkpoint, self.texts = label, checkpoint, texts
        self.dtype, self.device, self.batch_size = dtype, device, batch_size
        self.source, self.arithmetic = checkpoint.folder, str(dtype).removeprefix("torch.")
        if checkpoint.quantized:
            self.arithmetic += " from decompressed weights"
        self.engine, self.next_tokens = "transformers", "greedy"
        self._windows: dict[str, list[Window]] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, loaded when it is first needed; raises UserError for one we cannot measure."""
        model = self.checkpoint.model(self.dtype, self.device)
        packed = any(text.sequences.num_documents > len(text.sequences) for text in self.texts)
        check_model(model, packed)
        return model

    def load(self) -> None:
        """Have it on its device."""
        _ = self.model

    def unload(self) -> None:
        """Let the model go; it is loaded again when it is needed."""
        self.__dict__.pop("model", None)
        self.__dict__.pop("head", None)

    @property
    def where(self) -> str:
        """Data type, device and threads."""
        if self.device.type == "cuda":
            return f"{self.arithmetic} on {torch.cuda.get_device_name(self.device)}"
        return f"{self.arithmetic} on {self.device.type} with {torch.get_num_threads()} threads"

    @property
    def bytes_to_load(self) -> float:
        """Weights in the compute dtype."""
        shapes = self.checkpoint.shapes.values()
        return sum(numpy.prod(shape, dtype=float) for shape in shapes) * self.dtype.itemsize

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return self.checkpoint.tokenizer()

    @cached_property
    def head(self) -> Head:
        """The output projection, detached: a loss over it then computes no gradients."""
        head = head_of(self.model)
        return replace(head, weight_VH=head.weight_VH.detach())

    def windows(self, text: Text) -> list[Window]:
        """Each window's scored states, in host memory, from one forward pass of the body."""
        if text.name not in self._windows:
            self._windows[text.name] = self.run(text)
        return self._windows[text.name]

    @torch.no_grad()
    def run(self, text: Text) -> list[Window]:
        """Each window's scored states of any text in this model's ids, not kept."""
        found = []
        tokens = int(text.sequences.real.sum())
        with progress(f"evaluate {self.label} on {text.name}", tokens) as counter:
            for batch in text.sequences.batches(self.batch_size):
                ids, positions = batch["input_ids"], batch["position_ids"]
                states_BTH = self.model.base_model(
                    input_ids=ids.to(self.device),
                    position_ids=positions.to(self.device),
                    use_cache=False,
                ).last_hidden_state
                # Position t predicts token t + 1.
                for states_TH, labels_T in zip(states_BTH, batch["labels"], strict=True):
                    scored = labels_T[1:] != IGNORED
                    kept = states_TH[:-1][scored.to(self.device)].cpu()
                    found.append(Window(kept, labels_T[1:][scored]))
                counter.advance(int(batch["real"].sum()))
        return found

    def as_teacher(self, texts: list[Text], ids_V: Tensor | None) -> TeacherOutputs:
        """What is kept of it for a model with `texts`; `ids_V` are its ids of that one's tokens."""
        weight_VH = self.head.weight_VH
        if ids_V is None:
            windows = {text.name: self.windows(text) for text in self.texts}
            ids = slice(token_ids(self.tokenizer))  # what the embedding has beyond is padding
            return TeacherOutputs(self.label, replace(self.head, weight_VH=weight_VH[ids]), windows)
        windows = {text.name: self.run(in_other_ids(text, ids_V)) for text in texts}
        head = replace(self.head, weight_VH=rows_of(weight_VH, ids_V))
        return TeacherOutputs(self.label, head, windows, restricted=True)

    @torch.no_grad()
    def sums(
        self, text: Text, loss: str, teacher: TeacherOutputs | None
    ) -> tuple[list[float], list[int]]:
        """Logits as exact as by a float32 product, softmax in float32, sums in float64."""
        others: list[Window | None] = [None] * len(text.sequences)
        if teacher is not None:
            others = list(teacher.windows[text.name])
        sums, counts = [], []
        for window, other in zip(self.windows(text), others, strict=True):
            total, _ = head_loss(
                window.states_NH.to(self.device),
                self.head,
                window.targets_N.to(self.device),
                LossWeights({loss: 1.0}, exact=True),
                None if other is None else other.states_NH.to(self.device),
                None if teacher is None else teacher.head,
            )
            sums.append(float(total))
            counts.append(len(window.targets_N))
        return sums, counts

    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """With the KV cache; the generation config and the tokenizer say what ends it."""
        return continuation(self.model, ids, new_tokens, self._ends())

    def _ends(self) -> set[int]:
        generation_config = self.model.generation_config
        given = generation_config.eos_token_id if generation_config is not None else None
        ids = given if isinstance(given, list) else [given]
        return {i for i in (*ids, self.tokenizer.eos_token_id) if isinstance(i, int)}

    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Random tokens, the same for every model of a vocabulary, then greedy ones."""
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
        """By the family's table; None for a family that has none."""
        try:
            family = families.of(self.checkpoint)
        except UserError:
            return None
        return forward_flops(family, self.checkpoint.config, tokens, past)
