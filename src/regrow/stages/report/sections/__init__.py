"""Sections of the page, one file each: `section(runs)` returns a Section, or None without input."""
