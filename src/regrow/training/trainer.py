"""The distillation trainer: transformers' Trainer with the loss of `bind_loss`.

Its checkpoints also contain state that is not in the student: the projections of feature losses and
the running means of the loss balancer.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer
from transformers.trainer import SCHEDULER_NAME

from regrow.data.sequences import IGNORED
from regrow.errors import UserError
from regrow.training import sharding
from regrow.training.adapters import has_adapter, load_adapter
from regrow.training.callbacks import COUNT_PREFIX, MetricSums
from regrow.training.dynamic_blend import LOSS, DynamicBlend
from regrow.training.features import MAIN, FeatureLosses
from regrow.training.load_once import send, weights_of
from regrow.training.on_policy import StudentWriter
from regrow.training.optimizers import run_eagerly_on_cpu
from regrow.training.rates import scale_rates

FEATURE_LOSS_STATE = "feature_losses.pt"
"""A file next to optimizer.pt in each checkpoint; the written student does not contain it."""


class NotFiniteError(UserError):
    """The loss is NaN or infinite. All ranks raise this error at the same step."""


class FeatureLossTrainer(Trainer):
    """A Trainer with feature losses, which trains their projections and saves their state.

    The projections' gradients are averaged over the ranks, as DDP does for the student's gradients.
    They are not clipped.
    """

    def __init__(
        self, *args: Any, feature_losses: FeatureLosses | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.feature_losses, self.this_step = feature_losses, MetricSums()
        if feature_losses is not None:  # no module has the projections, so nothing else moves them
            feature_losses.to(self.args.device)

    def end_step(self) -> None:
        """Average the projections' gradients over the ranks and update the balancer."""
        if self.feature_losses is None:
            return
        for projection in self.feature_losses.projections():
            projection.grad = self.accelerator.reduce(projection.grad, "mean")
        if self.feature_losses.balancer is not None:
            self.feature_losses.balancer.update(self.this_step.means(self.sum_over_ranks))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of the values over the ranks."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's optimizer, with the projections as a separate parameter group."""
        exists = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.feature_losses is not None and self.feature_losses.projections() and not exists:
            group = {"params": self.feature_losses.projections(), "weight_decay": 0.0}
            optimizer.add_param_group(group)
            optimizer.register_step_post_hook(self._zero_projections)
        return optimizer

    def _zero_projections(self, *_: Any) -> None:
        """Clear gradients after a step; Trainer clears only the student's."""
        assert self.feature_losses is not None
        for projection in self.feature_losses.projections():
            projection.grad = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._save_state(output_dir)
        state = {} if self.feature_losses is None else self.feature_losses.state_dict()
        if state and self.args.should_save:
            torch.save(state, Path(output_dir) / FEATURE_LOSS_STATE)

    def _save_state(self, output_dir: str) -> None:
        """Write the state of the optimizer and of the schedule."""
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if (
            checkpoint is not None
            and self.feature_losses is not None
            and self.feature_losses.state_dict()
        ):
            state = torch.load(Path(checkpoint) / FEATURE_LOSS_STATE, map_location="cpu")
            self.feature_losses.load_state_dict(state)


BLEND_STATE = "blend.json"
"""A file in each checkpoint of a training whose sources have changing shares."""


@dataclass(frozen=True)
class TrainedBlend:
    """The changing shares of the sources, and the validation sequences of each."""

    blend: DynamicBlend
    heldout: list[Any]
    in_step: int
    """Sequences in an optimizer step."""


class DistillTrainer(FeatureLossTrainer):
    """Trains on a step's summed loss ÷ its scored tokens, over all micro-batches and ranks.

    Sequences are read in order, so that a run with a larger budget continues a shorter one. With a
    `writer`, the student itself writes some of them. With a `blend`, each evaluation changes the
    shares of the sources. The change acts one step later, as the next step's first micro-batch is
    already read. After `save_seconds` without a checkpoint one is written, by the clock of rank 0.
    """

    def __init__(
        self,
        *args: Any,
        writer: StudentWriter | None = None,
        blend: TrainedBlend | None = None,
        attention_rate: float = 1.0,
        embedding_rate: float = 1.0,
        save_seconds: float = math.inf,
        **kwargs: Any,
    ) -> None:
        self.rates = (attention_rate, embedding_rate)
        super().__init__(*args, **kwargs)
        self.save_seconds, self.saved_at = save_seconds, time.monotonic()
        self.writer, self.blend = writer, blend
        self.logged = MetricSums()
        self._unsent: list[Tensor] | None = None  # weights that other processes lack
        self.step_loss = torch.zeros(())
        self.model_accepts_loss_kwargs = True  # Trainer then counts the scored tokens
        self.loss_is_scaled_for_ga = True
        if self.args.world_size > 1 and self.eval_dataset is not None:
            share = self.args.world_size * self.args.per_device_eval_batch_size
            self.eval_dataset = _EvenShares(self.eval_dataset, share)
            if blend is not None:
                heldout = [_EvenShares(sequences, share) for sequences in blend.heldout]
                self.blend = replace(blend, heldout=heldout)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """accelerate's arguments: the gradients of DDP are views of the buckets that it sends."""
        fields: dict[str, Any] = super()._build_accelerator_args(**kwargs)
        for handler in fields["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return fields

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The optimizer, with a group of parameters for each learning rate."""
        exists = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.rates != (1, 1) and not exists:
            scale_rates(optimizer, self.student, *self.rates)
        if not exists:
            run_eagerly_on_cpu(optimizer)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> LRScheduler:
        """Create Trainer's schedule, except that warm-up and cosine never have a rate of 0."""
        optimizer, options = optimizer or self.optimizer, self.args.lr_scheduler_kwargs
        cosine = self.args.lr_scheduler_type == "cosine_with_min_lr"
        if self.lr_scheduler is not None or not cosine or optimizer is None:
            scheduler: LRScheduler = super().create_scheduler(num_training_steps, optimizer)
            return scheduler
        assert isinstance(options, dict), "min_lr_rate is given"
        warmup, ratio = int(self.args.warmup_steps), float(options["min_lr_rate"])
        factor = partial(rate_factor, warmup=warmup, total=num_training_steps, min_ratio=ratio)
        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    @property
    def student(self) -> PreTrainedModel:
        """The model that is trained, unwrapped."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Shard the student or wrap it; shards get the weights of process 0, the only ones."""
        self._unsent = weights_of(self.student) if self.is_fsdp_enabled else None
        prepared = super()._prepare_for_training(*args, **kwargs)
        self._send_weights()
        return prepared

    def _send_weights(self) -> None:
        """Send them once: a checkpoint, which has weights too, is read after that."""
        if self._unsent is not None:
            send(self._unsent, self.student, self.args.device)
            self._unsent = None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint; Trainer does not support checkpoints that contain only adapters."""
        self._send_weights()
        if has_adapter(self.student):
            load_adapter(self.student, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student, or only its adapters; of a sharded student the config, as each process
        writes its own shards beside it.
        """
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        if not self._shards_adapter():
            if self.args.should_save:
                self.student.config.save_pretrained(str(output_dir or self.args.output_dir))
            return
        trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        state = {name: sharding.gathered(p.detach()).cpu() for name, p in trained.items()}
        self._save(output_dir, state_dict=state)

    def _save_state(self, output_dir: str) -> None:
        if not self._shards_adapter():
            super()._save_state(output_dir)
            return
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _shards_adapter(self) -> bool:
        """Whether adapters are trained beside sharded weights, which Trainer would gather."""
        return bool(self.is_fsdp_enabled) and has_adapter(self.student)

    def _load_best_model(self) -> None:
        if has_adapter(self.student):
            assert self.state.best_model_checkpoint is not None
            load_adapter(self.student, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of the next step; the student writes its rows of them now."""
        batches = list(islice(epoch_iterator, num_batches))
        if self.writer is not None:
            step, every = self.state.global_step, int(self.args.save_steps)
            if self.writer.due(step, every):
                with self.accelerator.autocast():
                    self.writer.write(self.writer.rows_ahead(step, every, self.rows_of))
            batches = [self.writer.replace(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def rows_of(self, step: int) -> list[int]:
        """The numbers of the sequences that this process reads in an optimizer step."""
        args, rows = self.args, list[int]()
        size, each = args.per_device_train_batch_size, args.gradient_accumulation_steps
        for micro in range(step * each, (step + 1) * each):
            first = (micro * args.world_size + args.process_index) * size
            rows += range(first, first + size)
        return rows

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one micro-batch: its share of the step's mean per scored token."""
        outputs = model(**_model_inputs(inputs))
        row = _sums(outputs)
        self.logged.add(row)
        self.this_step.add({**row, MAIN: outputs["main"]})
        if num_items_in_batch is None:
            num_items_in_batch = outputs["tokens"]
        # The sum of a step without scored tokens is 0 and must not become 0 / 0.
        count = torch.as_tensor(num_items_in_batch, device=outputs["loss"].device).clamp_min(1)
        loss = outputs["loss"] / count
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; raises NotFiniteError, on all ranks, before the optimizer step."""
        if self.args.parallelism_config is not None:  # nodes have copies of the shards
            shards: Any = self.model
            shards.set_requires_all_reduce(self.accelerator.sync_gradients)
        loss = super().training_step(*args, **kwargs)
        self.step_loss = self.step_loss.to(loss.device) + loss
        if self.accelerator.sync_gradients:
            late = self.args.process_index == 0 and self._seconds_unsaved() > self.save_seconds
            # Both in one transfer: all ranks must write a checkpoint after the same step.
            sums = torch.stack([self.step_loss, torch.full_like(self.step_loss, late)])
            (total, due), self.step_loss = self.sum_over_ranks(sums).tolist(), torch.zeros(())
            if due and self._continues_exactly(self.state.global_step + 1):
                self.control.should_save = True
            if not math.isfinite(total):
                raise NotFiniteError(
                    f"the loss became {total} at step {self.state.global_step + 1}"
                )
            self.end_step()
        return loss

    def _seconds_unsaved(self) -> float:
        return time.monotonic() - self.saved_at

    def _continues_exactly(self, step: int) -> bool:
        """Whether a checkpoint before optimizer step `step` has all that the run needs later.

        The text that the student has written is in no checkpoint, so it must write anew there.
        """
        return self.writer is None or self.writer.due(step, int(self.args.save_steps))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint; raises NotFiniteError if a weight is NaN or infinite."""
        self._require_finite_weights()
        super()._save_checkpoint(*args, **kwargs)
        self.saved_at = time.monotonic()

    @torch.no_grad()
    def _require_finite_weights(self) -> None:
        """Raise NotFiniteError, on all ranks, as a checkpoint may be written without an evaluation.

        The sums of the weights are finite only if the weights are, and need no memory.
        """
        trained = (each for each in self.student.parameters() if each.requires_grad)
        sums = [sharding.local(weight).sum(dtype=torch.float32) for weight in trained]
        bad = (~torch.stack(sums).isfinite()).sum().to(self.args.device)
        if self.sum_over_ranks(bad) > 0:
            raise NotFiniteError(
                f"the weights became NaN or infinite at step {self.state.global_step}"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log a row; a training row also gets each loss and feature loss by name."""
        if "loss" in logs:
            logs = {**logs, **self.logged.means(self.sum_over_ranks)}
            if self.writer is not None:
                logs["writing_seconds"] = round(self.writer.seconds, 3)
                self.writer.seconds = 0.0
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The mean of each loss over all ranks' validation sequences, in nats per scored token."""
        self.student.eval()
        sums, more = MetricSums(), {}
        if self.blend is None:
            sums.add(self._measured(None).sums)
        else:
            more = self._change_shares(self.blend, sums)
        means = sums.means(self.sum_over_ranks)
        metrics = {f"eval_{name}": value for name, value in {**means, **more}.items()}
        for value in metrics.values():
            if not math.isfinite(value):
                step = self.state.global_step
                raise NotFiniteError(f"the held-out loss became {value} at step {step}")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measured(self, sequences: Any) -> MetricSums:
        """The sums of each loss over validation sequences; None stands for all of them."""
        sums = MetricSums()
        for inputs in self.get_eval_dataloader(sequences):
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                outputs = self.model_wrapped(**_model_inputs(inputs))
            sums.add(_sums(outputs))
        return sums

    def _change_shares(self, trained: TrainedBlend, total: MetricSums) -> dict[str, float]:
        """Measure each source, add to `total`, and change the shares; returns losses and shares."""
        losses = []
        for sequences in trained.heldout:
            sums = self._measured(sequences)
            total.add(sums.sums)
            losses.append(sums.means(self.sum_over_ranks)[LOSS])
        blend = trained.blend
        first = (self.state.global_step + 1) * trained.in_step
        if all(map(math.isfinite, losses)):
            blend.update(losses, first)
        rows = zip(blend.names, losses, blend.shares, strict=True)
        return {
            key: value
            for name, loss, share in rows
            for key, value in ((f"{LOSS} of {name}", loss), (f"share of {name}", share))
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.blend is not None and self.args.should_save:
            state = json.dumps(self.blend.blend.state_dict())
            (Path(output_dir) / BLEND_STATE).write_text(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except CheckpointException:
            assert checkpoint is not None
            raise UserError(
                f"{Path(checkpoint).name}: the optimizer's shards cannot be divided among "
                f"{self.args.world_size} processes: continue with as many as wrote them"
            ) from None
        if checkpoint is not None and self.blend is not None:
            state = json.loads((Path(checkpoint) / BLEND_STATE).read_text())
            self.blend.blend.load_state_dict(state)


class _EvenShares(Dataset[dict[str, Tensor]]):
    """Sequences, padded with unscored ones so that their number is a multiple of `share`.

    All ranks then have the same number of batches, and no sequence is counted twice.
    """

    def __init__(self, sequences: Any, share: int) -> None:
        self.sequences, self.length = sequences, -(-len(sequences) // share) * share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.sequences):
            sequence: dict[str, Tensor] = self.sequences[index]
            return sequence
        first = self.sequences[0]
        return {**first, "labels": torch.full_like(first["labels"], IGNORED)}


def rate_factor(step: int, warmup: int, total: int, min_ratio: float) -> float:
    """The learning rate in optimizer step `step` (from 0), as a share of its peak.

    It rises linearly and reaches 1 in step number `warmup` (counted from 1). It then falls by a
    cosine to `min_ratio`, which it would reach one step after the last step.
    """
    if step < warmup:
        return (step + 1) / warmup
    share = min(1.0, (step + 1 - warmup) / (total + 1 - warmup))
    return min_ratio + (1 - min_ratio) * (1 + math.cos(math.pi * share)) / 2


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    keys = ("input_ids", "position_ids", "labels", "source")
    return {key: inputs[key] for key in keys if key in inputs}


def _sums(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The sums of a micro-batch, for MetricSums."""
    counts = {COUNT_PREFIX + name: count for name, count in outputs["counts"].items()}
    return {**outputs["parts"], **counts, "tokens": outputs["tokens"]}
