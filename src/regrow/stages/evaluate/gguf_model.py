"""A GGUF file under measurement, run by llama.cpp: logits come token by token and are not kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from regrow.checkpoint import Checkpoint, identity, load
from regrow.errors import UserError
from regrow.llama_cpp import GgufModel, require, threads
from regrow.runtime.greedy import until
from regrow.runtime.progress import Progress, progress
from regrow.stages.evaluate.eval_model import EvalModel, TeacherOutputs, now
from regrow.stages.evaluate.texts import IGNORED, Text
from regrow.training.loss_weights import LossWeights

ENDING = ".gguf"


class GgufFile:
    """A GGUF file that llama.cpp will measure.

    Raises UserError, in one line, when llama.cpp is not installed or cannot load the file: it is
    cut off, or no GGUF.
    """

    def __init__(self, path: str | Path) -> None:
        require(f"measuring {path}")
        self.folder = Path(path).expanduser()
        with GgufModel(self.folder, only_look=True) as opened:
            self.tokens = opened.tokens()
            self.kind, self.parameters = opened.kind, opened.num_parameters
            self.tensor_bytes = opened.tensor_bytes
            self.config: dict[str, Any] = {
                "vocab_size": opened.vocab_size,
                "max_position_embeddings": opened.positions,
            }
        self.parent: Checkpoint | None = None
        """A folder with the same tokens, whose tokenizer is taken."""

    @property
    def bytes(self) -> int:
        """Bytes of the file."""
        return self.folder.stat().st_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all bytes of the file."""
        return identity.of_file(self.folder).sha256

    def has_tokens_of(self, checkpoint: Checkpoint) -> bool:
        """Whether each token of a folder's tokenizer stands under its id in the file."""
        vocabulary = checkpoint.tokenizer().get_vocab()
        known = len(self.tokens)
        return all(i < known and self.tokens[i] == token for token, i in vocabulary.items())

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The parent's tokenizer, else what transformers reads from the file.

        Raises UserError when it cannot.
        """
        if self.parent is not None:
            return self.parent.tokenizer()
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                str(self.folder.parent), gguf_file=self.folder.name, local_files_only=True
            )
        except (ValueError, OSError, KeyError, NotImplementedError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"transformers cannot read the tokenizer in {self.folder} ({reason}): name the "
                "folder that it was made of among the models, too"
            ) from None
        return tokenizer


def open_model(source: str | Path) -> Checkpoint | GgufFile:
    """A file NAME.gguf as llama.cpp will run it, anything else as transformers will.

    Raises UserError for what is neither.
    """
    if str(source).endswith(ENDING) and not Path(source).expanduser().is_dir():
        return GgufFile(source)
    return load(source, quantized=True)


def find_parents(models: Mapping[str, Checkpoint | GgufFile], teacher: str | None) -> None:
    """Give each GGUF file the first folder, the teacher's before others, that has its tokens."""
    labels = sorted(models, key=lambda label: label != teacher)
    folders = [model for label in labels if isinstance(model := models[label], Checkpoint)]
    for model in models.values():
        if isinstance(model, GgufFile):
            named = (folder for folder in folders if folder.has_tokenizer)
            model.parent = next((each for each in named if model.has_tokens_of(each)), None)


ROWS = 256
"""Positions whose logits are held at once."""


@dataclass
class Sums:
    """Per window of a text the sum of each loss over its scored tokens, and their number."""

    counts: list[int] = field(default_factory=list)
    of: dict[str, list[float]] = field(default_factory=dict)


class GgufEvalModel(EvalModel):
    """A GGUF file with its texts. Both losses of a text are summed in one pass over it."""

    batch_size = 1
    device = torch.device("cpu")
    engine = "llama.cpp"
    next_tokens = "random"

    def __init__(
        self, label: str, file: GgufFile, texts: list[Text], teacher: TeacherOutputs | None = None
    ) -> None:
        self.label, self.file, self.texts, self.teacher = label, file, texts, teacher
        self.source, self.arithmetic = file.folder, f"llama.cpp, {threads()} threads"
        self._sums: dict[str, Sums] = {}

    @cached_property
    def model(self) -> GgufModel:
        """The file opened, when it is first needed."""
        return GgufModel(self.file.folder)

    def load(self) -> None:
        """Have it in memory."""
        _ = self.model

    def unload(self) -> None:
        """Release its memory; it is opened again when it is needed."""
        if (model := self.__dict__.pop("model", None)) is not None:
            model.close()

    @property
    def where(self) -> str:
        """The program and its threads."""
        return self.arithmetic

    @property
    def bytes_to_load(self) -> float:
        """The file's."""
        return self.file.bytes

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the folder that the file was made of, else the file's own."""
        return self.file.tokenizer()

    def sums(
        self, text: Text, loss: str, teacher: TeacherOutputs | None
    ) -> tuple[list[float], list[int]]:
        """Softmax in float32 of llama.cpp's logits, sums in float64; from one pass for all."""
        assert teacher is None or teacher is self.teacher
        if text.name not in self._sums:
            self._sums[text.name] = self._run(text)
        found = self._sums[text.name]
        return found.of[loss], found.counts

    @torch.no_grad()
    def _run(self, text: Text) -> Sums:
        names = ["cross_entropy"] if self.teacher is None else ["cross_entropy", "forward_kl"]
        found = Sums(of={name: [] for name in names})
        sequences = text.sequences
        total = int(sequences.real.sum())
        with progress(f"evaluate {self.label} on {text.name}", total) as counter:
            for number in range(len(sequences)):
                begun = dict.fromkeys(names, 0.0)
                count = 0
                for logits_NV, targets_N in self._scored(sequences[number], counter):
                    values = self._values(text, number, count, logits_NV, targets_N)
                    for name in names:
                        begun[name] += float(values[name].sum(dtype=torch.float64))
                    count += len(targets_N)
                found.counts.append(count)
                for name in names:
                    found.of[name].append(begun[name])
        return found

    def _scored(
        self, sequence: dict[str, Tensor], counter: Progress
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [N, V] before scored tokens of a block, and those [N]; documents by themselves."""
        length = int(sequence["real"].sum())
        starts = torch.nonzero(sequence["position_ids"][:length] == 0).flatten().tolist()
        for begin, end in pairwise([*starts, length]):
            ids = sequence["input_ids"][begin:end].tolist()
            labels_T = sequence["labels"][begin:end]
            for first in range(0, len(ids), ROWS):
                last = min(first + ROWS, len(ids))
                targets = labels_T[first + 1 : last + 1]  # position t predicts token t + 1
                scored = targets != IGNORED
                if scored.any():
                    logits_TV = torch.from_numpy(self.model.logits(ids[:last], first))
                    yield logits_TV[: len(targets)][scored], targets[scored]
                counter.advance(last - first)

    def _values(
        self, text: Text, window: int, done: int, logits_NV: Tensor, targets_N: Tensor
    ) -> dict[str, Tensor]:
        """Each loss [N] of scored tokens that come after `done` others in a window."""
        found = {"cross_entropy": _loss("cross_entropy", logits_NV, logits_NV, targets_N)}
        if self.teacher is not None:
            head = self.teacher.head
            states_NH = self.teacher.windows[text.name][window].states_NH[done:][: len(targets_N)]
            shared = min(logits_NV.shape[1], len(head.weight_VH))
            weight_VH = head.weight_VH[:shared]
            teacher_NV = head.logits(states_NH.to(weight_VH.device), weight_VH).cpu()
            ours_NV = logits_NV[:, :shared]
            found["forward_kl"] = _loss("forward_kl", ours_NV, teacher_NV, targets_N)
        return found

    def continuation(self, ids: list[int], new_tokens: int) -> list[int]:
        """With llama.cpp's cache; the file and the tokenizer say what ends it."""
        return until(self.model.continuation(ids), new_tokens, self.ends)

    @cached_property
    def ends(self) -> set[int]:
        """Token ids that end a generation."""
        eos = self.tokenizer.eos_token_id
        return self.model.ends() | ({eos} if isinstance(eos, int) else set())

    def times(self, batch: int, prompt: int, new: int) -> list[float]:
        """Random tokens throughout, as llama-bench times them: none has to be chosen first."""
        generator = torch.Generator().manual_seed(0)
        shape = (batch, prompt + new)
        ids_BT = torch.randint(self.model.vocab_size, shape, generator=generator)
        times = [now(self.device)]
        past = 0
        for length in (prompt, *[1] * new):
            rows: list[list[int]] = ids_BT[:, past : past + length].tolist()
            self.model.feed(rows, past, prompt + new)
            past += length
            times.append(now(self.device))
        seconds: list[float] = numpy.diff(times).tolist()
        return seconds

    def flops(self, tokens: int, past: int = 0) -> int | None:
        """Not known of a file."""
        return None


def _loss(name: str, ours_NV: Tensor, theirs_NV: Tensor, targets_N: Tensor) -> Tensor:
    """A loss [N] as distillation has it; what it overwrites are copies."""
    ((_, _, loss, _),) = LossWeights({name: 1.0}).terms()
    return loss(ours_NV.float().clone(), theirs_NV.float().clone(), targets_N, 1.0)[0]
