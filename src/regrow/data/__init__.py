"""Turns text sources into packed, masked token sequences, with splits that do not overlap."""

from regrow.data.config import DataConfig, SourceConfig, Split

__all__ = ["DataConfig", "SourceConfig", "Split"]
