"""What stands opposite the student: the live teacher, or a cache of what it said."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from regrow.checkpoint import Checkpoint
from regrow.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.training import prefix, sharding
from regrow.training.cache.folder import Cache
from regrow.training.cache.teacher import CachedTeacher, head_from
from regrow.training.head import Mix
from regrow.training.inside import give_attentions
from regrow.training.prefix import SharedPrefix
from regrow.training.signal_mix import SignalMix
from regrow.training.teacher import Teacher


def teacher_of(
    master: Checkpoint,
    ids_V: Tensor | None,
    cached: Cache | None,
    device: torch.device,
    sharded: bool,
) -> Teacher | CachedTeacher:
    """The teacher in bfloat16: its head and a cache, or all of it, on the device or in shares."""
    if cached is not None:
        return CachedTeacher(cached, head_from(master, device))
    if not sharded:
        return Teacher(master.model(torch.bfloat16, device), ids_V)
    model = master.model(torch.bfloat16)
    sharding.share(model, device)
    return Teacher(model, ids_V)


def show_attentions(
    model: PreTrainedModel, teacher: Teacher | CachedTeacher, signals: SignalMix | None
) -> None:
    """Have both models form their attention weights, if a signal reads them."""
    if signals is not None and "attentions" in signals.needs:
        assert isinstance(teacher, Teacher)
        say("distill: the attention signal needs eager attention in both models: slower")
        give_attentions(model)
        give_attentions(teacher.model)


def freeze(
    model: PreTrainedModel,
    teacher: Teacher | CachedTeacher,
    config: DistillConfig,
    mix: Mix,
    signals: SignalMix | None,
    sharded: bool,
) -> SharedPrefix | None:
    """Freeze the student's first blocks; the teacher's run for both where they are the same.

    Where they lie here, that is, in a teacher that runs in every step and reads the same ids.
    """
    count = config.freeze_layers
    if count == 0:
        return None
    prefix.freeze(model, count)
    if sharded or not isinstance(teacher, Teacher) or teacher.ids_V is not None:
        return None
    if config.fake_quantize is not None:  # the teacher's blocks are not rounded
        return None
    runs = mix.needs_teacher or signals is not None
    shows = signals is not None and "attentions" in signals.needs
    if not runs or shows or not prefix.same(model, teacher.model, count):
        return None
    say(f"distill: the first {count} blocks are the teacher's and run once for both")
    return SharedPrefix(model, teacher.model, count, all_layers=signals is not None)
