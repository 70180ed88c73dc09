"""What to distil, for how long, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regrow.config import Config


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
    eval_tokens: int = Field(default=25_000, ge=1)
    """Measure held-out KL, and keep a checkpoint, about every so many training tokens."""
    heldout_blocks: int = Field(default=16, ge=1)
    """Held-out blocks to measure on."""
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

    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss by name; the KL comes first, it is what is reported and kept by."""
        weights = {"forward_kl": 1.0 - self.alpha, "cross_entropy": self.alpha}
        return {name: w for name, w in weights.items() if w > 0 or name == "forward_kl"}
