"""Signals from inside the models, beside the output losses: one file each, named by the file."""
