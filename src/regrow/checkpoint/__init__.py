"""Hugging Face checkpoints: opened, read tensor by tensor, and written."""

from regrow.checkpoint.checkpoint import Checkpoint, load, save

__all__ = ["Checkpoint", "load", "save"]
