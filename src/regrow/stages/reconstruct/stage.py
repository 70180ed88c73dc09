"""The reconstruct stage: a cut model, its teacher and text in, a model nearer to the teacher out.

Layer after layer, the weights of a layer are trained on the cut model's own inputs, so that its
output comes near the teacher's residual stream at that depth. One layer of each model is in memory;
neither the output head nor other layers are run in a step. With ĥ⁺ the layer's output and h⁺ the
teacher's stream on the channels that the cut kept, the loss is the mean over tokens of

    Σ c (ĥ⁺ − h⁺)² / Σ c h⁺²,     c = 1 / (v + median v),  v the mean of h⁺² / |h⁺|² in a channel

so that a few channels of very large values do not decide it.

A trained layer is kept if its error on text that it was not trained on is lower. The whole model is
checked several times on the way, by its KL to the teacher on that text. At the end, the layers
after the check with the lowest KL go back to their old weights: they lowered their own errors and
yet made the model worse. It does not go back at once, because later layers make up for earlier
ones.

Shapes: B sequences, T tokens, H kept channels of the residual stream.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from regrow import families
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data.config import DataConfig, Split
from regrow.data.sequences import Sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.layerwise import LayerByLayer
from regrow.plan import Plan, copy_plans, stored_plans
from regrow.runtime.memory import is_out_of_memory
from regrow.runtime.precision import float32_at_least, rounding
from regrow.runtime.progress import progress, say
from regrow.sparsity import zeros
from regrow.stage_dir import Figure, refuse_input, require_space, write_json
from regrow.stages.reconstruct import ReconstructConfig
from regrow.stages.reconstruct.streams import Streams, spilled_bytes
from regrow.stages.reconstruct.train_layer import (
    Target,
    channel_weights,
    relative_error,
    train_layer,
)
from regrow.training.compile import compiled, require_compiler
from regrow.training.model_check import check_model
from regrow.training.shared_tokens import teacher_ids
from regrow.training.teacher import Teacher, mean_loss, scored
from regrow.training.text import text_for

STATE = "reconstruction.json"
LAYERS = "layers"
STREAMS = "streams"
VALIDATION_TOKENS = 4096
"""Tokens of a validation batch, unless a sequence is longer. A check of the model reads all layers
once for each batch; a batch takes less memory than training, which needs gradients and moments."""


def reconstruct(
    student: str | Path | Checkpoint,
    teacher: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: ReconstructConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Train `student`, which was cut from `teacher`, layer after layer; write the better model.

    An interrupted run continues with the layer that it was at. Raises UserError for a student that
    was not cut from this teacher, and for too little text.
    """
    out, config, options = Path(out), config or ReconstructConfig(), options or Options()
    cut = student if isinstance(student, Checkpoint) else load(student)
    dense = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    in_step = config.sequences_in_step(data.sequence_length)
    refuse_input(out, cut.folder, dense.folder)
    plan = plan_between(cut, dense)
    inputs = {"student": cut.fingerprint, "teacher": dense.fingerprint, "data": data_digest(data)}
    stage = ModelDir(
        out, "reconstruct", config, inputs, cut, data, teachers=(dense,), resumable=True
    )
    if stage.complete:
        say(f"reconstruct: {out} is complete and unchanged")
        return out
    require_compiler(options)
    text = _text(data, cut, config)
    spilled = spilled_bytes(text, (dense, cut), cut.compute_dtype(options.torch_device()))
    require_space(out, 2 * sum(map(cut.bytes, cut.names())) + spilled)
    with stage as folder:
        with _memory_errors(min(in_step, options.batch_size)):
            work = Reconstruction(cut, dense, plan, text, config, options, folder, spilled > 0)
            work.run()
        layout = {name: cut.meta(name) for name in cut.names()}
        tensors = ((name, work.current(name)) for name in layout)
        checkpoints.write(folder, cut.config, layout, tensors, like=cut)
        copy_plans(cut.folder, folder)
        stage.figures += work.figures()
        stage.extra["layers"] = work.rows
        shutil.rmtree(folder / LAYERS, ignore_errors=True)
        shutil.rmtree(folder / STREAMS, ignore_errors=True)
        (folder / STATE).unlink(missing_ok=True)
    return out


@contextmanager
def _memory_errors(micro: int) -> Iterator[None]:
    """Turn errors of too little memory into a UserError; `micro` is the sequences in a batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if micro > 1:
            raise UserError(
                f"memory ran out: lower --batch-size, as a batch had {micro} sequences; the same "
                "command then continues with the layer that it was at"
            ) from None
        raise UserError(
            "memory ran out, with a single sequence in a batch: lower the sequence_length; the "
            "reconstruction then starts again"
        ) from None


def plan_between(student: Checkpoint, teacher: Checkpoint) -> Plan:
    """The plan by which `student` was cut from `teacher`; raises UserError when there is none."""
    for plan in stored_plans(student.folder):
        if plan.fingerprint == teacher.fingerprint:
            return plan
    raise UserError(
        f"{student.folder} was not cut from {teacher.folder}, as far as its plan.json says: give "
        "the model that it was cut from as the teacher, or use regrow distill"
    )


def _text(data: DataConfig, student: Checkpoint, config: ReconstructConfig) -> list[Sequences]:
    """Sequences to train on, and others to accept layers by."""
    tokenizer = student.tokenizer()
    count = -(-config.tokens // data.sequence_length)
    wanted: dict[Split, int] = {"train": count, "validation": config.validation_sequences}
    return [
        text_for([student.config], data, tokenizer, split, n, student)
        for split, n in wanted.items()
    ]


def micro_batches(
    text: Sequences, in_step: int, size: int
) -> tuple[list[dict[str, Tensor]], list[range]]:
    """Batches of at most `size` sequences, and the numbers of the batches of each optimizer step.

    A step has `in_step` sequences; the last one may have fewer.
    """
    batches, steps = list[dict[str, Tensor]](), list[range]()
    for start in range(0, len(text), in_step):
        rows = text.select(range(start, min(start + in_step, len(text))))
        first = len(batches)
        batches += rows.batches(size)
        steps.append(range(first, len(batches)))
    return batches, steps


class Reconstruction:
    """Both models, one layer of each in memory, and the layers that were trained so far."""

    def __init__(
        self,
        student: Checkpoint,
        teacher: Checkpoint,
        plan: Plan,
        text: list[Sequences],
        config: ReconstructConfig,
        options: Options,
        folder: Path,
        spills: bool = False,
    ) -> None:
        self.student, self.plan, self.config, self.folder = student, plan, config, folder
        self.family, self.device = families.of(student), options.torch_device()
        self.ids_V = teacher_ids(student, teacher)
        self._least_share = zeros.least_share(student)
        self.rows: list[dict[str, Any]] = []
        """Per layer: its error before and after, and whether it was kept."""
        self.kl: list[float] = []
        """KL of the model to the teacher, before and at each check."""
        self._new: dict[str, Path] = {}
        """The file that has the new tensor of a name."""
        train, validation = text
        in_step = config.sequences_in_step(train.length)
        self.train, self._steps = micro_batches(train, in_step, max(1, options.batch_size))
        self._tokens = sum(int(batch["real"].sum()) for batch in self.train)
        self.validation = list(validation.batches(max(1, VALIDATION_TOKENS // validation.length)))
        self._validation_sequences = len(validation)
        self._streams = folder / STREAMS if spills else None
        self._compiled = compiled if options.torch_compile else nullcontext
        dtype = student.compute_dtype(self.device)
        self._dense = LayerByLayer.of(teacher, families.of(teacher), self.device, dtype=dtype)
        self._cut = LayerByLayer.of(
            student, self.family, self.device, read=self.current, dtype=dtype
        )
        self._measure_teacher(teacher)

    def current(self, name: str) -> Tensor:
        """A tensor of the student as it is now, in the dtype that it is stored in."""
        old = self.student.tensor(name)
        if name not in self._new:
            return old
        return load_file(self._new[name])[name].to(old.dtype)

    def run(self) -> None:
        """Train every layer, from the first to the last; go on where an earlier run stopped."""
        kept = self.plan.kept_layers()
        ends = [*kept[1:], self.plan.before["layers"]]
        layers = len(kept)
        checks = sorted(
            {round((n + 1) * layers / self.config.checks) for n in range(self.config.checks)} - {0}
        )
        done = self._resume()
        streams = Streams(self._streams, self._batches(), self._dense, self._cut)
        if not self.kl:
            self.kl.append(self._kl(check=True))
        tokens = self._tokens * self.config.passes
        with progress("reconstruct", layers * tokens) as counter:
            counter.resume_at(done * tokens)
            for layer in range(layers):
                streams.advance_dense(
                    range(ends[layer - 1] if layer else 0, ends[layer]), self.ids_V
                )
                if layer >= done:
                    self._train(layer, streams, counter)
                streams.advance_cut(layer)
                if layer + 1 in checks and layer >= done:
                    self.kl.append(self._kl())
                    say(
                        f"reconstruct: {layer + 1} layers done, KL to the teacher "
                        f"{self.kl[-1]:.4f} nats"
                    )
                self._save_state(layer + 1)
        self._keep_best([0, *checks])

    def _batches(self) -> list[dict[str, Tensor]]:
        return [*self.train, *self.validation]

    def _train(self, layer: int, streams: Streams, counter: Any) -> None:
        """Train one layer, and keep its new weights if its error on other text is lower.

        Layers without an error, such as those before the first removed layer, are passed over.
        """
        target = self._target(streams)
        before = self._error(layer, streams, target)
        if before < rounding(self._cut.dtype):
            self.rows.append({"layer": layer, "before": before, "after": before, "kept": False})
            counter.advance(self._tokens * self.config.passes)
            return
        # Not from the weights in bfloat16: the stored ones may have more digits.
        dtype = float32_at_least(self._cut.dtype)
        with self._cut.resident(layer, dtype) as module, self._compiled(module):
            state = train_layer(
                self._cut,
                module,
                streams,
                self._steps,
                target,
                self.config,
                counter,
                seed=self.config.seed + layer,
                least_share=self._least_share,
            )
        self._store(layer, state)
        after = self._error(layer, streams, target)
        better = after < before
        self.rows.append({"layer": layer, "before": before, "after": after, "kept": better})
        if not better:
            self._give_back(range(layer, layer + 1))

    def _error(self, layer: int, streams: Streams, target: Target) -> float:
        """The error on the validation text of a layer with its weights as they are stored."""
        unseen = range(len(self.train), len(self.train) + len(self.validation))
        with self._cut.resident(layer):
            return relative_error(self._cut, streams, unseen, target)

    def _store(self, layer: int, state: dict[str, Tensor]) -> None:
        """Write new weights of a layer, rounded to the dtypes that the student has them in."""
        named = {f"model.layers.{layer}.{name}": value for name, value in state.items()}
        tensors = families.as_on_disk(self.family, named)
        path = self.folder / LAYERS / f"{layer}.safetensors"
        path.parent.mkdir(exist_ok=True)
        dtypes = {name: self.student.meta(name).dtype for name in tensors}
        save_file({k: v.to(dtypes[k]).contiguous() for k, v in tensors.items()}, path)
        self._new |= dict.fromkeys(tensors, path)

    def _give_back(self, layers: range) -> None:
        """Give these layers their old weights back."""
        self._new = {n: path for n, path in self._new.items() if int(path.stem) not in layers}

    def _target(self, streams: Streams) -> Target:
        hidden = self.plan.hidden
        kept = None if hidden is None else torch.tensor(hidden, device=self.device)

        def stream(number: int) -> Tensor:
            stream_BTH = streams.dense(number).to(self.device)
            return stream_BTH if kept is None else stream_BTH[..., kept]

        weight_H = channel_weights(streams, range(len(self.train)), stream)
        return Target(stream, weight_H.to(self.device))

    def _keep_best(self, checked: list[int]) -> None:
        """Give the layers after the check with the lowest KL their old weights back."""
        if not any(row["kept"] for row in self.rows):
            say("reconstruct: no layer improved, so the student is unchanged: lower learning_rate")
            return
        best = min(range(len(self.kl)), key=self.kl.__getitem__)
        if best == len(self.kl) - 1:
            return
        say(
            f"reconstruct: the layers from {checked[best]} on keep their old weights: with the new "
            f"ones the model's KL to the teacher is {self.kl[-1]:.4f} instead of "
            f"{self.kl[best]:.4f} nats"
        )
        self._give_back(range(checked[best], len(self.rows)))
        for row in self.rows[checked[best] :]:
            row["kept"] = False

    @torch.no_grad()
    def _measure_teacher(self, checkpoint: Checkpoint) -> None:
        """The teacher's final states on the validation text, and its head."""
        shell = LayerByLayer.of(
            checkpoint, families.of(checkpoint), self.device, dtype=self._cut.dtype
        )
        teacher = Teacher(shell.streamed(prefetch=True), self.ids_V)
        self._head = teacher.head
        self._reference = [teacher.hidden(batch).final[scored(batch)] for batch in self.validation]
        shell.end_passes()

    @torch.no_grad()
    def _kl(self, check: bool = False) -> float:
        """KL(teacher ‖ student) in nats per scored token of the validation text."""
        shell = LayerByLayer.of(
            self.student, self.family, self.device, read=self.current, dtype=self._cut.dtype
        )
        model = shell.streamed(prefetch=True)
        if check:
            check_model(model)
        kl = mean_loss(model, self.validation, self._reference, self._head, "forward_kl")
        shell.end_passes()
        return kl

    def _save_state(self, done: int) -> None:
        kept = sorted({int(path.stem) for path in self._new.values()})
        state = {"done": done, "rows": self.rows, "kl": self.kl, "kept": kept}
        write_json(self.folder / STATE, state)

    def _resume(self) -> int:
        """Read what an earlier, interrupted run left; returns how many layers are done."""
        path = self.folder / STATE
        if not path.exists():
            return 0
        state = json.loads(path.read_text())
        self.rows, self.kl = state["rows"], state["kl"]
        for layer in state["kept"]:
            file = self.folder / LAYERS / f"{layer}.safetensors"
            self._new |= dict.fromkeys(load_file(file), file)
        return int(state["done"])

    def figures(self) -> list[Figure]:
        """Errors of the layers and KL of the model, before and after."""
        convention = (
            f"{self._validation_sequences} validation sequences that no layer was trained on, "
            f"{self._cut.dtype}".replace("torch.", "")
        )
        kept = sum(row["kept"] for row in self.rows)
        return [
            Figure(name="KL before", value=self.kl[0], unit="nats", convention=convention),
            Figure(name="KL after", value=min(self.kl), unit="nats", convention=convention),
            Figure(name="layers with new weights", value=kept, n=len(self.rows)),
        ]
