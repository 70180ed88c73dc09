"""The student of a distillation: a checkpoint, or a config.json for random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.from_config import on_meta, random_model
from regrow.checkpoint.model_config import accept_config
from regrow.config import Options
from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.sparsity import zeros
from regrow.sparsity.zeros import would_fill
from regrow.stage_dir import digest
from regrow.stages.distill.config import DistillConfig
from regrow.training import adapters, frozen_layers, optimizers, sharding
from regrow.training.adapters import Adapter
from regrow.training.compile import allow_graphs, require_compiler
from regrow.training.features import needs_of
from regrow.training.frozen_layers import decoder_layers
from regrow.training.model_check import check_model
from regrow.training.objective import AnyTeacher
from regrow.training.shared_tokens import token_ids
from regrow.training.teacher import Teacher, TeacherPlacement


def check_compile(config: DistillConfig, options: Options) -> None:
    """Raise UserError if torch_compile is not supported, or if the compiler is missing."""
    if not options.torch_compile:
        return
    incompatible = {
        "feature_losses": bool(config.feature_losses),
        f"fake_quantize {config.fake_quantize}": config.fake_quantize is not None,
        f"adapter {config.adapter}": config.adapter != "none",
        "deepspeed": options.deepspeed is not None,
    }
    for name, given in incompatible.items():
        if given:
            raise UserError(f"torch_compile with {name}: not supported; leave out one of them")
    require_compiler(options)


def compile_layers(
    student: PreTrainedModel, teacher: AnyTeacher, placement: TeacherPlacement, shared: int = 0
) -> None:
    """Compile the decoder layers in place; names and weights do not change.

    Skips the student's first `shared` layers, which the teacher runs for both models, and all
    layers of a teacher whose weights are read from disk layer by layer.
    """
    allow_graphs()
    models = [student]
    if isinstance(teacher, Teacher) and placement != "disk":
        models.append(teacher.model)
    for model in models:
        for layer in decoder_layers(model)[shared:]:
            layer.compile()


def check_attention(student: Student, config: DistillConfig, options: Options) -> None:
    """Raise UserError if the device or the config does not allow the options' attention."""
    kernel = f"attention {options.attention}"
    if options.attention == "sdpa":
        return
    device = options.torch_device()
    if device.type != "cuda":
        raise UserError(f"{kernel} needs a CUDA device, and this is {device}: leave it out")
    incompatible = {
        "the attention feature loss": "attentions" in needs_of(config.feature_losses),
        f"on_policy_share {config.on_policy_share:g}": config.on_policy_share > 0,
        "torch_compile": options.torch_compile,
        "attention_dropout in the student's config.json": student.fields.get("attention_dropout"),
    }
    for name, given in incompatible.items():
        if given:
            raise UserError(f"{kernel} with {name}: not supported; leave out one of them")


SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Student:
    """A student before it is loaded, with the tokenizer and the dtype of `like`."""

    like: Checkpoint
    """The student's checkpoint or, for a student with random weights, its teacher's."""
    config: PretrainedConfig | None = None
    """The config of a student with random weights."""

    @property
    def fingerprint(self) -> str:
        """The hash of its checkpoint or of its config."""
        if self.config is None:
            return self.like.fingerprint
        return digest("fresh", self.config.to_dict())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of the written weights."""
        dtype: torch.dtype = getattr(torch, self.like.main_dtype)
        return dtype

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each weight that is stored in another dtype, such as float32 norms."""
        if self.config is not None:
            return {}
        stored = {name: getattr(torch, self.like.dtype(name)) for name in self.like.names()}
        return {name: dtype for name, dtype in stored.items() if dtype != self.dtype}

    @property
    def vocab_size(self) -> int:
        """The number of rows of its embedding."""
        return int(
            self.like.config["vocab_size"] if self.config is None else self.config.vocab_size
        )

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its config.json."""
        return self.like.config if self.config is None else self.config.to_dict()

    @property
    def parameters(self) -> int:
        """The number of its parameters; tied weights count once."""
        if self.config is None:
            shapes = self.like.shapes.values()
            return sum(torch.Size(shape).numel() for shape in shapes)
        return sum(p.numel() for p in self.on_meta().parameters())

    @property
    def sparsity(self) -> str | None:
        """The sparsity of its weights; None if they are dense or random."""
        return zeros.sparsity_of(self.like) if self.config is None else None

    def adapter(self, config: DistillConfig, device: torch.device) -> Adapter | None:
        """The adapters of the config, if any.

        Raises UserError if the student, the installed packages or the device do not support them.
        """
        if config.adapter == "none":
            return None
        if self.config is not None:
            raise UserError(
                f"adapter {config.adapter}: the student is a config.json, and its random weights "
                "must be trained: set adapter to none"
            )
        adapters.require(config.adapter, device)
        model = self.on_meta()
        targets = adapters.targets_in(model, config.lora_targets)
        adapters.check_rank(model, targets, config.lora_rank)
        quantized = config.adapter == "qlora"
        first = config.freeze_layers
        return Adapter(config.lora_rank, config.lora_alpha, targets, quantized, first)

    def model(
        self,
        seed: int,
        adapter: Adapter | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> PreTrainedModel:
        """The model in `dtype` and eval mode; random weights are drawn with `seed`.

        With `adapter` the weights are frozen in the compute dtype, and float32 adapters train.
        """
        torch.manual_seed(seed)
        if adapter is not None:
            model = adapter.model(self.like, device or torch.device("cpu"), seed)
        elif self.config is None:
            model = self.like.model(dtype)
        else:
            model = random_model(self.config, seed, self.like.folder)
            for parameter in model.parameters():  # not the buffers: RoPE needs float32
                parameter.data = parameter.data.to(dtype)
        check_model(model)
        return _accepting(model)

    def skeleton(self, adapter: Adapter | None = None) -> PreTrainedModel:
        """The model of `model` on the meta device, without its dtypes and its weights."""
        model = self.on_meta().eval()
        return _accepting(model if adapter is None else adapter.attach(model))

    def plain(
        self, trained: PreTrainedModel, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]
    ) -> PreTrainedModel:
        """The trained student as a stock model in `dtype`, except for the names in `dtypes`."""
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
        """The student on the meta device, which takes no memory for weights."""
        return on_meta(self.config or self.like.stock_config())

    @property
    def cut(self) -> Path | None:
        """The folder with the student's weights and its plans; None for a fresh student."""
        return self.like.folder if self.config is None else None


def check_student(student: Student, config: DistillConfig, options: Options) -> Adapter | None:
    """The adapters of the config, if any.

    Raises UserError if the config or the options do not fit this student or this machine.
    """
    device = options.torch_device()
    check_compile(config, options)
    check_attention(student, config, options)
    adapter = student.adapter(config, device)
    if options.torch_compile:
        frozen_layers.decoder_layers(student.on_meta())
    if config.freeze_layers:
        frozen_layers.check(student.on_meta(), config.freeze_layers)
    sharding.require(options, device, config.adapter)
    optimizers.require(config.optimizer, options, config.adapter, config.fake_quantize)
    if student.sparsity is not None and config.keep_zeros:
        check_keeps_zeros(f"the student {student.like.folder} is sparse", config, options)
    return adapter


def check_keeps_zeros(sparse: str, config: DistillConfig, options: Options) -> None:
    """Raise UserError for ways of training that would fill zeros; `sparse` says what has them."""
    advice = "leave it out, or set keep_zeros to false, which makes the student dense again"
    if config.adapter != "none":
        raise would_fill(sparse, f"adapter {config.adapter}", advice)
    if sharding.is_sharded(options):
        raise would_fill(sparse, sharding.name(options), advice)


def _accepting(model: PreTrainedModel) -> PreTrainedModel:
    """The model, which reads its checkpoints by the names on disk, all of whose tensors it uses."""
    with suppress(UserError):  # a model without a table has its own names on disk
        families.accept_disk_names(families.of_config(model.config.to_dict()), model)
    model.register_load_state_dict_post_hook(_require_all_used)
    return model


def _require_all_used(module: Any, keys: Any) -> None:
    """Check a checkpoint that Trainer loads, to resume or at the end: all its tensors are used."""
    assert not keys.unexpected_keys, f"unused tensors of a checkpoint: {keys.unexpected_keys[:3]}"


def open_student(student: str | Path | Checkpoint, teacher: Checkpoint) -> Student:
    """Open a student from a folder, hub id, GGUF file, or config.json (random weights).

    Raises UserError if it cannot be opened, or if the vocabulary of a config.json is too small.
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
            "the further rows are not trained, and their ids may be generated; leave them out"
        )
    return Student(teacher, config)


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no config.json for a student with random weights at {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise UserError(f"{path} names no model_type: give the config.json of a Hugging Face model")
    return fields


def _config(path: Path, fields: dict[str, Any], teacher: Checkpoint) -> PretrainedConfig:
    """The stock config; special token ids that the file lacks are the teacher's."""
    special = {key: teacher.config[key] for key in SPECIAL_IDS if key in teacher.config}
    given = {key: value for key, value in fields.items() if key != "auto_map"}
    config = accept_config({**special, **given}, path)
    if config is None:
        raise UserError(f"{path}: transformers knows no model_type {fields['model_type']!r}")
    return config
