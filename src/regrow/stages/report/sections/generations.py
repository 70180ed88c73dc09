"""What the models write, side by side."""

from __future__ import annotations

from regrow.stages.report.evaluated import of
from regrow.stages.report.page import Answers, Block, Section
from regrow.stages.report.run_folder import Run


def section(runs: list[Run]) -> Section | None:
    """Per prompt the answer of every model."""
    found = of(runs)
    if found is None:
        return None
    by_prompt: dict[str, list[tuple[str, str]]] = {}
    for label in found.labels:
        for row in found.generations[label]:
            by_prompt.setdefault(row["prompt"], []).append((label, row["text"]))
    blocks: list[Block] = [Answers(prompt, answers) for prompt, answers in by_prompt.items()]
    note = "Greedy continuations, cut at a fixed number of tokens."
    return Section("generations", "In their own words", note, blocks) if blocks else None
