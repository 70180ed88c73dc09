"""The tasks that lm_eval knows by name."""

from __future__ import annotations

import json
from functools import cache
from importlib.metadata import version

from lm_eval.tasks import TaskManager

from regrow.manifest import write_json
from regrow.options import cache_folder
from regrow.progress import say


@cache
def manager() -> TaskManager:
    """lm_eval's list of tasks, read once; it takes seconds."""
    say("evaluate: reading lm_eval's list of tasks")
    return TaskManager()


def known_names() -> list[str]:
    """Names of all tasks, groups and tags of lm_eval; kept, as it takes seconds to gather them."""
    path = cache_folder() / f"lm_eval-{version('lm_eval')}-tasks.json"
    try:
        names: list[str] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        names = manager().all_tasks
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, names)
    return names
