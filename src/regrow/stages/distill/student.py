"""What a distillation begins with: a checkpoint, or the config.json of a model to be made fresh."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from regrow import families, plugins
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.model_config import accept_config
from regrow.config import Options
from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import digest
from regrow.stages.distill.config import DistillConfig
from regrow.training import adapters, frozen_layers, sharding
from regrow.training.adapters import Adapter
from regrow.training.frozen_layers import decoder_layers
from regrow.training.objective import AnyTeacher
from regrow.training.shared_tokens import token_ids
from regrow.training.teacher import Teacher
from regrow.training.teacher_placement import TeacherPlacement

GRAPHS = 64
"""Kinds of blocks times ways to run them (training, measuring, a last, smaller batch), at most."""


def check_compile(config: DistillConfig, options: Options) -> None:
    """Raise UserError for what cannot be compiled, and for a missing compiler."""
    if not options.torch_compile:
        return
    others = {
        "feature_losses": bool(config.feature_losses),
        f"fake_quantize {config.fake_quantize}": config.fake_quantize is not None,
        f"adapter {config.adapter}": config.adapter != "none",
        "sharding fsdp": sharding.is_sharded(options),
        "deepspeed": options.deepspeed is not None,
    }
    for name, asked in others.items():
        if asked:
            raise UserError(f"torch_compile with {name}: not supported; leave out one of them")
    if options.torch_device().type == "cpu" and not any(
        map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))
    ):
        raise UserError("torch_compile needs a C++ compiler, and g++ is not there: install it")


def compile_layers(
    student: PreTrainedModel, teacher: AnyTeacher, hold: TeacherPlacement, shared: int = 0
) -> None:
    """Compile the blocks in place; names and weights stay, and so does what is saved.

    All but the first `shared` ones, which the teacher runs for both, and not those of a teacher
    whose weights come from disk as they run.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    models = [student]
    if isinstance(teacher, Teacher) and hold != "disk":
        models.append(teacher.model)
    for model in models:
        for layer in decoder_layers(model)[shared:]:
            layer.compile()


if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Student:
    """A student to be; it has the tokenizer and the dtype of `like`."""

    like: Checkpoint
    """The student itself, or the teacher of a fresh one."""
    config: PretrainedConfig | None = None
    """Config of a fresh student."""

    @property
    def fingerprint(self) -> str:
        """Of the checkpoint, or of the config."""
        if self.config is None:
            return self.like.fingerprint
        return digest("fresh", self.config.to_dict())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the result is written in."""
        main: torch.dtype = getattr(torch, self.like.main_dtype)
        return main

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each weight that is not stored in `dtype`, for instance of float32 norms."""
        if self.config is not None:
            return {}
        stored = {name: getattr(torch, self.like.dtype(name)) for name in self.like.names()}
        return {name: dtype for name, dtype in stored.items() if dtype != self.dtype}

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding."""
        return int(
            self.like.config["vocab_size"] if self.config is None else self.config.vocab_size
        )

    @property
    def parameters(self) -> int:
        """How many there are, tied weights once."""
        if self.config is None:
            shapes = self.like.shapes.values()
            return sum(torch.Size(shape).numel() for shape in shapes)
        return sum(p.numel() for p in self.on_meta().parameters())

    def adapter(self, config: DistillConfig, device: torch.device) -> Adapter | None:
        """The adapters asked for; raises UserError for what this student or machine has not."""
        if config.adapter == "none":
            return None
        if self.config is not None:
            raise UserError(
                f"adapter {config.adapter}: the student is made fresh from a config.json, and its "
                "random weights must train: set adapter to none"
            )
        adapters.require(config.adapter, device)
        targets = adapters.targets_in(self.on_meta(), config.lora_targets)
        quantized = config.adapter == "qlora"
        first = config.freeze_layers
        return Adapter(config.lora_rank, config.lora_alpha, targets, quantized, first)

    def model(
        self, seed: int, adapter: Adapter | None = None, device: torch.device | None = None
    ) -> PreTrainedModel:
        """The float32 model, in eval mode; random weights of a fresh one follow from `seed`.

        With `adapter` the weights are frozen as they are stored, and float32 adapters train.
        """
        torch.manual_seed(seed)
        if adapter is not None:
            made = adapter.model(self.like, device or torch.device("cpu"), seed)
        elif self.config is None:
            made = self.like.model(torch.float32)
        else:
            made = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
            if (self.like.folder / "generation_config.json").exists():
                made.generation_config = GenerationConfig.from_pretrained(str(self.like.folder))
        if made.config.model_type in plugins.names(families.__name__):
            families.accept_disk_names(families.get(made.config.model_type), made)
        made.register_load_state_dict_post_hook(_all_taken)
        return made

    def plain(
        self, trained: PreTrainedModel, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]
    ) -> PreTrainedModel:
        """The trained student as a plain stock model in `dtype`, but for the names in `dtypes`."""
        if not adapters.has_adapter(trained):
            for name, weight in trained.named_parameters():
                weight.data = weight.data.to(dtypes.get(name, dtype))
            return trained
        merged = self.like.model(dtype)
        for name, weight in merged.named_parameters():
            if name in dtypes:
                weight.data = self.like.tensor(name)
        adapters.merge_into(merged, trained)
        return merged

    def on_meta(self) -> PreTrainedModel:
        """The student without memory for its weights."""
        return _on_meta(self.config or AutoConfig.from_pretrained(str(self.like.folder)))

    def carried(self, name: str) -> Path | None:
        """The file `name` beside the student's weights, if there is one."""
        path = self.like.folder / name
        return path if self.config is None and path.exists() else None


def check_student(student: Student, config: DistillConfig, options: Options) -> Adapter | None:
    """The adapters asked for, if any.

    Raises UserError when this student or machine cannot be trained as config and options ask.
    """
    device = options.torch_device()
    check_compile(config, options)
    adapter = student.adapter(config, device)
    if options.torch_compile:
        frozen_layers.decoder_layers(student.on_meta())
    if config.freeze_layers:
        frozen_layers.check(student.on_meta(), config.freeze_layers)
    sharding.require(options, device, config.adapter)
    return adapter


def _all_taken(module: Any, found: Any) -> None:
    """Trainer resumes from, and ends with, a checkpoint: all of it, or not at all."""
    assert not found.unexpected_keys, f"not taken from a checkpoint: {found.unexpected_keys[:3]}"


def open_student(student: str | Path | Checkpoint, teacher: Checkpoint) -> Student:
    """The student behind a folder, a hub id, a GGUF file, or a config.json (made fresh).

    Raises UserError for what cannot be opened or made, or lacks token ids that the teacher has.
    """
    if isinstance(student, Checkpoint):
        return Student(student)
    if Path(student).suffix != ".json":
        return Student(load(student))
    path = Path(student).expanduser()
    config = _config(path, _read(path), teacher)
    needed = token_ids(teacher.tokenizer())
    if config.vocab_size < needed:
        raise UserError(
            f"{path}: vocab_size {config.vocab_size} is too small for the teacher's tokenizer; "
            f"give {needed} or more"
        )
    if config.vocab_size > needed:
        say(
            f"distill: {path} has vocab_size {config.vocab_size}, and the tokenizer {needed} ids: "
            "rows beyond them are not taught, and may be generated; leave them out"
        )
    return Student(teacher, config)


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config for a fresh student at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{path} names no model_type: give the config.json of a Hugging Face model")
    return fields


def _config(path: Path, fields: dict[str, Any], teacher: Checkpoint) -> PretrainedConfig:
    """The stock config, with the teacher's special tokens where the file names none."""
    special = {key: teacher.config[key] for key in SPECIAL_IDS if key in teacher.config}
    given = {key: value for key, value in fields.items() if key != "auto_map"}
    config = accept_config({**special, **given}, path)
    if config is None:
        raise UserError(f"{path}: transformers knows no model_type {fields['model_type']!r}")
    return config


def _on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """The model without memory for its weights."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return made
