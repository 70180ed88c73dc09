"""Sections of the page, one file each: `section(run) -> Section | None`, None without its input."""
