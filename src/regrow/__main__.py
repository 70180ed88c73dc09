"""`python -m regrow` is the command `regrow`."""

from regrow.cli import entry

entry()
