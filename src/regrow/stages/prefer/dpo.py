"""Trains a student on pairs of answers with trl's DPOTrainer, from their token ids."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.errors import UserError
from regrow.runtime.precision import half
from regrow.runtime.progress import Progress, progress, say
from regrow.sparsity import zeros
from regrow.stages.prefer import PreferConfig
from regrow.stages.prefer.rank import Pair
from regrow.training.checkpoints import last_checkpoint
from regrow.training.frozen_layers import decoder_layers

TRAINER = "trainer"
"""The folder of the trainer's checkpoints, inside the stage's folder."""
LOGGED = {
    "loss": "DPO loss",
    "rewards/accuracies": "accuracy of the pairs",
    "rewards/margins": "margin",
}
STILL = 0.02
"""A final loss that is within this share of ln 2, the loss of equal models, is that of a student
that is still what it was."""


class PairTrainer(DPOTrainer):
    """A DPOTrainer whose rows are token ids already.

    The tokens that the student drew are thus the tokens that are scored: no text is tokenized
    again, and no chat template decides where an answer begins.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def train_pairs(
    student: Checkpoint, pairs: list[Pair], folder: Path, config: PreferConfig, options: Options
) -> tuple[PreTrainedModel, dict[str, float]]:
    """The trained student in its stored dtype, and the means of the last tenth of the steps.

    Computes in bfloat16 (or what `precision.half` says) with float32 weights. Raises UserError if
    the loss becomes NaN.
    """
    model, reference = student.model(torch.float32), student.model(torch.float32)
    zeros.keep("prefer", decoder_layers(model), student)
    if model.config.model_type in plugins.names(families.__name__):
        families.accept_disk_names(families.get(model.config.model_type), model)
    tokenizer, settings = student.tokenizer(), copy.deepcopy(model.generation_config)
    rows = [
        {"prompt_ids": p.prompt, "chosen_ids": p.chosen, "rejected_ids": p.rejected} for p in pairs
    ]
    pad = model.config.pad_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl's and torch's, which no user can act on
        trainer = PairTrainer(
            model=model,
            ref_model=reference,
            args=_arguments(len(pairs), folder, config, options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    trainer.remove_callback(PrinterCallback)
    last = last_checkpoint(folder / TRAINER)
    if last is not None:
        say(f"prefer: continues from {last.name}")
    with progress("prefer", len(pairs) * config.epochs, "pairs") as counter:
        trainer.add_callback(Watch(folder / "metrics.jsonl", counter, config.batch_pairs))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise UserError("prefer: the weights are no longer finite: lower the learning rate")
    tail = logged[-max(1, len(logged) // 10) :]
    means = {shown: sum(row[name] for row in tail) / len(tail) for name, shown in LOGGED.items()}
    _say_if_unchanged(means["DPO loss"], config)
    model.config.pad_token_id, model.generation_config = pad, settings
    dtypes = {name: getattr(torch, student.dtype(name)) for name in student.names()}
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(dtypes.get(name, getattr(torch, student.main_dtype)))
    model.config.use_cache = True
    return model, means


def _say_if_unchanged(loss: float, config: PreferConfig) -> None:
    untrained = math.log(2)
    if abs(loss / untrained - 1) < STILL:
        say(
            f"prefer: the student has hardly changed: the loss is {loss:.3f}, and {untrained:.3f} "
            f"without any training: raise learning_rate ({config.learning_rate:g}) or epochs "
            f"({config.epochs})"
        )


def _arguments(count: int, folder: Path, config: PreferConfig, options: Options) -> DPOConfig:
    micro = max(n for n in range(1, options.batch_size + 1) if config.batch_pairs % n == 0)
    device = options.torch_device()
    return DPOConfig(
        output_dir=str(folder / TRAINER),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=config.batch_pairs // micro,
        num_train_epochs=config.epochs,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(config.warmup_ratio * config.epochs * count / config.batch_pairs),
        beta=config.beta,
        max_length=None,
        bf16=half(device) == torch.bfloat16,
        use_cpu=device.type == "cpu",
        optim="adamw_torch_fused",
        gradient_checkpointing=options.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(1, config.save_pairs // config.batch_pairs),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        seed=config.seed,
    )


class Watch(TrainerCallback):
    """Shows progress, and appends each logged step to metrics.jsonl."""

    def __init__(self, path: Path, counter: Progress, batch_pairs: int) -> None:
        self.path, self.counter, self.batch_pairs = path, counter, batch_pairs
        self.start = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start at the last checkpoint, and drop the rows that will be repeated."""
        self.counter.resume_at(min(self.counter.total, state.global_step * self.batch_pairs))
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        rows = [text for text in lines if text.endswith("}")]
        kept = [text for text in rows if json.loads(text)["step"] <= state.global_step]
        self.path.write_text("".join(text + "\n" for text in kept))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Append a row, and show the loss."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "loss" not in numbers:
            return
        done = min(self.counter.total, state.global_step * self.batch_pairs)
        self.counter.advance(done - self.counter.done, f"loss {numbers['loss']:.3f}")
        seconds = round(time.monotonic() - self.start, 2)
        row = {"stage": "prefer", "step": state.global_step, "seconds": seconds, **numbers}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
