"""What a report shows."""

from __future__ import annotations

from regrow.config import Config


class ReportConfig(Config):
    """How the page is made; what it shows is whatever the run folder holds."""

    title: str = "A smaller model, and what it cost"
    """Heading of the page."""
    compare: tuple[str, ...] = ()
    """Folders of other evaluations (what regrow evaluate wrote, or runs) whose models are set
    beside this run's; NAME=FOLDER gives one a name."""
