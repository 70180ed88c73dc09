"""What a rotation is measured on."""

from __future__ import annotations

from pydantic import Field

from regrow.config import Config


class RotateConfig(Config):
    """The text whose principal directions become the channels."""

    samples: int = Field(default=96, ge=1)
    """Calibration blocks to run through the model."""
