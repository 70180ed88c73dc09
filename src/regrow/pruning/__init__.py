"""Cutting a model: which units stay, the cut from disk to disk, and the repair of what is left."""
