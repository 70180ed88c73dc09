"""Prune a model: choose the units to keep, cut from disk to disk, and repair the cut model."""
