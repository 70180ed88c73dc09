"""A recipe: a model, its data and an ordered list of stages, run as one resumable job."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from regrow import manifest
from regrow.checkpoint import load
from regrow.checks import check_steps
from regrow.config import Config, parse
from regrow.data.config import DataConfig
from regrow.data.digest import data_digest
from regrow.data.files import sha256_of
from regrow.errors import UserError
from regrow.options import Options
from regrow.overrides import override
from regrow.plan import FILE as PLAN
from regrow.progress import say
from regrow.steps import Step, fitted, parse_step, prompts_of

KeepStages = Literal["all", "last"]
RECIPE = "recipe.yaml"
HEAVY = ("trainer", "grams", "train", "heldout")


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
        return [parse_step(entry, number) for number, entry in enumerate(self.stages)]


def read(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML; `overrides` are key=value, as stages.1.prune.keep_params=0.7.

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
    for given in overrides or []:
        override(fields, given)
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
    if job.finished():
        say(f"run: {job.out} is complete and unchanged")
        return job.out
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
    plain: str | Path = ""
    """The current model before it was quantized: what a file of other types is made from."""
    profile: Path | None = None
    caches: dict[str, Path] = field(default_factory=dict)
    """By teacher, the last cache of it."""
    answers: dict[str, Path] = field(default_factory=dict)
    """By teacher, its last answers."""
    own_answers: Path | None = None
    """Those of the current model."""
    models: dict[str, str | Path] = field(default_factory=dict)
    reported: bool = False

    def __post_init__(self) -> None:
        self.steps = self.recipe.steps()
        self.current = self.plain = self.recipe.model
        self.models = {"teacher": self.recipe.model}

    def folder(self, name: str) -> Path:
        """A stage's output folder."""
        return self.out / "stages" / name

    def add(self, label: str, folder: Path) -> None:
        """Make `folder` the current model, to be evaluated under `label`."""
        count = sum(known.split(" ")[0] == label for known in self.models)
        self.models[f"{label} {count + 1}" if count else label] = folder
        self.current = self.plain = folder
        self.own_answers = None

    def check(self) -> None:
        """Raise UserError for whatever can be known to fail before any slow work."""
        if not (self.out / RECIPE).exists():
            manifest.refuse_foreign(self.out, "run")
        check(self.recipe, self.options)

    def finished(self) -> bool:
        """Whether this job was done and its intermediate weights dropped: nothing to look up."""
        found = manifest.read(self.out)
        return found is not None and found.get("digest") == self.digest()

    def digest(self) -> str:
        """Of the recipe and all that it reads."""
        from regrow.stages.evaluate.texts import text_files

        models = {self.recipe.model, *(step.teacher for step in self.steps if step.teacher)}
        models |= {name for s in self.steps if s.name == "distill" for name in s.config.blend}
        texts = [
            sha256_of(path)
            for step in self.steps
            if step.name == "evaluate"
            for source in step.config.texts.values()
            for path in text_files(source)
        ]
        return manifest.digest(
            self.recipe.model_dump(mode="json"),
            [load(model).fingerprint for model in sorted(models)],
            data_digest(self.recipe.data),
            texts,
            *(data_digest(step.prompts) for step in self.steps if step.prompts is not None),
        )

    def begin(self) -> None:
        """Make the run folder and write down the recipe."""
        (self.out / "stages").mkdir(parents=True, exist_ok=True)
        (self.out / manifest.NAME).unlink(missing_ok=True)
        text = yaml.safe_dump(self.recipe.model_dump(mode="json"), sort_keys=False)
        (self.out / RECIPE).write_text(text)

    def finish(self, keep_stages: KeepStages) -> None:
        """Put the final model at model/, and drop intermediate weights if asked to."""
        if isinstance(self.current, Path):
            from regrow.stages.export.card import write_card

            _publish(self.current, self.out / "model")
            write_card(self.out / "model", self.current)
            say(f"model:  {self.out / 'model'}")
        if keep_stages == "last":
            for path in self.out.glob("stages/*"):
                _drop_weights(path)
            record = {"stage": "run", "digest": self.digest(), "versions": manifest.versions()}
            manifest.write_json(self.out / manifest.NAME, record)
        if self.reported:
            say(f"report: {self.out / 'report.html'}")


def check(recipe: Recipe, options: Options) -> None:
    """Raise UserError, before any slow work, for what in a recipe cannot succeed."""
    check_steps(recipe.model, recipe.data, recipe.steps(), options)


def _rotate(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.rotate import RotateConfig, rotate

    assert isinstance(step.config, RotateConfig)
    rotate(job.current, job.recipe.data, job.folder(name), step.config, job.options)
    job.add("rotated", job.folder(name))


def _profile(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.profile import ProfileConfig, profile

    assert isinstance(step.config, ProfileConfig)
    profile(job.current, job.recipe.data, job.folder(name), step.config, job.options)
    job.profile = job.folder(name)


def _prune(job: _Job, step: Step, name: str) -> None:
    """Cut, then repair: two folders of one plan, so that evaluation can show what repair brings."""
    from regrow.search import prune
    from regrow.stages.prune import PruneConfig

    config = step.config
    assert isinstance(config, PruneConfig)
    assert job.profile is not None
    folder, parent = job.folder(name), job.current
    if not config.repair:
        prune(parent, folder, config, job.profile, job.recipe.data, job.options)
        job.add("pruned", folder)
        return
    repaired = job.folder(name + "-repaired")
    prune(parent, repaired, config, job.profile, job.recipe.data, job.options)
    plain = PruneConfig(plan=str(repaired / PLAN), repair=False)
    prune(parent, folder, plain, job.profile)
    job.add("pruned", folder)
    job.add("repaired", repaired)


def _generate(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.generate import GenerateConfig, generate

    assert isinstance(step.config, GenerateConfig)
    teacher = step.teacher or job.recipe.model
    model = teacher if step.by == "teacher" else job.current
    asked = prompts_of(step, job.recipe.data)
    folder = generate(model, asked, job.folder(name), step.config, job.options)
    if step.by == "teacher":
        job.answers[teacher] = folder
    else:
        job.own_answers = folder


def _cache(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.cache import CacheConfig, cache

    assert isinstance(step.config, CacheConfig)
    teacher, data = step.teacher or job.recipe.model, job.recipe.data
    config = fitted(step, job.steps, job.recipe.model)
    job.caches[teacher] = cache(teacher, data, job.folder(name), config, job.options)


def _distill(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.distill import DistillConfig, distill

    config, teacher = step.config, step.teacher or job.recipe.model
    assert isinstance(config, DistillConfig)
    if config.cache is None and teacher in job.caches:
        config = config.model_copy(update={"cache": str(job.caches[teacher])})
    if config.answers is None and teacher in job.answers:
        config = config.model_copy(update={"answers": str(job.answers[teacher])})
    if config.own_answers is None and job.own_answers is not None:
        config = config.model_copy(update={"own_answers": str(job.own_answers)})
    distill(
        job.current,
        teacher,
        job.recipe.data,
        job.folder(name),
        config,
        job.options,
        journal=job.out / "metrics.jsonl",
    )
    job.add("distilled", job.folder(name))


def _quantize(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.quantize import QuantizeConfig, quantize

    assert isinstance(step.config, QuantizeConfig)
    plain = job.current
    quantize(plain, job.folder(name), step.config, job.recipe.data, job.options)
    job.add("quantized", job.folder(name))
    job.plain = plain


def _evaluate(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.evaluate import EvaluateConfig, evaluate

    assert isinstance(step.config, EvaluateConfig)
    against, models = step.teacher or job.recipe.model, job.models
    if against != job.recipe.model:  # the model that all began with is another than the teacher
        models = {"original" if label == "teacher" else label: m for label, m in models.items()}
    evaluate(models, job.folder(name), job.recipe.data, against, step.config, job.options)


def _export(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.export import ExportConfig, export

    assert isinstance(step.config, ExportConfig)
    export(job.plain, job.folder(name), step.config, job.recipe.data)


def _report(job: _Job, step: Step, name: str) -> None:
    from regrow.stages.report import ReportConfig, report

    assert isinstance(step.config, ReportConfig)
    report(job.out, job.out / "report.html", step.config)
    job.reported = True


_RUNNERS: dict[str, Callable[[_Job, Step, str], None]] = {
    "rotate": _rotate,
    "profile": _profile,
    "prune": _prune,
    "generate": _generate,
    "cache": _cache,
    "distill": _distill,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
}


def _publish(folder: Path, out: Path) -> None:
    """A copy of a stage's model folder, by hard links where the disk can, put in place at once."""
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    skip = shutil.ignore_patterns("trainer", "tensorboard")
    shutil.copytree(folder, partial, copy_function=manifest.link, ignore=skip)
    manifest.replace_folder(partial, out)


def _drop_weights(folder: Path) -> None:
    """What is large goes; the stage then counts as not done: the next one could not read it."""
    heavy = [*folder.glob("model*.safetensors*"), *(folder / name for name in HEAVY)]
    there = [path for path in heavy if path.exists()]
    if there:
        manifest.forget(folder)
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
