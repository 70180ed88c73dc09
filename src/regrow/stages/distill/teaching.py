"""What stands opposite the student: the live teacher, or a cache of what it said."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint import Checkpoint
from regrow.data import Blocks
from regrow.errors import UserError
from regrow.manifest import Figure
from regrow.options import Options
from regrow.progress import say
from regrow.stages.distill.blend import Further
from regrow.stages.distill.config import DistillConfig
from regrow.training import prefix, sharding
from regrow.training.blend import BlendedTeacher
from regrow.training.cache.folder import Cache, shared_ids
from regrow.training.cache.teacher import CachedTeacher, head_from
from regrow.training.holding import Hold, held
from regrow.training.inside import give_attentions
from regrow.training.mix import Mix
from regrow.training.objective import AnyTeacher
from regrow.training.prefix import SharedPrefix
from regrow.training.signal_mix import SignalMix
from regrow.training.teacher import Teacher
from regrow.training.tokens import NONE


def teacher_of(
    master: Checkpoint,
    ids_V: Tensor | None,
    cached: Cache | None,
    device: torch.device,
    hold: Hold,
) -> Teacher | CachedTeacher:
    """The teacher in bfloat16: its head and a cache, or all of it, held as `hold` says.

    Its distribution is over the ids of its tokenizer: rows of padding are left out.
    """
    if cached is not None:
        head = head_from(master, device)
        weight_VH = head.weight_VH[: cached.header.vocab_size]
        return CachedTeacher(cached, replace(head, weight_VH=weight_VH))
    size = shared_ids(master, master.tokenizer())
    return Teacher(held(master, hold, device), ids_V, size)


def hold_of(config: DistillConfig, options: Options) -> Hold:
    """How the teacher is held; raises UserError for two ways at once, or one beside a cache."""
    asked: dict[str, Hold] = {}
    if sharding.is_sharded(options):
        asked["sharding fsdp"] = "shares"
    if config.teacher_dtype == "int8":
        asked["teacher_dtype int8"] = "int8"
    if options.offload_teacher:
        asked["offload_teacher"] = "disk"
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)}: both say how the teacher is held; give one")
    hold: Hold = next(iter(asked.values()), "whole")
    if config.cache is not None and hold in ("int8", "disk"):
        raise UserError(
            f"{next(iter(asked))}: a cache stands in for the teacher's body; leave it out"
        )
    return hold


def blended(teacher: Teacher | CachedTeacher, further: list[Further], hold: Hold) -> AnyTeacher:
    """The teacher, and those beside it on the same device."""
    if not further:
        return teacher
    assert isinstance(teacher, Teacher)
    device, teachers = teacher.model.device, [teacher]
    for each in further:
        made = teacher_of(each.checkpoint, each.ids_V, None, device, hold)
        assert isinstance(made, Teacher)
        teachers.append(made)
    shares = [each.share for each in further]
    return BlendedTeacher(teachers, [1 - sum(shares), *shares])


def mass_lost(teacher: AnyTeacher, heldout: Blocks, batch_size: int) -> list[Figure]:
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


def show_attentions(model: PreTrainedModel, teacher: AnyTeacher, signals: SignalMix | None) -> None:
    """Have both models form their attention weights, if a signal reads them."""
    if signals is not None and "attentions" in signals.needs:
        assert isinstance(teacher, Teacher)
        say("distill: the attention signal needs eager attention in both models: slower")
        give_attentions(model)
        give_attentions(teacher.model)


def freeze(
    model: PreTrainedModel,
    teacher: AnyTeacher,
    config: DistillConfig,
    mix: Mix,
    signals: SignalMix | None,
    hold: Hold,
) -> SharedPrefix | None:
    """Freeze the student's first blocks; the teacher's run for both where they are the same.

    That is, in a teacher that is whole here, runs in every step and reads the same ids.
    """
    count = config.freeze_layers
    if count == 0:
        return None
    prefix.freeze(model, count)
    if hold != "whole" or not isinstance(teacher, Teacher) or teacher.ids_V is not None:
        return None
    if config.fake_quantize is not None:  # the teacher's blocks are not rounded
        return None
    runs = mix.needs_teacher or signals is not None
    shows = signals is not None and "attentions" in signals.needs
    if not runs or shows or not prefix.same(model, teacher.model, count):
        return None
    say(f"distill: the first {count} blocks are the teacher's and run once for both")
    return SharedPrefix(model, teacher.model, count, all_layers=signals is not None)
