"""The teacher of a distillation: a live model, several, or a cache; opened before any slow work."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences
from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stage_dir import Figure
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.cross_tokenizer import aligner_of, say_coverage
from regrow.stages.distill.student import Student
from regrow.stages.distill.text import loss_weights_of
from regrow.training import frozen_layers, sharding
from regrow.training.cache.folder import Cache, shared_ids
from regrow.training.cache.teacher import CachedTeacher, check_use, head_from
from regrow.training.callbacks import CHOSEN_BY, SPAN_CHOSEN_BY
from regrow.training.cross_tokenizer.align import Aligner
from regrow.training.cross_tokenizer.teacher import CrossTokenizerTeacher
from regrow.training.feature_loss_weights import FeatureLosses
from regrow.training.frozen_layers import SharedPrefix
from regrow.training.layer_mapping import give_attentions
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import AnyTeacher
from regrow.training.shared_tokens import NONE, check_text, teacher_ids
from regrow.training.teacher import MixedTeacher, Teacher
from regrow.training.teacher_placement import TeacherPlacement, place_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def teacher_of(
    teacher: Checkpoint,
    ids_V: Tensor | None,
    cached: Cache | None,
    device: torch.device,
    hold: TeacherPlacement,
) -> Teacher | CachedTeacher:
    """The teacher in bfloat16: its head and a cache, or all of it, held as `hold` says.

    Its distribution is over the ids of its tokenizer: rows of padding are left out.
    """
    if cached is not None:
        head = head_from(teacher, device)
        weight_VH = head.weight_VH[: cached.header.vocab_size]
        return CachedTeacher(cached, replace(head, weight_VH=weight_VH))
    size = shared_ids(teacher, teacher.tokenizer())
    return Teacher(place_teacher(teacher, hold, device), ids_V, size)


def teacher_placement(config: DistillConfig, options: Options) -> TeacherPlacement:
    """How the teacher is held; raises UserError for two ways at once, or one beside a cache."""
    asked: dict[str, TeacherPlacement] = {}
    if sharding.is_sharded(options):
        asked["sharding fsdp"] = "shares"
    if config.teacher_dtype == "int8":
        asked["teacher_dtype int8"] = "int8"
    if options.offload_teacher:
        asked["offload_teacher"] = "disk"
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: both say how the teacher is held; give one")
    hold: TeacherPlacement = next(iter(asked.values()), "whole")
    if config.cache is not None and hold in ("int8", "disk"):
        raise UserError(
            f"{next(iter(asked))}: a cache stands in for the teacher's body; leave it out"
        )
    return hold


def mixed_teacher(
    teacher: Teacher | CachedTeacher, extra_teachers: list[ExtraTeacher], hold: TeacherPlacement
) -> AnyTeacher:
    """The teacher, and those beside it on the same device."""
    if not extra_teachers:
        return teacher
    assert isinstance(teacher, Teacher)
    device, teachers = teacher.model.device, [teacher]
    for each in extra_teachers:
        made = teacher_of(each.checkpoint, each.ids_V, None, device, hold)
        assert isinstance(made, Teacher)
        teachers.append(made)
    shares = [each.share for each in extra_teachers]
    return MixedTeacher(teachers, [1 - sum(shares), *shares])


def mass_lost(teacher: AnyTeacher, heldout: Sequences, batch_size: int) -> list[Figure]:
    """How much of the teacher's distribution is on tokens that the student has not; said, too."""
    if not isinstance(teacher, Teacher) or teacher.ids_V is None:
        return []
    lost = teacher.mass_outside(heldout, batch_size)
    count = int((teacher.ids_V != NONE).sum())
    say(
        f"distill: the {count:,} tokens that both models have are compared; the teacher gives "
        f"{lost:.2%} of its probability to others, on held-out text"
    )
    convention = "mean over scored held-out tokens, bf16"
    name = "teacher's probability outside the shared tokens"
    return [Figure(name=name, value=lost, unit="share", convention=convention)]


def show_attentions(
    model: PreTrainedModel, teacher: AnyTeacher, feature_losses: FeatureLosses | None
) -> None:
    """Have both models form their attention weights, if a feature loss reads them."""
    if feature_losses is not None and "attentions" in feature_losses.needs:
        assert isinstance(teacher, Teacher)
        say("distill: the attention feature loss needs eager attention in both models: slower")
        give_attentions(model)
        give_attentions(teacher.model)


def freeze(
    model: PreTrainedModel,
    teacher: AnyTeacher,
    config: DistillConfig,
    weights: LossWeights,
    feature_losses: FeatureLosses | None,
    hold: TeacherPlacement,
) -> SharedPrefix | None:
    """Freeze the student's first blocks; the teacher's run for both where they are the same.

    That is, in a teacher that is whole here, runs in every step and reads the same ids.
    """
    count = config.freeze_layers
    if count == 0:
        return None
    frozen_layers.freeze(model, count)
    if hold != "whole" or not isinstance(teacher, Teacher) or teacher.ids_V is not None:
        return None
    if config.fake_quantize is not None:  # the teacher's blocks are not rounded
        return None
    runs = weights.needs_teacher or feature_losses is not None
    shows = feature_losses is not None and "attentions" in feature_losses.needs
    if not runs or shows or not frozen_layers.same(model, teacher.model, count):
        return None
    say(f"distill: the first {count} blocks are the teacher's and run once for both")
    return SharedPrefix(model, teacher.model, count, all_layers=feature_losses is not None)


FEWER_TOKENS = (
    "a cache is of the teacher's own tokens, and the student has fewer, or others: leave out the "
    "cache, so that the live teacher is used"
)


def open_cache(
    config: DistillConfig, teacher: Checkpoint, ids_V: Tensor | None, text: DataConfig
) -> Cache | None:
    """The cache that the config names, if any; `text` is what is trained on.

    Raises UserError when it is of another teacher, or cannot teach this student in this way.
    """
    if config.cache is None:
        return None
    if ids_V is not None:
        raise UserError(FEWER_TOKENS)
    cache = Cache(config.cache)
    cache.check_teacher(teacher)
    check_loss(config, cache.header.format, text)
    return cache


def check_loss(config: DistillConfig, format: str, text: DataConfig) -> None:
    """Raise UserError for a loss that a cache of this format cannot teach."""
    check_use(format, loss_weights_of(config, text), needs_layers=bool(config.feature_losses))


@dataclass(frozen=True)
class ExtraTeacher:
    """A teacher beside the first one."""

    checkpoint: Checkpoint
    share: float
    ids_V: Tensor | None


def check_extra_teachers(config: DistillConfig) -> None:
    """Raise UserError for what needs a single teacher."""
    if not config.blend:
        return
    for what in ("cache", "feature_losses"):
        if getattr(config, what):
            raise UserError(
                f"blend: {what} is of one teacher alone; leave out {what}, or the further teachers"
            )


def open_extra_teachers(
    config: DistillConfig, student: Checkpoint, ids_V: Tensor | None = None
) -> list[ExtraTeacher]:
    """The further teachers with their ids of the student's tokens; `ids_V` are the first one's.

    Raises UserError for one that cannot be opened, or lacks a token of the student.
    """
    check_extra_teachers(config)
    found = []
    for name, share in config.blend.items():
        checkpoint = load(name)
        families.of(checkpoint)
        ids = teacher_ids(student, checkpoint)
        found.append(ExtraTeacher(checkpoint, share, ids))
    for ids in [ids_V, *(each.ids_V for each in found)] if found else []:
        if ids is not None and bool((ids == NONE).any()):
            raise UserError(
                f"blend: every teacher must have all tokens of the student {student.folder}, and "
                f"one lacks {int((ids == NONE).sum())}; leave out the further teachers"
            )
    return found


@dataclass(frozen=True)
class TeacherSetup:
    """The teacher of a distillation, and the map from its tokens to the student's."""

    student: Student
    teacher: Checkpoint
    ids_V: Tensor | None = None
    """The teacher's ids of the student's tokens; None for the same ones."""
    cached: Cache | None = None
    """What the teacher's body is replaced by."""
    extra_teachers: list[ExtraTeacher] = field(default_factory=list)
    """Teachers beside the first."""
    aligner: Aligner | None = None
    """For a teacher of another tokenizer."""

    @classmethod
    def open(
        cls,
        config: DistillConfig,
        student: Student,
        teacher: Checkpoint,
        options: Options,
        text: DataConfig,
    ) -> TeacherSetup:
        """Raises UserError when this teacher cannot teach this student on `text` as is asked."""
        aligner = aligner_of(config, student.like, teacher, options)
        if aligner is not None and any(source.losses is not None for source in text.sources):
            raise UserError(
                "cross_tokenizer spans: all text takes the same losses: leave out own_answers, and "
                "the losses of sources"
            )
        if aligner is not None:
            return cls(student, teacher, aligner=aligner)
        ids_V = teacher_ids(student.like, teacher)
        extra_teachers = open_extra_teachers(config, student.like, ids_V)
        return cls(
            student, teacher, ids_V, open_cache(config, teacher, ids_V, text), extra_teachers
        )

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """All teachers."""
        return [self.teacher, *(each.checkpoint for each in self.extra_teachers)]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of what decides the result."""
        first, *others = self.checkpoints
        found = {"teacher": first.fingerprint}
        if self.cached is not None:
            found["cache"] = self.cached.fingerprint
        return found | {f"teacher {n}": other.fingerprint for n, other in enumerate(others, 2)}

    @property
    def chosen_by(self) -> str:
        """The held-out loss by which the best student is chosen."""
        return CHOSEN_BY if self.aligner is None else SPAN_CHOSEN_BY

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """What the text is tokenized by: the student's; the teacher's where tokens are the same."""
        same = self.ids_V is None and self.aligner is None
        return (self.teacher if same else self.student.like).tokenizer()

    def check(self, heldout: Sequences, train: Sequences) -> None:
        """Raise UserError for text that one of the models cannot read, or a cache has not."""
        tokenizer, ours = self.tokenizer(), self.student.vocab_size
        for split, sequences in {"heldout": heldout, "train": train}.items():
            if self.aligner is not None:
                check_text(sequences, tokenizer, (ours, ours), None)
                self.aligner.check_specials(sequences)
                continue
            for one in (ExtraTeacher(self.teacher, 1.0, self.ids_V), *self.extra_teachers):
                rows = ours, int(one.checkpoint.config["vocab_size"])
                check_text(sequences, tokenizer, rows, one.ids_V)
            if self.cached is not None:
                self.cached.check_sequences(sequences, split)
        if self.aligner is not None:
            say_coverage(self.aligner, heldout)

    def model(
        self, config: DistillConfig, device: torch.device, placement: TeacherPlacement
    ) -> AnyTeacher:
        """The teacher to train against: a model, a mixture of several, or a cache."""
        found = teacher_of(self.teacher, self.ids_V, self.cached, device, placement)
        if self.aligner is not None:
            assert isinstance(found, Teacher)
            return CrossTokenizerTeacher(found, self.aligner, config.span_temperature)
        return mixed_teacher(found, self.extra_teachers, placement)
