"""The teacher of a distillation: one live model, several, or a cache."""

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
from regrow.runtime.precision import name_of
from regrow.runtime.progress import say
from regrow.stage_dir import Figure
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.student import Student
from regrow.stages.distill.text import loss_weights_of
from regrow.training import frozen_layers, sharding
from regrow.training.answer_targets import AnswerTargets
from regrow.training.cache.folder import Cache
from regrow.training.cache.teacher import CachedTeacher, beyond_forward_kl, check_use, head_from
from regrow.training.callbacks import CHOSEN_BY, SPAN_CHOSEN_BY
from regrow.training.cross_tokenizer.align import Aligner
from regrow.training.cross_tokenizer.teacher import CrossTokenizerTeacher
from regrow.training.features import FeatureLosses, give_attentions
from regrow.training.frozen_layers import SharedPrefix
from regrow.training.loss_weights import LossWeights
from regrow.training.objective import AnyTeacher
from regrow.training.shared_tokens import NONE, check_text, comparable, shared_ids, teacher_ids
from regrow.training.teacher import MixedTeacher, Teacher, TeacherPlacement, place_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def teacher_of(
    teacher: Checkpoint,
    ids_V: Tensor | None,
    cached: Cache | None,
    device: torch.device,
    placement: TeacherPlacement,
) -> Teacher | CachedTeacher:
    """The teacher in bfloat16: the whole model, or its head and a cache.

    Its distribution covers the ids of its tokenizer and leaves out the embedding's padding rows.
    """
    if cached is not None:
        head = head_from(teacher, device)
        weight_VH = head.weight_VH[: cached.header.vocab_size]
        return CachedTeacher(cached, replace(head, weight_VH=weight_VH))
    size = shared_ids(teacher, teacher.tokenizer())
    return Teacher(place_teacher(teacher, placement, device), ids_V, size)


def teacher_placement(config: DistillConfig, options: Options) -> TeacherPlacement:
    """The placement of the teacher's weights; raises UserError for contradicting options."""
    asked: dict[str, TeacherPlacement] = {}
    if sharding.is_sharded(options):
        hybrid = options.sharding == "hsdp"
        asked[sharding.name(options)] = "node_shares" if hybrid else "shares"
    if config.teacher_dtype == "int8":
        asked["teacher_dtype int8"] = "int8"
    if options.offload_teacher:
        asked["offload_teacher"] = "disk"
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: both place the teacher's weights; give one")
    placement: TeacherPlacement = next(iter(asked.values()), "whole")
    if config.cache is not None and placement in ("int8", "disk"):
        raise UserError(f"{next(iter(asked))}: a cache replaces the teacher's layers; leave it out")
    return placement


def mixed_teacher(
    teacher: Teacher | CachedTeacher,
    extra_teachers: list[ExtraTeacher],
    placement: TeacherPlacement,
) -> AnyTeacher:
    """The mixture of the teacher and the extra teachers, on the same device."""
    if not extra_teachers:
        return teacher
    assert isinstance(teacher, Teacher)
    device, teachers = teacher.model.device, [teacher]
    for each in extra_teachers:
        extra = teacher_of(each.checkpoint, each.ids_V, None, device, placement)
        assert isinstance(extra, Teacher)
        teachers.append(extra)
    shares = [each.share for each in extra_teachers]
    return MixedTeacher(teachers, [1 - sum(shares), *shares])


def mass_lost(teacher: AnyTeacher, heldout: Sequences, batch_size: int) -> list[Figure]:
    """The share of the teacher's probability on tokens that the student lacks; also prints it."""
    if not isinstance(teacher, Teacher) or teacher.ids_V is None:
        return []
    lost = teacher.mass_outside(heldout, batch_size)
    count = int((teacher.ids_V != NONE).sum())
    say(
        f"distill: the {count:,} tokens that both models have are compared; the teacher gives "
        f"{lost:.2%} of its probability to other tokens, on held-out text"
    )
    convention = f"mean over scored held-out tokens, {name_of(teacher.model.dtype)}"
    name = "teacher's probability outside the shared tokens"
    return [Figure(name=name, value=lost, unit="share", convention=convention)]


def show_attentions(
    model: PreTrainedModel, teacher: AnyTeacher, feature_losses: FeatureLosses | None
) -> None:
    """Make both models return attention weights, if a feature loss reads them."""
    if feature_losses is not None and "attentions" in feature_losses.needs:
        assert isinstance(teacher, Teacher)
        say("distill: the attention feature loss needs eager attention in both models: slower")
        give_attentions(model)
        give_attentions(teacher.model)


def live_models(teacher: AnyTeacher) -> list[PreTrainedModel]:
    """The models that run in a teacher; none of a cache."""
    if isinstance(teacher, CrossTokenizerTeacher):
        return [teacher.teacher.model]
    if isinstance(teacher, MixedTeacher):
        return [each.model for each in teacher.teachers]
    return [teacher.model] if isinstance(teacher, Teacher) else []


def freeze(
    model: PreTrainedModel,
    teacher: AnyTeacher,
    config: DistillConfig,
    weights: LossWeights,
    feature_losses: FeatureLosses | None,
    placement: TeacherPlacement,
) -> SharedPrefix | None:
    """Freeze the student's first layers, and share the teacher's if they are the same.

    They are shared if the teacher is whole on this device, runs in every step and reads the same
    token ids.
    """
    count = config.freeze_layers
    if count == 0:
        return None
    frozen_layers.freeze(model, count)
    if placement != "whole" or not isinstance(teacher, Teacher) or teacher.ids_V is not None:
        return None
    if teacher.targets is not None:  # the teacher does not run in training steps
        return None
    if config.fake_quantize is not None:  # the teacher's layers are not rounded
        return None
    if config.on_policy_share:  # the student runs all of its layers when it writes
        return None
    runs = weights.needs_teacher or feature_losses is not None
    attentions = feature_losses is not None and "attentions" in feature_losses.needs
    if not runs or attentions or not frozen_layers.same(model, teacher.model, count):
        return None
    say(f"distill: the first {count} layers are the teacher's and run once for both models")
    return SharedPrefix(model, teacher.model, count, all_layers=feature_losses is not None)


FEWER_TOKENS = (
    "a cache is over the teacher's tokens, and the student has fewer or other tokens: leave out "
    "the cache, so that the live teacher is used"
)


def open_cache(
    config: DistillConfig, teacher: Checkpoint, ids_V: Tensor | None, text: DataConfig
) -> Cache | None:
    """The cache of the config, if any; `text` is the text to train on.

    Raises UserError for a cache of another teacher, and for losses that it does not support.
    """
    if config.cache is None:
        return None
    if ids_V is not None:
        raise UserError(FEWER_TOKENS)
    cache = Cache(config.cache)
    cache.check_teacher(teacher)
    check_loss(config, cache.header.format, text)
    return cache


def check_targets(config: DistillConfig, text: DataConfig) -> None:
    """Raise UserError for what the stored log-probabilities of answers do not support."""
    if config.answer_targets == "teacher":
        return
    name = f"answer_targets {config.answer_targets}"
    if config.answers is None:
        raise UserError(f"{name}: there are no answers; give the folder of `regrow generate`")
    incompatible = {
        "own_answers": config.own_answers is not None,
        f"on_policy_share {config.on_policy_share:g}": config.on_policy_share > 0,
        "extra_teachers": bool(config.extra_teachers),
        "dynamic_blend": config.dynamic_blend,
        "feature_losses": bool(config.feature_losses),
        "cross_tokenizer spans": config.cross_tokenizer == "spans",
    }
    for other, given in incompatible.items():
        if given:
            raise UserError(f"{name} with {other}: not supported; leave out one of them")
    what = beyond_forward_kl(loss_weights_of(config, text))
    if what is not None:
        raise UserError(
            f"{name}: {what} needs all of the teacher's logits: use forward_kl at temperature 1"
        )


def open_targets(
    config: DistillConfig, student: Student, teacher: Checkpoint, ids_V: Tensor | None
) -> AnswerTargets | None:
    """The stored log-probabilities of the answers, if the config asks for them."""
    if config.answer_targets == "teacher":
        return None
    if ids_V is not None:
        raise UserError(
            f"answer_targets {config.answer_targets}: the student {student.like.folder} has other "
            "tokens than the teacher; leave it out, so that the teacher reads the answers"
        )
    assert config.answers is not None
    tokenizer = teacher.tokenizer()
    return AnswerTargets(config.answers, tokenizer, shared_ids(teacher, tokenizer))


def check_loss(config: DistillConfig, format: str, text: DataConfig) -> None:
    """Raise UserError for a loss that a cache of this format does not support."""
    check_use(format, loss_weights_of(config, text), needs_layers=bool(config.feature_losses))


@dataclass(frozen=True)
class ExtraTeacher:
    """A teacher beside the first one, with its share of the target distribution."""

    checkpoint: Checkpoint
    share: float
    ids_V: Tensor | None


def check_extra_teachers(config: DistillConfig) -> None:
    """Raise UserError for fields that require a single teacher."""
    if not config.extra_teachers:
        return
    for name in ("cache", "feature_losses"):
        if getattr(config, name):
            raise UserError(
                f"extra_teachers: {name} works with one teacher only; leave out {name}, or "
                "extra_teachers"
            )


def open_extra_teachers(
    config: DistillConfig, student: Checkpoint, ids_V: Tensor | None = None
) -> list[ExtraTeacher]:
    """Open the extra teachers, with their ids of the student's tokens.

    `ids_V` are the first teacher's ids of these tokens.
    Raises UserError for a teacher that cannot be opened, or lacks a token of the student.
    """
    check_extra_teachers(config)
    extra = []
    for name, share in config.extra_teachers.items():
        checkpoint = load(name)
        families.of(checkpoint)
        ids = teacher_ids(student, checkpoint)
        extra.append(ExtraTeacher(checkpoint, share, ids))
    for ids in [ids_V, *(each.ids_V for each in extra)] if extra else []:
        if ids is not None and bool((ids == NONE).any()):
            raise UserError(
                "extra_teachers: every teacher must have all tokens of the student "
                f"{student.folder}, and one lacks {int((ids == NONE).sum())}; leave them out"
            )
    return extra


@dataclass(frozen=True)
class TeacherSetup:
    """The teachers of a distillation before they are loaded, and how tokens are compared."""

    student: Student
    teacher: Checkpoint
    ids_V: Tensor | None = None
    """The teacher's ids of the student's tokens; None if both have the same ids."""
    cached: Cache | None = None
    """A cache that replaces the teacher's layers."""
    extra_teachers: list[ExtraTeacher] = field(default_factory=list)
    """Teachers beside the first one."""
    targets: AnswerTargets | None = None
    """Stored log-probabilities of answers, which replace the teacher in training."""
    aligner: Aligner | None = None
    """Compares text spans if the teacher has another tokenizer; None otherwise."""

    @classmethod
    def open(
        cls,
        config: DistillConfig,
        student: Student,
        teacher: Checkpoint,
        options: Options,
        text: DataConfig,
    ) -> TeacherSetup:
        """Raises UserError if teacher, student, `text` and config are not compatible."""
        check_targets(config, text)
        aligner = aligner_of(config, student.like, teacher, options)
        if aligner is not None and any(source.losses is not None for source in text.sources):
            raise UserError(
                "cross_tokenizer spans: all text has the same losses: leave out own_answers, and "
                "the losses of sources"
            )
        if aligner is not None:
            return cls(student, teacher, aligner=aligner)
        ids_V = teacher_ids(student.like, teacher)
        extra_teachers = open_extra_teachers(config, student.like, ids_V)
        cache = open_cache(config, teacher, ids_V, text)
        targets = open_targets(config, student, teacher, ids_V)
        return cls(student, teacher, ids_V, cache, extra_teachers, targets)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints of all teachers."""
        return [self.teacher, *(each.checkpoint for each in self.extra_teachers)]

    @property
    def inputs(self) -> dict[str, str]:
        """Hashes of the teachers and the cache, for resuming."""
        first, *others = self.checkpoints
        hashes = {"teacher": first.fingerprint}
        if self.cached is not None:
            hashes["cache"] = self.cached.fingerprint
        if self.targets is not None:
            hashes["log-probabilities"] = self.targets.fingerprint
        return hashes | {f"teacher {n}": other.fingerprint for n, other in enumerate(others, 2)}

    @property
    def chosen_by(self) -> str:
        """The loss that chooses the best student, on the validation sequences."""
        return CHOSEN_BY if self.aligner is None else SPAN_CHOSEN_BY

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the text: the student's, or the teacher's if the tokens are the same."""
        same = self.ids_V is None and self.aligner is None
        return (self.teacher if same else self.student.like).tokenizer()

    def read_targets(self) -> None:
        """Read the stored log-probabilities, if any; a complete stage does not need them.

        Raises UserError if none of them fits the teacher.
        """
        if self.targets is not None:
            self.targets.read()

    def check(self, heldout: Sequences, train: Sequences) -> None:
        """Raise UserError for tokens that a model lacks, and for sequences that a cache lacks."""
        tokenizer, rows = self.tokenizer(), self.student.vocab_size
        for split, sequences in {"heldout": heldout, "train": train}.items():
            if self.aligner is not None:
                check_text(sequences, tokenizer, (rows, rows), None)
                self.aligner.check_specials(sequences)
                continue
            for one in (ExtraTeacher(self.teacher, 1.0, self.ids_V), *self.extra_teachers):
                both = rows, int(one.checkpoint.config["vocab_size"])
                check_text(sequences, tokenizer, both, one.ids_V)
            if self.cached is not None:
                self.cached.check_sequences(sequences, split)
        if self.aligner is not None:
            say_coverage(self.aligner, heldout)
        if self.targets is not None:
            say(
                f"distill: {self.targets.coverage(train):.1%} of the training tokens have stored "
                "log-probabilities; the others are learned as text"
            )

    def model(
        self, config: DistillConfig, device: torch.device, placement: TeacherPlacement
    ) -> AnyTeacher:
        """The teacher to train against: a model, a mixture of several, or a cache."""
        teacher = teacher_of(self.teacher, self.ids_V, self.cached, device, placement)
        if self.aligner is not None:
            assert isinstance(teacher, Teacher)
            return CrossTokenizerTeacher(teacher, self.aligner, config.span_temperature)
        if self.targets is not None:
            assert isinstance(teacher, Teacher)
            teacher.targets = self.targets
        return mixed_teacher(teacher, self.extra_teachers, placement)


def aligner_of(
    config: DistillConfig, student: Checkpoint, teacher: Checkpoint, options: Options
) -> Aligner | None:
    """The aligner of text spans; None if single tokens of the two models can be compared.

    Raises UserError for fields that do not work across tokenizers.
    """
    if config.cross_tokenizer == "refuse" or comparable(student, teacher):
        return None
    check_cross_tokenizer(config, options)
    names = (f"the student {student.folder}", f"the teacher {teacher.folder}")
    return Aligner(student.tokenizer(), teacher.tokenizer(), names)


def check_cross_tokenizer(config: DistillConfig, options: Options) -> None:
    """Raise UserError for fields that need a comparison of single tokens, or of their states."""
    reasons = {
        "cache": "has distributions over the teacher's own tokens",
        "feature_losses": "compare states at the same tokens",
        "extra_teachers": "mix distributions over the same tokens",
    }
    for name, reason in reasons.items():
        if getattr(config, name):
            raise UserError(
                f"cross_tokenizer spans: {name} {reason}, and tokenizers differ: leave it out"
            )
    if config.temperature != 1.0:
        raise UserError(
            f"cross_tokenizer spans: temperature {config.temperature:g} softens distributions over "
            "tokens; set it to 1, and span_temperature instead"
        )
    if sharding.is_sharded(options):
        what = sharding.name(options)
        raise UserError(f"cross_tokenizer spans with {what} is not supported: leave one out")


def say_coverage(aligner: Aligner, heldout: Sequences) -> None:
    """Print the share of the text that can be compared; raises UserError if it is 0."""
    share = aligner.coverage(heldout)
    say(
        f"distill: the tokenizers differ: spans of text are compared, {share:.1%} of the scored "
        "held-out tokens lie in one"
    )
