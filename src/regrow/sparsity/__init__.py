"""Weights with zeros: their patterns, how they stay zero, and how they are stored."""
