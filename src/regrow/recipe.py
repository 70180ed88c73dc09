"""A recipe: a model, its data and an ordered list of stages, run as one resumable job."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, Field

from regrow import manifest
from regrow.config import Config, parse
from regrow.data.config import DataConfig
from regrow.errors import UserError, nearest
from regrow.options import Options
from regrow.progress import say

CONFIGS = {
    "profile": "ProfileConfig",
    "prune": "PruneConfig",
    "distill": "DistillConfig",
    "evaluate": "EvaluateConfig",
    "report": "ReportConfig",
}
LATER = ("cache", "generate", "quantize", "export", "advise")
KeepStages = Literal["all", "last"]


class Step(Config):
    """One stage of a recipe, with its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: str
    config: Config
    teacher: str | None = None


class Recipe(Config):
    """What a job does; the same recipe gives the same result."""

    model: str
    """Hugging Face folder, hub id, GGUF file, or package:NAME."""
    data: DataConfig
    """The text, in splits for calibration, training and held-out measuring."""
    stages: list[dict[str, Any] | str] = Field(min_length=1)
    """The stages in order, each a name or {name: {its fields}}; repeats are allowed."""

    def steps(self) -> list[Step]:
        """The stages with their configs checked; raises UserError for what is unknown."""
        return [_step(entry, f"stages.{n}") for n, entry in enumerate(self.stages)]


def read(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML; `overrides` are `key=value`, keys dotted: stages.1.prune.keep_params.

    Raises UserError for a missing or broken file and for unknown keys, with the nearest valid one.
    """
    path = Path(path)
    try:
        fields = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no such recipe: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no YAML: {reason}") from None
    if not isinstance(fields, dict):
        raise UserError(f"{path} is no recipe: it needs the keys model, data and stages")
    for override in overrides or []:
        _override(fields, override)
    recipe = parse(Recipe, fields, "")
    recipe.steps()
    return recipe


def run(
    recipe: Recipe | str | Path,
    out: str | Path,
    options: Options | None = None,
    keep_stages: KeepStages = "all",
) -> Path:
    """Run a recipe into `out`: stages/NN-name/, metrics.jsonl, model/ and report.html.

    Run again, it skips what is complete and unchanged and goes on where it stopped. Everything
    that can be wrong is checked before the slow work; raises UserError for it.
    """
    recipe = recipe if isinstance(recipe, Recipe) else read(recipe)
    job = _Job(recipe, Path(out), options or Options())
    job.check()
    job.begin()
    for number, step in enumerate(job.steps, start=1):
        say(f"── {number}/{len(job.steps)} {step.name}")
        _RUNNERS[step.name](job, step, f"{number:02d}-{step.name}")
    job.finish(keep_stages)
    return job.out


@dataclass
class _Job:
    """The state a recipe carries from stage to stage."""

    recipe: Recipe
    out: Path
    options: Options
    current: str | Path = ""
    profile: Path | None = None
    models: dict[str, str | Path] = field(default_factory=dict)
    reported: bool = False

    def __post_init__(self) -> None:
        self.steps = self.recipe.steps()
        self.current = self.recipe.model
        self.models = {"teacher": self.recipe.model}

    def folder(self, name: str) -> Path:
        """A stage's output folder."""
        return self.out / "stages" / name

    def add(self, label: str, folder: Path) -> None:
        """Make `folder` the current model, to be evaluated under `label`."""
        count = sum(known.split(" ")[0] == label for known in self.models)
        self.models[f"{label} {count + 1}" if count else label] = folder
        self.current = folder

    def check(self) -> None:
        """Raise UserError for whatever can be known to fail before any slow work."""
        if self.out.is_file():
            raise UserError(f"{self.out} is a file: give --out a folder that is new or empty")
        foreign = self.out.is_dir() and any(self.out.iterdir())
        if foreign and not (self.out / "recipe.yaml").exists():
            raise UserError(f"{self.out} holds something else: give --out a new or empty folder")
        check(self.recipe, self.options)

    def begin(self) -> None:
        """Make the run folder and write down the recipe."""
        (self.out / "stages").mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        (self.out / "recipe.yaml").write_text(text)

    def finish(self, keep_stages: KeepStages) -> None:
        """Put the final model at model/, and drop intermediate weights if asked to."""
        if isinstance(self.current, Path):
            _publish(self.current, self.out / "model")
            say(f"model:  {self.out / 'model'}")
        if keep_stages == "last":
            for path in self.out.glob("stages/*"):
                for heavy in [*path.glob("*.safetensors"), path / "trainer", path / "grams"]:
                    shutil.rmtree(heavy) if heavy.is_dir() else heavy.unlink(missing_ok=True)
        if self.reported:
            say(f"report: {self.out / 'report.html'}")


def check(recipe: Recipe, options: Options) -> None:
    """Raise UserError, before any slow work, for what in a recipe cannot succeed."""
    from regrow import families
    from regrow.checkpoint import load
    from regrow.data.sources import check_source
    from regrow.search import check_keep_params
    from regrow.stages.distill.stage import steps_of
    from regrow.stages.profile.stage import statistics_needed

    checkpoint = load(recipe.model)
    families.of(checkpoint)
    checkpoint.tokenizer()
    options.torch_device()
    for source in recipe.data.sources:
        check_source(source)
    profiled = pruned = False
    for number, step in enumerate(recipe.steps()):
        where = f"stages.{number}.{step.name}"
        config: Any = step.config
        if step.teacher is not None:
            load(step.teacher).tokenizer()
        if step.name == "profile":
            statistics_needed(config.criteria)
            profiled = True
        elif step.name == "prune":
            if not profiled:
                raise UserError(f"{where}: put a profile stage of the same model before it")
            if not pruned:
                check_keep_params(checkpoint, config)
            profiled, pruned = False, True
        elif step.name == "distill":
            steps_of(config, recipe.data, options)
            profiled = False
        elif step.name == "report":
            import_module("regrow.stages.report.stage").check_extra()


def _profile(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.profile import ProfileConfig, profile

    assert isinstance(step.config, ProfileConfig)
    profile(job.current, job.recipe.data, job.folder(name), step.config, job.options)
    job.profile = job.folder(name)


def _prune(job: _Job, step: Step, name: str) -> None:
    """Cut, then repair: two folders of one plan, so that the evaluation can show what repair brings."""
    from regrow.search import prune
    from regrow.stages.prune import PruneConfig

    config = step.config
    assert isinstance(config, PruneConfig) and job.profile is not None
    folder, parent = job.folder(name), job.current
    if not config.repair:
        prune(parent, folder, config, job.profile, job.recipe.data, job.options)
        job.add("pruned", folder)
        return
    repaired = job.folder(name + "-repaired")
    prune(parent, repaired, config, job.profile, job.recipe.data, job.options)
    plain = PruneConfig(plan=str(repaired / "plan.json"), repair=False)
    prune(parent, folder, plain, job.profile)
    job.add("pruned", folder)
    job.add("repaired", repaired)


def _distill(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.distill import DistillConfig, distill

    assert isinstance(step.config, DistillConfig)
    distill(
        job.current,
        step.teacher or job.recipe.model,
        job.recipe.data,
        job.folder(name),
        step.config,
        job.options,
        journal=job.out / "metrics.jsonl",
    )
    job.add("distilled", job.folder(name))


def _evaluate(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.evaluate import EvaluateConfig, evaluate

    assert isinstance(step.config, EvaluateConfig)
    against = step.teacher or job.recipe.model
    evaluate(job.models, job.folder(name), job.recipe.data, against, step.config, job.options)


def _report(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.report import ReportConfig, report

    assert isinstance(step.config, ReportConfig)
    report(job.out, job.out / "report.html", step.config)
    job.reported = True


_RUNNERS: dict[str, Callable[[_Job, Step, str], None]] = {
    "profile": _profile,
    "prune": _prune,
    "distill": _distill,
    "evaluate": _evaluate,
    "report": _report,
}


def _step(entry: dict[str, Any] | str, where: str) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if len(entry) != 1:
        raise UserError(f"{where}: one stage per entry, as `- name: {{fields}}`; given: {list(entry)}")
    ((name, fields),) = entry.items()
    if name in LATER:
        raise UserError(f"{where}: the stage {name} is not built yet; there are: {list(CONFIGS)}")
    if name not in CONFIGS:
        hint = nearest(name, CONFIGS)
        raise UserError(f"{where}: no stage named {name!r}{hint}; there are: {', '.join(CONFIGS)}")
    if not isinstance(fields or {}, dict):
        raise UserError(f"{where}.{name}: give its fields as `key: value` (given: {fields!r})")
    fields = dict(fields or {})
    teacher = fields.pop("teacher", None) if name in ("distill", "evaluate") else None
    kind = getattr(import_module(f"regrow.stages.{name}"), CONFIGS[name])
    return Step(name=name, config=parse(kind, fields, f"{where}.{name}"), teacher=teacher)


def _override(fields: dict[str, Any], override: str) -> None:
    """Set one dotted key; list positions are numbers, and a stage may be named instead."""
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"--set {override}: write key=value, for instance data.seed=1")
    *path, last = key.split(".")
    place: Any = fields
    for part in path:
        place = _enter(place, part, override)
    parsed = yaml.safe_load(value)
    if isinstance(place, list) and last.isdigit() and int(last) < len(place):
        place[int(last)] = parsed
    elif isinstance(place, dict):
        place[last] = parsed
    else:
        raise UserError(f"--set {override}: there is no {key} in the recipe")


def _enter(place: Any, part: str, override: str) -> Any:
    if isinstance(place, list) and part.isdigit() and int(part) < len(place):
        if isinstance(place[int(part)], str):
            place[int(part)] = {place[int(part)]: {}}
        return place[int(part)]
    if isinstance(place, list):  # the first stage of that name
        for number, entry in enumerate(place):
            if entry == part:
                place[number] = entry = {part: {}}
            if isinstance(entry, dict) and part in entry:
                entry[part] = entry[part] if isinstance(entry[part], dict) else {}
                return entry[part]
    if isinstance(place, dict):
        if not isinstance(place.get(part), dict | list):
            place[part] = {}
        return place[part]
    raise UserError(f"--set {override}: the recipe has no {part!r} there")


def _publish(folder: Path, out: Path) -> None:
    """A copy of a stage's model folder, by hard links where the disk can, put in place at once."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    skip = shutil.ignore_patterns("trainer", "tensorboard")
    shutil.copytree(folder, partial, copy_function=_link, ignore=skip)
    manifest.replace_folder(partial, out)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
