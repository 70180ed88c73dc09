"""The grid that a student's weights are rounded to while it is trained."""

from __future__ import annotations

from regrow import families, plugins
from regrow.errors import UserError
from regrow.quantization.schemes import Scheme, find
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.student import Student


def rounding_of(pupil: Student, config: DistillConfig, sharded: bool) -> Scheme | None:
    """The scheme to train for, if any.

    Raises UserError for experts, which are no linear layers, and beside adapters or shares.
    """
    name = config.fake_quantize
    if name is None:
        return None
    if config.adapter != "none" or sharded:
        what = f"adapter {config.adapter}" if config.adapter != "none" else "sharding fsdp"
        raise UserError(f"fake_quantize {name} with {what}: set one of them to none")
    model_type = (pupil.config.to_dict() if pupil.config else pupil.like.config)["model_type"]
    known = model_type in plugins.names(families.__name__)
    if known and "experts" in families.get(model_type).config_keys:
        raise UserError(f"fake_quantize {name}: not for a mixture of experts ({model_type})")
    return find(name)
