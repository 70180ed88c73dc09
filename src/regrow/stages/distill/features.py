"""The feature losses that a config asks for, between this student and this teacher."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.plan import FILES, Plan
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.student import Student
from regrow.training.feature_loss_weights import FeatureLosses, LossBalancer, needs_of
from regrow.training.layer_mapping import LayerMapping, at_depths


def feature_losses_between(
    student: Student, teacher: Checkpoint, config: DistillConfig
) -> FeatureLosses | None:
    """The feature losses with their match, None without any.

    By the plan that the student was cut from the teacher by; else by depth, with projections to be
    learnt, which it says. Raises UserError where a feature loss has nothing to compare.
    """
    if not config.feature_losses:
        return None
    needs, match = needs_of(config.feature_losses), _descent(student, teacher)
    dropout = _config(student).get("attention_dropout")
    if "attentions" in needs and dropout:
        raise UserError(
            "feature_losses: attention compares whole rows, but the student's config.json has "
            f"attention_dropout {dropout}: set it to 0"
        )
    if match is None:
        match = _by_depth(student, teacher, needs, config.seed)
    layers = len(match.layers)
    if needs & {"outputs", "lens"} and not match.outputs:
        names = [
            name for name in config.feature_losses if needs_of({name: 1.0}) & {"outputs", "lens"}
        ]
        raise UserError(
            f"feature_losses: {names[0]} compares the outputs of layers before the last, of which "
            f"this student ({layers} layers) has none that the teacher has too; leave it out"
        )
    if "lens" in needs:
        match = match.read_at(at_depths(match.outputs, layers, config.lens_layers))
    return FeatureLosses(config.feature_losses, match, LossBalancer() if config.balance else None)


def _descent(student: Student, teacher: Checkpoint) -> LayerMapping | None:
    """The match by the plan, or of the teacher with itself."""
    for path in filter(None, map(student.carried, FILES)):
        plan = Plan.read(path)
        if plan.fingerprint == teacher.fingerprint:
            return LayerMapping.of_plan(plan)
    if student.fingerprint == teacher.fingerprint:
        return LayerMapping.of_same(_size(teacher.config, "num_hidden_layers"))
    return None


def _by_depth(
    student: Student, teacher: Checkpoint, needs: frozenset[str], seed: int
) -> LayerMapping:
    ours, theirs = _config(student), teacher.config
    layers = (_size(fields, "num_hidden_layers") for fields in (ours, theirs))
    match = LayerMapping.by_depth(*layers)
    channels = _size(ours, "hidden_size"), _size(theirs, "hidden_size")
    match.project(channels, needs, seed)
    how = "relative depth"
    if match.projections:
        how += f", {len(match.projections)} projections of their channels are learnt"
    if "attentions" in needs:
        how += ", attention is compared as the mean of a layer's heads"
    say(
        f"distill: no plan leads from {teacher.folder} to this student: layers are matched by {how}"
    )
    return match


def _config(student: Student) -> dict[str, Any]:
    return student.like.config if student.config is None else student.config.to_dict()


def _size(config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise UserError(f"feature_losses: the config of {config.get('model_type')} has no {key}")
    return int(config[key])
