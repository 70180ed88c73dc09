"""What to distil, for how long, and how."""

from __future__ import annotations

from pydantic import Field, field_validator

from regrow.config import Config
from regrow.quantization import schemes


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
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Loss = alpha · cross-entropy + (1 − alpha) · T² · KL(teacher ‖ student)."""
    temperature: float = Field(default=1.0, gt=0)
    """T, by which the logits of both models are divided in the KL."""
    hidden_weight: float = Field(default=0.0, ge=0)
    """Weight of the blocks' outputs beside the loss, as squared error relative to the teacher's;
    for a student that was cut from the teacher."""
    fake_quantize: str | None = None
    """Scheme (int8, int4, int4-g32, …) that the layers' weights are rounded to while training, for
    `quantize` with the method rtn afterwards; the student is written in float32, unrounded."""
    eval_tokens: int = Field(default=25_000, ge=1)
    """Measure held-out KL, and keep a checkpoint, about every so many training tokens."""
    heldout_blocks: int = Field(default=16, ge=1)
    """Held-out blocks to measure on."""
    seed: int = 0
    """Seed of dropout and of a fresh student's weights."""

    @field_validator("fake_quantize")
    @classmethod
    def _weights_alone(cls, name: str | None) -> str | None:
        if name is None:
            return None
        scheme = schemes.find(name)
        if scheme.dynamic:
            raise ValueError(f"{scheme.name} rounds inputs too; give int8 or a kind of int4")
        return scheme.name

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by name; the KL comes first, it is what is reported and kept by."""
        weights = {"forward_kl": 1.0 - self.alpha, "cross_entropy": self.alpha}
        return {name: w for name, w in weights.items() if w > 0 or name == "forward_kl"}
