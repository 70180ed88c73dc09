"""The stages: each reads a folder and writes a folder; none imports another."""
