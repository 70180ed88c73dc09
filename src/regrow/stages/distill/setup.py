"""Student, teacher, text and training arguments of a distillation, checked before any slow work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import TrainingArguments

from regrow import families, plugins
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences, build_sequences
from regrow.errors import UserError
from regrow.quantization.formats import Scheme, find_scheme
from regrow.runtime import distributed
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.features import feature_losses_between
from regrow.stages.distill.resume import TRAINER
from regrow.stages.distill.student import Student, check_student
from regrow.stages.distill.teacher import TeacherSetup, teacher_placement
from regrow.training import sharding
from regrow.training.adapters import Adapter
from regrow.training.feature_loss_weights import FeatureLosses
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher_placement import TeacherPlacement


class Budget(NamedTuple):
    """Optimizer steps, blocks per micro-batch, micro-batches per step and device."""

    steps: int
    micro: int
    accumulation: int


def budget_of(config: DistillConfig, data: DataConfig, options: Options) -> Budget:
    """The budget of `config.tokens`; a micro-batch has at most `options.batch_size` blocks.

    Raises UserError when batch_tokens cannot be made of whole blocks on every device.
    """
    devices = distributed.world_size()
    unit = data.sequence_length * devices
    if config.batch_tokens % unit:
        raise UserError(
            f"batch_tokens {config.batch_tokens} is no multiple of {unit} (sequence_length "
            f"{data.sequence_length} × {devices} devices); change one of them"
        )
    sequences = config.batch_tokens // unit
    micro = max(n for n in range(1, min(options.batch_size, sequences) + 1) if sequences % n == 0)
    return Budget(steps_in(config), micro, sequences // micro)


def steps_in(config: DistillConfig) -> int:
    """Optimizer steps of the budget."""
    return max(1, round(config.tokens / config.batch_tokens))


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


def rounding_of(student: Student, config: DistillConfig, sharded: bool) -> Scheme | None:
    """The scheme to train for, if any.

    Raises UserError for experts, which are no linear layers, and beside adapters or shares.
    """
    name = config.fake_quantize
    if name is None:
        return None
    if config.adapter != "none" or sharded:
        what = f"adapter {config.adapter}" if config.adapter != "none" else "sharding fsdp"
        raise UserError(f"fake_quantize {name} with {what}: set one of them to none")
    model_type = (student.config.to_dict() if student.config else student.like.config)["model_type"]
    known = model_type in plugins.names(families.__name__)
    if known and "experts" in families.get(model_type).config_keys:
        raise UserError(f"fake_quantize {name}: not for a mixture of experts ({model_type})")
    return find_scheme(name)


@dataclass(frozen=True)
class DistillSetup:
    """Who is taught by whom, by what losses, in what way."""

    student: Student
    teachers: TeacherSetup
    loss_weights: LossWeights
    feature_losses: FeatureLosses | None
    adapter: Adapter | None
    rounding: Scheme | None
    budget: Budget
    placement: TeacherPlacement
    config: DistillConfig
    options: Options

    @classmethod
    def of(
        cls,
        student: Student,
        teachers: TeacherSetup,
        loss_weights: LossWeights,
        data: DataConfig,
        config: DistillConfig,
        options: Options,
    ) -> DistillSetup:
        """Raises UserError for what this student, its teacher and `config` cannot do together."""
        placement = teacher_placement(config, options)
        if placement == "disk":  # block by block, by the family's table
            for each in teachers.checkpoints:
                families.of(each)
        feature_losses = feature_losses_between(student, teachers.teacher, config)
        adapter = check_student(student, config, options)
        rounding = rounding_of(student, config, sharding.is_sharded(options))
        budget = budget_of(config, data, options)
        return cls(
            student,
            teachers,
            loss_weights,
            feature_losses,
            adapter,
            rounding,
            budget,
            placement,
            config,
            options,
        )

    @property
    def sharded(self) -> bool:
        """Whether the ranks share the weights out among them."""
        return sharding.is_sharded(self.options)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are written: those of a grid are exact in float32 alone."""
        return self.student.dtype if self.rounding is None else torch.float32

    def bytes(self) -> int:
        """What the run needs on disk: the best, the last and the next checkpoint, and its result.

        A checkpoint has weights and the optimizer's two moments in float32.
        """
        student, adapter = self.student, self.adapter
        trained = student.parameters if adapter is None else adapter.parameters(student.on_meta())
        each = 16 if self.sharded else 12  # in shares the weights are written twice
        return trained * 3 * each + student.parameters * self.dtype.itemsize

    def sequences(self, data: DataConfig, text: DataConfig) -> tuple[Sequences, Sequences]:
        """Those to train on, of `text`, and the held-out ones of `data`.

        Raises UserError for too little text, and for text that one of the models cannot read.
        """
        tokenizer = self.teachers.tokenizer()
        heldout = build_sequences(data, tokenizer, "heldout", self.config.heldout_sequences)
        count = self.budget.steps * self.config.batch_tokens // data.sequence_length
        train = build_sequences(text, tokenizer, "train", count)
        self.teachers.check(heldout, train)
        return train, heldout
