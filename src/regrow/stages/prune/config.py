"""What to prune a model to, and how."""

from __future__ import annotations

from pydantic import Field

from regrow.config import Config


class PruneConfig(Config):
    """A target: a share of the parameters, or the shape itself, or a plan from a file."""

    keep_params: float | None = Field(default=None, gt=0, lt=1)
    """Share of the parameters to keep (tied weights once); the shape is chosen among candidates."""
    num_candidates: int = Field(default=8, ge=1)
    """Shapes to try for keep_params; up to 8 are a hand-made list, more a grid of all axes."""
    num_layers: int | None = None
    """Layers to keep."""
    hidden_size: int | None = None
    """Channels of the residual stream to keep."""
    intermediate_size: int | None = None
    """MLP channels to keep in every layer."""
    num_attention_heads: int | None = None
    """Query heads to keep in every layer, the same number for each key/value head."""
    num_key_value_heads: int | None = None
    """Key/value heads to keep in every layer."""
    num_experts: int | None = None
    """Experts to keep in every layer that has some."""
    moe_intermediate_size: int | None = None
    """Channels to keep inside every expert."""
    plan: str | None = None
    """A plan.json to apply instead of choosing."""
    multiple_of: int = Field(default=32, ge=1)
    """Round changed widths to a multiple of this (256 for K-quants, 64 or 128 for group int4)."""
    criterion: str = "activation_l2"
    """Importance criterion for widths: one the profile has scores of."""
    expert_criterion: str | None = None
    """Importance criterion for experts; None: the one for widths."""
    layer_criterion: str = "block_influence"
    """Importance criterion for whole layers."""
    repair: bool = True
    """Re-solve the layers that read a pruned dimension on the profile's Gram matrices."""

    def sizes(self) -> dict[str, int]:
        """The sizes given, by dimension."""
        given = {
            "layers": self.num_layers,
            "hidden": self.hidden_size,
            "mlp": self.intermediate_size,
            "heads": self.num_attention_heads,
            "kv_heads": self.num_key_value_heads,
            "experts": self.num_experts,
            "expert_mlp": self.moe_intermediate_size,
        }
        return {dim: size for dim, size in given.items() if size is not None}
