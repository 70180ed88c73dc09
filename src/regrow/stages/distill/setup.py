"""Everything that a distillation needs, opened and checked before any slow work."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences
from regrow.errors import UserError
from regrow.plan import stored_plans
from regrow.quantization.formats import Scheme, find_scheme
from regrow.runtime import distributed
from regrow.runtime.precision import half
from regrow.runtime.progress import say
from regrow.stages.distill.config import LAST, DistillConfig
from regrow.stages.distill.student import Student, check_student
from regrow.stages.distill.teacher import TeacherSetup, teacher_placement
from regrow.stages.distill.text import loss_weights_of, training_text
from regrow.training import optimizers, sharding
from regrow.training.adapters import Adapter
from regrow.training.callbacks import CHOSEN_BY
from regrow.training.dynamic_blend import LOSS
from regrow.training.features import FeatureLosses, LayerMapping, LossBalancer, at_depths, needs_of
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import TeacherPlacement
from regrow.training.text import text_for

TRAINER = "trainer"
"""The folder of the trainer's checkpoints, inside the stage's folder."""

MEASUREMENTS = 40
"""Measurements of the held-out losses in a long run, unless the config says otherwise."""
MEASURED_TOKENS = 25_000
"""The least training tokens between two of these measurements."""
MEASURED_STEPS = 10
"""The least optimizer steps between two of them."""


class Budget(NamedTuple):
    """Optimizer steps, sequences per micro-batch, micro-batches per step and device."""

    steps: int
    micro: int
    accumulation: int


def budget_of(config: DistillConfig, data: DataConfig, options: Options) -> Budget:
    """The budget of `config.tokens`; a micro-batch has at most `options.batch_size` sequences.

    Raises UserError unless batch_tokens is a whole number of sequences on every device.
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
    """The number of optimizer steps of the budget."""
    return max(1, round(config.tokens / config.batch_tokens))


def steps_between_measurements(config: DistillConfig) -> int:
    """The number of optimizer steps from one measurement of the held-out losses to the next."""
    tokens, least = config.eval_tokens, 1
    if tokens is None:
        tokens, least = max(MEASURED_TOKENS, config.tokens // MEASUREMENTS), MEASURED_STEPS
    return min(steps_in(config), max(least, round(tokens / config.batch_tokens)))


def arguments_of(
    folder: Path,
    config: DistillConfig,
    options: Options,
    device: torch.device,
    budget: Budget,
    chosen_by: str,
) -> TrainingArguments:
    """The trainer's arguments; the loss `chosen_by` chooses the best checkpoint, unless the last
    one is kept.
    """
    assert config.learning_rate is not None  # `distill` has chosen one
    steps, micro, accumulation = budget
    every = steps_between_measurements(config)
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
        bf16=torch.bfloat16 in (half(device), optimizers.KINDS[config.optimizer].dtype),
        use_cpu=device.type == "cpu",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # best and last; with 1, Trainer deletes the last one at the end
        load_best_model_at_end=config.chosen_by != LAST,
        metric_for_best_model=f"eval_{chosen_by}",
        greater_is_better=False,
        report_to=_trackers(folder),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,  # all parameters are used, and the search takes time
        ignore_data_skip=False,
        disable_tqdm=True,
        seed=config.seed,
        activation_checkpointing=options.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        **optimizers.KINDS[config.optimizer].fields,
        **sharding.training_fields(options),
    )
    if sharding.is_sharded(options):
        sharding.keep_precision(arguments)
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without torchrun, DataParallel would multiply batch_tokens
    return arguments


def _trackers(folder: Path) -> list[str]:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return []
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return ["tensorboard"]


def fake_quantize_scheme(student: Student, config: DistillConfig, sharded: bool) -> Scheme | None:
    """The scheme that weights are rounded to in training, if any.

    Raises UserError for experts, which are not linear layers, and with adapters or sharding.
    """
    name = config.fake_quantize
    if name is None:
        return None
    if config.adapter != "none" or sharded:
        what = f"adapter {config.adapter}" if config.adapter != "none" else "sharding"
        raise UserError(f"fake_quantize {name} with {what}: set one of them to none")
    fields = student.config.to_dict() if student.config else student.like.config
    if "experts" in families.of_config(fields).config_keys:
        raise UserError(
            f"fake_quantize {name}: not for a mixture of experts ({fields['model_type']})"
        )
    return find_scheme(name)


@dataclass(frozen=True)
class DistillSetup:
    """Student, teachers, text, losses, and how they are trained and placed."""

    student: Student
    teachers: TeacherSetup
    data: DataConfig
    text: DataConfig
    """The text to train on: `data`, or what replaces it or is added to it."""
    loss_weights: LossWeights
    feature_losses: FeatureLosses | None
    adapter: Adapter | None
    scheme: Scheme | None
    """The scheme of `fake_quantize`."""
    budget: Budget
    placement: TeacherPlacement
    config: DistillConfig
    options: Options

    @classmethod
    def of(
        cls,
        student: Student,
        teachers: TeacherSetup,
        data: DataConfig,
        config: DistillConfig,
        options: Options,
    ) -> DistillSetup:
        """Raises UserError if student, teachers, text, config and options are not compatible."""
        text = training_text(data, config)
        loss_weights = loss_weights_of(config, text)
        placement = teacher_placement(config, options)
        if placement == "disk":  # reading layer by layer needs the family's table
            for each in teachers.checkpoints:
                families.of(each)
        feature_losses = feature_losses_between(student, teachers.teacher, config)
        adapter = check_student(student, config, options)
        scheme = fake_quantize_scheme(student, config, sharding.is_sharded(options))
        budget = budget_of(config, data, options)
        return cls(
            student,
            teachers,
            data,
            text,
            loss_weights,
            feature_losses,
            adapter,
            scheme,
            budget,
            placement,
            config,
            options,
        )

    @property
    def chosen_by(self) -> str:
        """The loss that is followed on the validation sequences, and chooses the best student."""
        asked = self.config.chosen_by
        return self.teachers.chosen_by if asked in (CHOSEN_BY, LAST) else asked

    @property
    def measured(self) -> tuple[str, ...]:
        """The losses that are measured on held-out text beside the training losses."""
        more = (LOSS,) if self.config.dynamic_blend else ()
        asked = self.config.chosen_by
        return (CHOSEN_BY if asked == LAST else asked, *more)

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over the ranks."""
        return sharding.is_sharded(self.options)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the written weights; weights on a grid are exact only in float32."""
        return self.student.dtype if self.scheme is None else torch.float32

    def bytes(self) -> int:
        """Bytes on disk: the best, the last and the next checkpoint, and the written student.

        A checkpoint has the weights and the optimizer's two moments.
        """
        student, adapter = self.student, self.adapter
        trained = student.parameters if adapter is None else adapter.parameters(student.on_meta())
        kind = optimizers.KINDS[self.config.optimizer]
        each = kind.dtype.itemsize + kind.moment_bytes
        return round(trained * 3 * each) + student.parameters * self.dtype.itemsize

    @property
    def configs(self) -> list[dict[str, Any]]:
        """The configs of all models that read the text."""
        return [self.student.fields, *(each.config for each in self.teachers.checkpoints)]

    def sequences(self) -> tuple[Sequences, Sequences]:
        """The training sequences, from `text`, and the validation sequences, from `data`.

        The validation sequences choose the best checkpoint; `evaluate` does not read their split.
        Raises UserError for too little text, and for tokens that one of the models lacks.
        """
        tokenizer, configs = self.teachers.tokenizer(), self.configs
        count = self.config.heldout_sequences
        heldout = text_for(configs, self.data, tokenizer, "validation", count)
        count = self.budget.steps * self.config.batch_tokens // self.data.sequence_length
        train = text_for(configs, self.text, tokenizer, "train", count)
        self.teachers.check(heldout, train)
        return train, heldout


def feature_losses_between(
    student: Student, teacher: Checkpoint, config: DistillConfig
) -> FeatureLosses | None:
    """The feature losses of a config with their layer mapping; None if the config has none.

    The mapping follows the plan by which the student was cut from the teacher. Without a plan,
    layers are paired by depth, with learned projections, and a message says so. Raises UserError if
    a feature loss has nothing to compare.
    """
    if not config.feature_losses:
        return None
    needs, mapping = needs_of(config.feature_losses), _mapping_by_plan(student, teacher)
    dropout = _config(student).get("attention_dropout")
    if "attentions" in needs and dropout:
        raise UserError(
            "feature_losses: attention compares whole rows, but the student's config.json has "
            f"attention_dropout {dropout}: set it to 0"
        )
    if mapping is None:
        mapping = _mapping_by_depth(student, teacher, needs, config.seed)
    layers = len(mapping.layers)
    if needs & {"outputs", "lens"} and not mapping.outputs:
        names = [
            name for name in config.feature_losses if needs_of({name: 1.0}) & {"outputs", "lens"}
        ]
        raise UserError(
            f"feature_losses: {names[0]} compares the outputs of layers before the last one, and "
            f"none of this student's ({layers} layers) is paired with a teacher layer; leave it out"
        )
    if "lens" in needs:
        mapping = mapping.read_at(at_depths(mapping.outputs, layers, config.lens_layers))
    balancer = LossBalancer() if config.balance_feature_losses else None
    return FeatureLosses(config.feature_losses, mapping, balancer)


def _mapping_by_plan(student: Student, teacher: Checkpoint) -> LayerMapping | None:
    """The mapping by the student's plan, or from the teacher to itself; None if neither applies."""
    for plan in () if student.cut is None else stored_plans(student.cut):
        if plan.fingerprint == teacher.fingerprint:
            return LayerMapping.of_plan(plan)
    if student.fingerprint == teacher.fingerprint:
        return LayerMapping.of_same(_size(teacher.config, "num_hidden_layers"))
    return None


def _mapping_by_depth(
    student: Student, teacher: Checkpoint, needs: frozenset[str], seed: int
) -> LayerMapping:
    configs = (_config(student), teacher.config)
    mapping = LayerMapping.by_depth(*(_size(each, "num_hidden_layers") for each in configs))
    channels = (_size(configs[0], "hidden_size"), _size(configs[1], "hidden_size"))
    mapping.project(channels, needs, seed)
    message = f"distill: no plan leads from {teacher.folder} to this student: layers are paired by "
    message += "relative depth"
    if mapping.projections:
        message += f", {len(mapping.projections)} projections of their channels are learned"
    if "attentions" in needs:
        message += ", attention is compared as the mean of a layer's heads"
    say(message)
    return mapping


def _config(student: Student) -> dict[str, Any]:
    return student.like.config if student.config is None else student.config.to_dict()


def _size(config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise UserError(f"feature_losses: the config of {config.get('model_type')} has no {key}")
    return int(config[key])
