"""The distillation trainer: transformers' Trainer on the loss that `bind_loss` gives.

What is trained beside the student (projections of feature losses, the loss balance) is kept in its
checkpoints.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer

from regrow.errors import UserError
from regrow.training.adapters import has_adapter, load_adapter
from regrow.training.callbacks import COUNT_PREFIX, MetricSums
from regrow.training.feature_loss_weights import MAIN, FeatureLosses

FEATURE_LOSS_STATE = "feature_losses.pt"
"""Beside optimizer.pt in each checkpoint; the student that is written has none of it."""


class FeatureLossTrainer(Trainer):
    """Trainer with a SignalMix: its projections in the optimizer, its state in the checkpoints.

    Their gradients are averaged over the ranks, as DDP does for the student's, and are not clipped.
    """

    def __init__(
        self, *args: Any, feature_losses: FeatureLosses | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.feature_losses, self.this_step = feature_losses, MetricSums()

    def end_step(self) -> None:
        """Before the optimizer's step: what DDP does for the student, for what is outside it."""
        if self.feature_losses is None:
            return
        for projection in self.feature_losses.projections():
            projection.grad = self.accelerator.reduce(projection.grad, "mean")
        if self.feature_losses.balance is not None:
            self.feature_losses.balance.update(self.this_step.means(self.sum_over_ranks))

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """The sum of each rank's values; the values themselves with one rank."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The student's optimizer, with the feature losses' projections as a group of their own."""
        there = self.optimizer is not None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.feature_losses is not None and self.feature_losses.projections() and not there:
            group = {"params": self.feature_losses.projections(), "weight_decay": 0.0}
            optimizer.add_param_group(group)
            optimizer.register_step_post_hook(self._zero_projections)
        return optimizer

    def _zero_projections(self, *_: Any) -> None:
        """After a step; Trainer does it for the student."""
        assert self.feature_losses is not None
        for projection in self.feature_losses.projections():
            projection.grad = None

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        state = {} if self.feature_losses is None else self.feature_losses.state_dict()
        if state and self.args.should_save:
            torch.save(state, Path(output_dir) / FEATURE_LOSS_STATE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if (
            checkpoint is not None
            and self.feature_losses is not None
            and self.feature_losses.state_dict()
        ):
            state = torch.load(Path(checkpoint) / FEATURE_LOSS_STATE, map_location="cpu")
            self.feature_losses.load_state_dict(state)


class DistillTrainer(FeatureLossTrainer):
    """Sum of the loss ÷ the scored tokens of the whole step, over accumulation and ranks.

    Blocks are read in their own order: a longer budget goes on where a shorter one ended.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logged = MetricSums()
        self.model_accepts_loss_kwargs = True  # asks Trainer to count the scored tokens
        self.loss_is_scaled_for_ga = True
        if self.args.world_size > 1 and self.eval_dataset is not None:
            share = self.args.world_size * self.args.per_device_eval_batch_size
            self.eval_dataset = _EvenShares(self.eval_dataset, share)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return SequentialSampler(dataset)

    @property
    def student(self) -> PreTrainedModel:
        """The model in training, unwrapped."""
        assert isinstance(self.model, PreTrainedModel)
        return self.model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """A checkpoint holds adapters alone where there are any, which Trainer does not know."""
        if has_adapter(self.student):
            load_adapter(self.student, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if has_adapter(self.student):
            assert self.state.best_model_checkpoint is not None
            load_adapter(self.student, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mixed loss of one micro-batch, as its share of the step's mean per scored token."""
        outputs = model(**_model_inputs(inputs))
        row = _sums(outputs)
        self.logged.add(row)
        self.this_step.add({**row, MAIN: outputs["main"]})
        if num_items_in_batch is None:
            num_items_in_batch = outputs["tokens"]
        # A step without scored tokens has the sum 0, and must not become 0 / 0.
        count = torch.as_tensor(num_items_in_batch, device=outputs["loss"].device).clamp_min(1)
        loss = outputs["loss"] / count
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; raises UserError when the loss is no number any more."""
        loss = super().training_step(*args, **kwargs)
        if not bool(loss.isfinite()):
            raise UserError(f"the loss became {float(loss)} at step {self.state.global_step + 1}")
        if self.accelerator.sync_gradients:
            self.end_step()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's; a row of training gets each loss and feature loss under its own name."""
        if "loss" in logs:
            logs = {**logs, **self.logged.means(self.sum_over_ranks)}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean of each loss over the held-out blocks, in nats per scored token, over all ranks."""
        self.student.eval()
        tally = MetricSums()
        dataloader = self.get_eval_dataloader()
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                outputs = self.model_wrapped(**_model_inputs(inputs))
            tally.add(_sums(outputs))
        means = tally.means(self.sum_over_ranks)
        metrics = {f"eval_{name}": value for name, value in means.items()}
        for value in metrics.values():
            if not math.isfinite(value):
                step = self.state.global_step
                raise UserError(f"the held-out loss became {value} at step {step}")
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _EvenShares(Dataset[dict[str, Tensor]]):
    """Blocks, and some in which nothing is scored, so that their number is a multiple of `share`.

    Every rank then has as many batches as the others, and no block is counted twice to fill up.
    """

    def __init__(self, blocks: Any, share: int) -> None:
        self.blocks, self.length = blocks, -(-len(blocks) // share) * share

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < len(self.blocks):
            block: dict[str, Tensor] = self.blocks[index]
            return block
        return {**self.blocks[0], "labels": torch.full_like(self.blocks[0]["labels"], -100)}


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    keys = ("input_ids", "position_ids", "labels", "source")
    return {key: inputs[key] for key in keys if key in inputs}


def _sums(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """A micro-batch's row for a Tally."""
    counts = {COUNT_PREFIX + name: count for name, count in outputs["counts"].items()}
    return {**outputs["parts"], **counts, "tokens": outputs["tokens"]}
