"""What to distil, for how long, and how."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator

from regrow import plugins
from regrow.config import Config
from regrow.errors import unknown
from regrow.quantization import formats

LOSSES = "regrow.training.losses"
FEATURE_LOSSES = "regrow.training.feature_losses"


class DistillConfig(Config):
    """Budget, loss and schedule of a distillation."""

    tokens: int = Field(default=1_000_000, ge=1)
    """Tokens to train on; raising it later extends a finished run."""
    batch_tokens: int = Field(default=512, ge=1)
    """Tokens per optimizer step, over all devices and accumulation; more for longer runs."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW."""
    min_learning_rate_ratio: float = Field(default=0.0, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's decoupled weight decay."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """AdamW's second-moment decay; short runs want a short memory."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradient norm to clip at."""
    losses: dict[str, float] = Field(default_factory=lambda: {"forward_kl": 1.0})
    """Weight of each output loss by its name: forward_kl, reverse_kl, jsd, skewed_kl,
    skewed_reverse_kl, total_variation, cross_entropy (of the text). Held-out forward KL is always
    measured, and the best student is chosen by it."""
    temperature: float = Field(default=1.0, gt=0)
    """T, by which the logits of both models are divided in all losses but cross_entropy, which then
    count T² times."""
    beta: float = Field(default=0.5, ge=1e-3, le=0.999)
    """Of jsd: beta · KL(teacher ‖ M) + (1 − beta) · KL(student ‖ M), where M is
    beta · teacher + (1 − beta) · student."""
    skew: float = Field(default=0.1, ge=1e-3, le=0.999)
    """α of skewed_kl, KL(teacher ‖ α · teacher + (1 − α) · student), and of skewed_reverse_kl,
    KL(student ‖ (1 − α) · teacher + α · student)."""
    exact_head: bool = False
    """Products of the output head as exact as in float32: gradients of the losses are then right to
    1e-4 instead of 2e-2, for about twice the time of head and loss on a CPU."""
    feature_losses: dict[str, float] = Field(default={})
    """Weight of each feature loss beside the losses by its name: hidden, hidden_cosine, embeddings,
    attention, logit_lens, logit_lens_symmetric."""
    lens_layers: tuple[int | float, ...] = (0.25, 0.5, 0.75)
    """Where the logit lens reads: shares of the student's blocks, or numbers of blocks from 0."""
    fake_quantize: str | None = None
    """Scheme (int8, int4, int4-g32, …) that the layers' weights are rounded to while training, for
    `quantize` with the method rtn afterwards; the student is written in float32, unrounded."""
    balance: bool = False
    """Multiply the weight of each feature loss by running mean of the losses ÷ its running mean."""
    eval_tokens: int = Field(default=25_000, ge=1)
    """Measure held-out KL, and keep a checkpoint, about every so many training tokens."""
    heldout_sequences: int = Field(default=16, ge=1)
    """Held-out blocks to measure on."""
    cache: str | None = None
    """Folder that regrow cache wrote: the teacher's head is loaded, its body is not. In a recipe a
    cache stage before this one is taken."""
    teacher_dtype: Literal["bfloat16", "int8"] = "bfloat16"
    """How the teacher's linear layers are held: in int8, with a scale per row, they take half the
    memory, and it says almost the same."""
    blend: dict[str, float] = Field(default={})
    """Further teachers (folder or hub id) of the same tokens, each with its share of the target
    distribution; the teacher has the rest. {other: 0.3} teaches 0.7 p_teacher + 0.3 p_other."""
    cross_tokenizer: Literal["refuse", "spans"] = "refuse"
    """For a teacher with another tokenizer: refuse it, or let the student match the probability of
    each span of text at whose ends tokens of both end. All losses but cross_entropy then compare
    those probabilities."""
    span_temperature: float = Field(default=100.0, gt=0)
    """τ: probabilities of spans are taken to the power 1/τ, so that unlikely ones count too."""
    answers: str | None = None
    """Folder that regrow generate wrote with the teacher: its answers are trained on in place of
    the data, which is measured on only. In a recipe a generate stage by the teacher before this one
    is taken."""
    own_answers: str | None = None
    """Folder that regrow generate wrote with the student: trained on beside the other text, by
    own_losses. In a recipe a generate stage by this student, before this one, is taken."""
    own_losses: dict[str, float] = Field(default_factory=lambda: {"skewed_reverse_kl": 1.0})
    """Weight by name of the losses on the student's own answers."""
    own_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of the student's own answers in the tokens."""
    adapter: Literal["none", "lora", "qlora"] = "none"
    """What trains: none (all weights), lora (low-rank adapters beside frozen weights, merged into
    them in the result), qlora (the same, the frozen weights held in 4 bits)."""
    lora_rank: int = Field(default=16, ge=1)
    """Rank of the adapters."""
    lora_alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = ()
    """Names of the blocks' linear projections with adapters, such as q_proj; all when empty."""
    keep_adapters: bool = False
    """Write the adapters beside the merged model too, in `adapter/`, as peft reads them."""
    freeze_layers: int = Field(default=0, ge=0)
    """Leave the embedding (and a head tied to it) and so many first blocks as they are: quicker,
    most where they are the teacher's, as after a cut of later layers; they then run once for
    both."""
    seed: int = 0
    """Seed of dropout, and of the weights of a fresh student or of adapters."""

    @field_validator("losses", "own_losses")
    @classmethod
    def _known_losses(cls, losses: dict[str, float]) -> dict[str, float]:
        return known_losses(losses)

    @field_validator("feature_losses")
    @classmethod
    def _known_feature_losses(cls, feature_losses: dict[str, float]) -> dict[str, float]:
        known = plugins.names(FEATURE_LOSSES)
        for name, weight in feature_losses.items():
            if name not in known:
                raise unknown("feature loss", name, known)
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {name} must be above 0 and finite")
        return feature_losses

    @field_validator("fake_quantize")
    @classmethod
    def _weights_alone(cls, name: str | None) -> str | None:
        if name is None:
            return None
        scheme = formats.find_scheme(name)
        if scheme.dynamic:
            raise ValueError(f"{scheme.name} rounds inputs too; give int8 or a kind of int4")
        return scheme.name

    @field_validator("blend")
    @classmethod
    def _shares(cls, blend: dict[str, float]) -> dict[str, float]:
        if not all(share > 0 for share in blend.values()) or not sum(blend.values()) < 1:
            raise ValueError(
                f"the shares {list(blend.values())} must be above 0 and sum to less than 1: the "
                "teacher has the rest"
            )
        return blend

    @field_validator("lens_layers")
    @classmethod
    def _depths(cls, depths: tuple[int | float, ...]) -> tuple[int | float, ...]:
        for depth in depths:
            if depth < 0 or (isinstance(depth, float) and not 0 < depth < 1):
                raise ValueError(
                    f"{depth} is no depth: give shares between 0 and 1, or numbers of blocks from 0"
                )
        if not depths:
            raise ValueError("give one depth at least; without a lens, leave out its feature loss")
        return depths


def known_losses(losses: dict[str, float]) -> dict[str, float]:
    """The weights as they are; raises ValueError for no loss, an unknown one or a bad weight."""
    known = plugins.names(LOSSES)
    if not losses:
        raise ValueError(f"name one at least, with its weight; there are: {', '.join(known)}")
    for name, weight in losses.items():
        if name not in known:
            raise unknown("loss", name, known)
        if not 0 < weight < math.inf:
            raise ValueError(
                f"the weight of {name} must be above 0 and finite; to go without it, leave it out "
                "(held-out forward KL is measured in any case)"
            )
    return losses
