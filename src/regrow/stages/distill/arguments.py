"""What the trainer is told of a distillation."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from regrow.options import Options
from regrow.stages.distill.budget import Budget
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.resume import TRAINER
from regrow.training import sharding


def arguments_of(
    folder: Path,
    config: DistillConfig,
    options: Options,
    device: torch.device,
    budget: Budget,
    chosen_by: str,
) -> TrainingArguments:
    """The trainer's; `chosen_by` is the held-out loss by which the best checkpoint is chosen."""
    steps, micro, accumulation = budget
    every = max(1, min(steps, round(config.eval_tokens / config.batch_tokens)))
    arguments = TrainingArguments(
        output_dir=str(folder / TRAINER),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_ratio},
        warmup_steps=max(1, round(config.warmup_ratio * steps)),
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=device.type == "cpu",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best and the last; with 1 Trainer drops the last when it ends
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{chosen_by}",
        greater_is_better=False,
        report_to=_trackers(folder),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,  # there are none, and the search takes time
        ignore_data_skip=False,
        disable_tqdm=True,
        seed=config.seed,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **sharding.training_fields(options),
    )
    if sharding.is_sharded(options):
        sharding.keep_precision(arguments)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without torchrun: DataParallel would multiply batch_tokens
    return arguments


def _trackers(folder: Path) -> list[str]:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return []
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return ["tensorboard"]
