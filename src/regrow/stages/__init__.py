"""The stages, a folder each; `regrow/stage.py` says what such a folder holds."""
