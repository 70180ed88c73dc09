"""Hugging Face checkpoints: open them, read them tensor by tensor, and write them."""

from regrow.checkpoint.checkpoint import Checkpoint, load, save

__all__ = ["Checkpoint", "load", "save"]
