"""What a report shows."""

from __future__ import annotations

from regrow.config import Config


class ReportConfig(Config):
    """How the page is made; what it shows is whatever the run folder holds."""

    title: str = "A smaller model, and what it cost"
    """Heading of the page."""
