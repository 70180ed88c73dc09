"""Criteria side by side; importance anew after each round; one head removed, least or random."""

from __future__ import annotations

from regrow.comparison.criteria import compare, line_up

__all__ = ["compare", "line_up"]
