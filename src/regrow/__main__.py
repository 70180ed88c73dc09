"""`python -m regrow` is the command `regrow`."""

from regrow.cli.main import entry

entry()
