"""A teacher with another tokenizer: whether it can teach, and by what."""

from __future__ import annotations

from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.sequences import Sequences
from regrow.errors import UserError
from regrow.runtime.progress import say
from regrow.stages.distill.config import DistillConfig
from regrow.training import sharding
from regrow.training.cross_tokenizer.align import Aligner
from regrow.training.shared_tokens import comparable


def aligner_of(
    config: DistillConfig, student: Checkpoint, teacher: Checkpoint, options: Options
) -> Aligner | None:
    """What finds spans of text common to both models' tokens; None where tokens are compared.

    Raises UserError for what cannot work across tokenizers.
    """
    if config.cross_tokenizer == "refuse" or comparable(student, teacher):
        return None
    check_cross_tokenizer(config, options)
    names = (f"the student {student.folder}", f"the teacher {teacher.folder}")
    return Aligner(student.tokenizer(), teacher.tokenizer(), names)


def check_cross_tokenizer(config: DistillConfig, options: Options) -> None:
    """Raise UserError for what compares tokens, or states of tokens."""
    reasons = {
        "cache": "holds what the teacher says of its own tokens",
        "feature_losses": "compare states at the same tokens",
        "blend": "mixes distributions over the same tokens",
    }
    for what, why in reasons.items():
        if getattr(config, what):
            raise UserError(
                f"cross_tokenizer spans: {what} {why}, and tokenizers differ: leave it out"
            )
    if config.temperature != 1.0:
        raise UserError(
            f"cross_tokenizer spans: temperature {config.temperature:g} softens distributions over "
            "tokens; set it to 1, and span_temperature instead"
        )
    if sharding.is_sharded(options):
        raise UserError("cross_tokenizer spans with sharding fsdp is not supported: leave one out")


def say_coverage(aligner: Aligner, heldout: Sequences) -> None:
    """Tell how much of the text can be compared; raises UserError for none of it."""
    share = aligner.coverage(heldout)
    say(
        f"distill: the tokenizers differ: spans of text are compared, {share:.1%} of the scored "
        "held-out tokens lie in one"
    )
