"""The inner signals that a config asks for, between this student and this teacher."""

from __future__ import annotations

from typing import Any

from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.plan import FILES, Plan
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.student import Student
from regrow.training.feature_loss_weights import Balance, SignalMix, needs_of
from regrow.training.layer_mapping import Match, at_depths


def signals_between(pupil: Student, master: Checkpoint, config: DistillConfig) -> SignalMix | None:
    """The signals with their match, None without any.

    By the plan that the student was cut from the teacher by; else by depth, with projections to be
    learnt, which it says. Raises UserError where a signal has nothing to compare.
    """
    if not config.signals:
        return None
    needs, match = needs_of(config.signals), _descent(pupil, master)
    dropout = _config(pupil).get("attention_dropout")
    if "attentions" in needs and dropout:
        raise UserError(
            "signals: attention compares whole rows, but the student's config.json has "
            f"attention_dropout {dropout}: set it to 0"
        )
    if match is None:
        match = _by_depth(pupil, master, needs, config.seed)
    layers = len(match.layers)
    if needs & {"outputs", "lens"} and not match.outputs:
        names = [name for name in config.signals if needs_of({name: 1.0}) & {"outputs", "lens"}]
        raise UserError(
            f"signals: {names[0]} compares the outputs of blocks before the last, of which this "
            f"student ({layers} layers) has none with a counterpart in the teacher; leave it out"
        )
    if "lens" in needs:
        match = match.read_at(at_depths(match.outputs, layers, config.lens_layers))
    return SignalMix(config.signals, match, Balance() if config.balance else None)


def _descent(pupil: Student, master: Checkpoint) -> Match | None:
    """The match by the plan, or of the teacher with itself."""
    for path in filter(None, map(pupil.carried, FILES)):
        plan = Plan.read(path)
        if plan.fingerprint == master.fingerprint:
            return Match.of_plan(plan)
    if pupil.fingerprint == master.fingerprint:
        return Match.of_same(_size(master.config, "num_hidden_layers"))
    return None


def _by_depth(pupil: Student, master: Checkpoint, needs: frozenset[str], seed: int) -> Match:
    ours, theirs = _config(pupil), master.config
    layers = (_size(fields, "num_hidden_layers") for fields in (ours, theirs))
    match = Match.by_depth(*layers)
    channels = _size(ours, "hidden_size"), _size(theirs, "hidden_size")
    match.project(channels, needs, seed)
    how = "relative depth"
    if match.projections:
        how += f", {len(match.projections)} projections of their channels are learnt"
    if "attentions" in needs:
        how += ", attention is compared as the mean of a layer's heads"
    say(f"distill: no plan leads from {master.folder} to this student: layers are matched by {how}")
    return match


def _config(pupil: Student) -> dict[str, Any]:
    return pupil.like.config if pupil.config is None else pupil.config.to_dict()


def _size(config: dict[str, Any], key: str) -> int:
    if key not in config:
        raise UserError(f"signals: the config of {config.get('model_type')} has no {key}")
    return int(config[key])
