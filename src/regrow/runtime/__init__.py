"""Helpers for all stages: progress lines, distributed jobs, energy, precision, greedy decoding."""
