"""A recipe: a model, its data and an ordered list of stages, run as one resumable job."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator

from regrow import stage_dir
from regrow.checkpoint import load
from regrow.config import Config, Options, parse
from regrow.data.config import DataConfig
from regrow.data.sources import data_digest, outline
from regrow.errors import UserError
from regrow.recipe import presets
from regrow.recipe.iterate import expand
from regrow.runtime import distributed
from regrow.runtime.lock import Lock
from regrow.runtime.progress import clock, say
from regrow.stage import RecipeRun, Step, parse_step

KeepStages = Literal["all", "last"]
RECIPE = "recipe.yaml"
HEAVY = ("trainer", "grams", "train", "heldout")


class Recipe(Config):
    """Definition of a job; the same recipe gives the same result."""

    model: str
    """Hugging Face folder, hub id, GGUF file, or package:NAME."""
    data: DataConfig
    """The text, in splits for calibration, training and held-out evaluation."""
    stages: list[dict[str, Any] | str] = Field(min_length=1)
    """The stages in order, each a name or {name: {its fields}}; a stage may occur several times.
    `iterate` stands for rounds of profile, prune, reconstruct and distill."""

    @field_validator("stages", mode="before")
    @classmethod
    def _with_rounds(cls, stages: Any) -> Any:
        return expand(stages)

    def steps(self) -> list[Step]:
        """The stages with validated configs; raises UserError for unknown stages and fields."""
        return [parse_step(entry, number) for number, entry in enumerate(self.stages)]


def read(
    path: str | Path,
    overrides: list[str] | None = None,
    given: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe from YAML; `overrides` are key=value, as stages.1.prune.keep_params=0.7.

    `preset:NAME` is a recipe that comes with regrow, for the model, data, teacher and prompts in
    `given` (see `presets`); a file takes model and data from it. Raises UserError for a missing or
    broken file, and for unknown keys, with the nearest valid key.
    """
    given = {key: value for key, value in (given or {}).items() if value}
    if str(path).startswith(presets.PREFIX):
        fields = presets.fields(str(path).removeprefix(presets.PREFIX), given)
    else:
        fields = _read_file(Path(path))
        _replace(fields, given)
    for each in overrides or []:
        override(fields, each)
    recipe = parse(Recipe, fields, "")
    recipe.steps()
    return recipe


def _read_file(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such recipe: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML: {reason}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no recipe: it needs the keys model, data and stages")
    return fields


def _replace(fields: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Replace model and data of a recipe's fields in place."""
    for word, value in given.items():
        if word == "MODEL":
            fields["model"] = value
        elif word == "DATA":
            whole = fields.get("data")
            sources = list(value)
            fields["data"] = {**whole, "sources": sources} if isinstance(whole, dict) else sources
        else:
            flag = presets.FLAGS[word]
            raise UserError(f"{flag} is for presets: name it in the recipe's stages instead")


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    options: Options | None = None,
    keep_stages: KeepStages = "all",
) -> Path:
    """Run a recipe into `out`: stages/NN-name/, metrics.jsonl, model/ and report.html.

    If a run is repeated, complete and unchanged stages are skipped, and it continues where it
    stopped. In a job of several processes (torchrun), a stage runs as its `ranks` says. Raises
    UserError, before any slow work, for a recipe that cannot succeed, and while another process
    runs one in `out`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read(recipe)
    out, options = Path(out), options or Options()
    with distributed.together(), Lock(out / stage_dir.LOCK, out) as lock:
        _agree(recipe)
        if distributed.on_first(partial(_begin, recipe, out, options, lock)):
            distributed.require_shared(out / RECIPE)
            _run_stages(recipe, out, options, keep_stages)
    return out


def _agree(recipe: Recipe) -> None:
    """Raise UserError if the processes of a job see different recipes, models or texts."""
    if distributed.world_size() > 1:
        fields = recipe.model_dump(mode="json")
        distributed.agree("the recipe", stage_dir.digest(fields, stage_dir.versions()))
        distributed.on_first(partial(_outlines, recipe))  # downloads, and converts GGUF files
        for what, value in _outlines(recipe).items():
            distributed.agree(what, value)


def _outlines(recipe: Recipe) -> dict[str, str]:
    """Hashes of what can be read quickly of each model and source: names, shapes and sizes."""
    models = {f"the model {model}": load(model).outline for model in _models(recipe)}
    return models | {f"the text {each.source}": outline(each) for each in recipe.data.sources}


def _run_stages(recipe: Recipe, out: Path, options: Options, keep_stages: KeepStages) -> None:
    job = RecipeRun(recipe.model, recipe.data, recipe.steps(), out, options)
    for number, step in enumerate(job.steps, start=1):
        title, start = f"── {number}/{len(job.steps)} {step.name}", time.monotonic()
        say(title)
        work = partial(_run_stage, step, job, f"{number:02d}-{step.name}")
        vars(job).update(step.stage.on_ranks(work))
        say(f"{title}: done in {clock(time.monotonic() - start)}")
    distributed.on_first(partial(_finish, recipe, job, keep_stages))


def _run_stage(step: Step, job: RecipeRun, folder: str) -> dict[str, Any]:
    """Run one stage; return the fields of `job`, which update `job` in the other processes."""
    step.stage.run(step, job, folder)
    return vars(job)


def check(recipe: Recipe, options: Options) -> None:
    """Raise UserError, before any slow work, if the recipe cannot succeed."""
    from regrow.recipe.check import check_steps

    check_steps(recipe.model, recipe.data, recipe.steps(), options)


def _finished(recipe: Recipe, out: Path) -> bool:
    """Whether the job is complete and its intermediate weights were deleted."""
    found = stage_dir.read(out)
    return found is not None and found.get("digest") == _digest(recipe)


def _digest(recipe: Recipe) -> str:
    """Hash of the recipe and all its inputs."""
    return stage_dir.digest(
        recipe.model_dump(mode="json"),
        _fingerprints(recipe),
        data_digest(recipe.data),
        *(list(step.stage.inputs(step)) for step in recipe.steps()),
    )


def _fingerprints(recipe: Recipe) -> list[str]:
    """Fingerprints of the model and all teachers; raises UserError if weights contain NaN."""
    return [load(model).fingerprint for model in _models(recipe)]


def _models(recipe: Recipe) -> list[str]:
    """The recipe's model and all teachers."""
    return sorted({recipe.model, *(step.teacher for step in recipe.steps() if step.teacher)})


def _begin(recipe: Recipe, out: Path, options: Options, lock: Lock) -> bool:
    """Check the recipe and write it to the run folder; return False if the job is complete.

    Raises UserError, before and after the checks, if another process has the run's lock.
    """
    if (out / RECIPE).exists():
        lock.acquire()
    else:
        lock.refuse()
        stage_dir.refuse_foreign(out, "run")
    say(f"run: opening {recipe.model} and checking {len(recipe.stages)} stages")
    check(recipe, options)
    if _finished(recipe, out):
        say(f"run: {out} is complete and unchanged")
        return False
    _fingerprints(recipe)  # reads all bytes of the models and rejects broken ones
    out.mkdir(parents=True, exist_ok=True)
    lock.acquire()
    (out / "stages").mkdir(exist_ok=True)
    (out / stage_dir.NAME).unlink(missing_ok=True)
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    (out / RECIPE).write_text(text)
    return True


def _finish(recipe: Recipe, job: RecipeRun, keep_stages: KeepStages) -> None:
    """Copy the final model to model/, and delete intermediate weights if requested."""
    out = job.out
    if isinstance(job.current, Path):
        from regrow.card import write_card

        _publish(job.current, out / "model")
        write_card(out / "model", job.current)
        say(f"model:  {out / 'model'}")
    if keep_stages == "last":
        for path in out.glob("stages/*"):
            _drop_weights(path)
        record = {"stage": "run", "digest": _digest(recipe), "versions": stage_dir.versions()}
        stage_dir.write_json(out / stage_dir.NAME, record)
    if job.reported:
        say(f"report: {out / 'report.html'}")


def _publish(folder: Path, out: Path) -> None:
    """Copy a stage's model folder, with hard links if possible; the result appears at once."""
    out = stage_dir.output_folder(out)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    skip = shutil.ignore_patterns("trainer", "tensorboard")
    shutil.copytree(folder, partial, copy_function=stage_dir.link, ignore=skip)
    stage_dir.replace_folder(partial, out)


def _drop_weights(folder: Path) -> None:
    """Delete large files; the stage then counts as incomplete, as later stages need these files."""
    heavy = [*folder.glob("model*.safetensors*"), *(folder / name for name in HEAVY)]
    there = [path for path in heavy if path.exists()]
    if there:
        stage_dir.forget(folder)
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def override(fields: dict[str, Any], given: str) -> None:
    """Set one dotted key of nested dicts and lists in place: `stages.prune.keep_params=0.7`.

    A list position is a number, or a stage name, which selects the first stage of that name. Raises
    UserError if `given` is not key=value or the key's place does not exist.
    """
    key, equals, value = given.partition("=")
    if not equals or not key:
        raise UserError(f"--set {given}: write key=value, for instance data.seed=1")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"--set {given}: {value!r} is no YAML value; quote it") from None
    *path, last = key.split(".")
    place: Any = fields
    for part in path:
        place = _enter(place, part, given)
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"--set {given}: there is no {key} in the recipe")


def _enter(place: Any, part: str, given: str) -> Any:
    if isinstance(place, list):
        number = int(part) if part.isdigit() else _first_stage(place, part)
        if number is not None and number < len(place):
            return _entered_stage(place, number, part)
    elif isinstance(place, dict):
        if not isinstance(place.get(part), dict | list):
            place[part] = {}
        return place[part]
    raise UserError(f"--set {given}: the recipe has no {part!r} there")


def _first_stage(stages: list[Any], name: str) -> int | None:
    named = (n for n, entry in enumerate(stages) if entry == name or _is_stage(entry, name))
    return next(named, None)


def _is_stage(entry: Any, name: str) -> bool:
    return isinstance(entry, dict) and name in entry


def _entered_stage(stages: list[Any], number: int, part: str) -> Any:
    """Return the entry at `number`, or the fields of its stage `part`; a bare name gets fields."""
    if isinstance(stages[number], str):
        stages[number] = {stages[number]: {}}
    entry = stages[number]
    if not _is_stage(entry, part):
        return entry
    if not isinstance(entry[part], dict):
        entry[part] = {}
    return entry[part]
