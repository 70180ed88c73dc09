"""The commands, one function each: its parameters are the flags, its docstring is the help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

from regrow.config import Config, parse
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.manifest import refuse_foreign
from regrow.options import Options
from regrow.recipe import KeepStages
from regrow.stages.cache import CacheConfig
from regrow.stages.distill import DistillConfig
from regrow.stages.evaluate import EvaluateConfig
from regrow.stages.export import ExportConfig
from regrow.stages.generate import GenerateConfig
from regrow.stages.profile import ProfileConfig
from regrow.stages.prune import PruneConfig
from regrow.stages.quantize import QuantizeConfig
from regrow.stages.report import ReportConfig
from regrow.stages.rotate import RotateConfig

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.stages.evaluate.gguf_file import GgufFile

Model = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]


class OptionalText(Config):
    """The text to work on."""

    data: tuple[str, ...] = ()
    """Text: files, folders, hub ids, package:NAME==VERSION/path."""
    data_weights: tuple[float, ...] = ()
    """Share of each source in the blend."""
    sequence_length: int = 512
    """Tokens per block."""

    def blend(self) -> DataConfig:
        """The sources as a recipe's `data`; raises UserError for weights that do not fit them."""
        count = len(self.data)
        if self.data_weights and len(self.data_weights) != count:
            given = len(self.data_weights)
            raise UserError(f"{given} --data-weights for {count} --data: give one each")
        shares = self.data_weights or (1.0,) * count
        blend = [{"source": s, "weight": w} for s, w in zip(self.data, shares, strict=True)]
        fields = {"sources": blend, "sequence_length": self.sequence_length}
        return parse(DataConfig, fields, "--data")


class Text(OptionalText):
    """The text to work on."""

    data: tuple[str, ...]
    """Text: files, folders, hub ids, package:NAME==VERSION/path."""


def inspect(model: Model) -> None:
    """Print a model's family, its axes with their legal widths, and sizes at a few targets.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
    """
    from regrow.inspect import describe_model

    describe_model(model)


def run(
    recipe: Positional[Path],
    out: Path,
    options: OmitArgPrefixes[Options] = Options(),
    set: UseAppendAction[tuple[str, ...]] = (),
    keep_stages: KeepStages = "all",
    dry_run: bool = False,
) -> None:
    """Run a recipe: a whole job, resumable by the same command.

    Args:
        recipe: YAML file with model, data and stages.
        out: Folder for stages/, metrics.jsonl, model/ and report.html.
        options: Device and portions.
        set: Override a field of the recipe: stages.prune.keep_params=0.7.
        keep_stages: Keep the weights of all stages, or of the final model only.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow import recipe as recipes

    job = recipes.read(recipe, list(set))
    if dry_run:
        recipes.check(job, options)
        _print(estimate.of_recipe(job, options))
        return
    recipes.run(job, out, options, keep_stages)


def rotate(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[RotateConfig] = RotateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Turn the residual stream, so that a cut of its channels (hidden) loses less.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the turned model to.
        config: The text to measure on.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.checkpoint import load
    from regrow.stages.rotate import rotate as stage

    blend = text.blend()
    if dry_run:
        _print(estimate.of_rotate(load(model), blend, config), out)
        return
    stage(model, blend, out, config, options)


def profile(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[ProfileConfig] = ProfileConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Measure what matters in a model on calibration text.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the profile to.
        config: What to measure.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.checkpoint import load
    from regrow.stages.profile import profile as stage

    blend = text.blend()
    if dry_run:
        _print(estimate.of_profile(load(model), blend, config), out)
        return
    stage(model, blend, out, config, options)


def prune(
    model: Model,
    out: Path,
    profile: Path | None = None,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[PruneConfig] = PruneConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Cut a model to a share of its parameters, to sizes, or by a plan, and repair what is left.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the smaller model to.
        profile: Folder that regrow profile wrote for this model.
        config: What to prune to, and how.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.checkpoint import load
    from regrow.search import prune as to_target

    if dry_run:
        _print(estimate.of_prune(load(model), config, text.sequence_length), out)
        return
    blend = text.blend() if text.data else None
    to_target(model, out, config, profile, blend, options)


def compare(
    model: Model,
    profile: Path,
    text: OmitArgPrefixes[Text],
    config: OmitArgPrefixes[PruneConfig] = PruneConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    out: Path | None = None,
    rounds: int = 1,
    heads: int = 0,
    dry_run: bool = False,
) -> None:
    """Make the same cut by every criterion of a profile, and print what each costs untrained.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        profile: Folder that regrow profile wrote for this model.
        config: What to prune to; its criterion is the one that is re-estimated.
        options: Device and portions.
        out: JSON file to write the table to.
        rounds: Compare single-shot importance with re-estimating it in so many rounds as well.
        heads: Remove one query head as well: the least important against one at random, this often.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.comparison import compare as by_each

    blend = text.blend()
    if dry_run:
        _print(estimate.of_compare(_open(model), profile, blend, config, rounds, heads))
        return
    by_each(model, profile, blend, config, out, options, rounds, heads)


def generate(
    model: Model,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[GenerateConfig] = GenerateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Let a model answer prompts; its answers are text to distil on.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write answers.jsonl to; it can be given as --data.
        config: Which prompts, and how the answers are drawn.
        options: Device and portions; --batch-size prompts are answered at once.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.stages.generate import generate as stage

    master, blend = _open(model, quantized=True), text.blend()
    if dry_run:
        _print(estimate.of_generate(master, blend, config), out)
        return
    stage(master, blend, out, config, options)


def cache(
    teacher: Annotated[Positional[str], tyro.conf.arg(metavar="TEACHER")],
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[CacheConfig] = CacheConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Run a teacher once over the text of distillations to come, and store what it says.

    Args:
        teacher: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the cache to; a finished one is added to.
        config: How much to store, and how.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.stages.cache import cache as stage

    master, blend = _open(teacher), text.blend()
    if dry_run:
        _print(estimate.of_cache(master, blend, config), out)
        return
    stage(master, blend, out, config, options)


def distill(
    student: Annotated[Positional[str], tyro.conf.arg(metavar="STUDENT")],
    teacher: str,
    text: OmitArgPrefixes[Text],
    out: Path,
    config: OmitArgPrefixes[DistillConfig] = DistillConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Train a student to give its teacher's next-token distribution.

    Args:
        student: A pruned or otherwise smaller model, or a config.json for one made fresh.
        teacher: The model to learn from; for one of another tokenizer see --cross-tokenizer.
        out: Folder to write the distilled model to.
        config: Budget, loss and schedule.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.stages.distill import distill as stage
    from regrow.stages.distill.student import open_student

    master = _open(teacher)
    pupil = open_student(student if student.endswith(".json") else _open(student), master)
    blend = text.blend()
    if dry_run:
        _print(estimate.of_distill(pupil, master, blend, config, options), out)
        return
    stage(student, master, blend, out, config, options)


def quantize(
    model: Model,
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[QuantizeConfig] = QuantizeConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Store a model's weights in 8 or 4 bits, calibrated on text, as compressed-tensors.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write the quantized model to.
        config: Scheme, method, and what is left out.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.stages.quantize import quantize as stage

    blend = text.blend() if text.data else None
    if dry_run:
        _print(estimate.of_quantize(_open(model), blend, config), out)
        return
    stage(_open(model), out, config, blend, options)


def evaluate(
    models: Annotated[Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL")],
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    against: str | None = None,
    config: OmitArgPrefixes[EvaluateConfig] = EvaluateConfig(),
    options: OmitArgPrefixes[Options] = Options(),
    dry_run: bool = False,
) -> None:
    """Measure models side by side: perplexity, KL to the teacher, size, speed, generations.

    Args:
        models: Model folders, and files NAME.gguf, which llama.cpp runs; NAME=MODEL gives one a
            name.
        out: Folder to write the evaluation to.
        against: The teacher, for KL and ratios.
        config: What to measure.
        options: Device and portions.
        dry_run: Check everything and print what would be done.
    """
    from regrow import estimate
    from regrow.stages.evaluate import evaluate as stage

    named = {name: _to_measure(model) for name, model in _named(models).items()}
    master = None if against is None else _open(against, quantized=True)
    blend = text.blend() if text.data else None
    if dry_run:
        _print(estimate.of_evaluate(named, master, blend, config), out)
        return
    stage(named, out, blend, master, config, options)


def export(
    model: Model,
    out: Path,
    text: OmitArgPrefixes[OptionalText] = OptionalText(),
    config: OmitArgPrefixes[ExportConfig] = ExportConfig(),
    dry_run: bool = False,
) -> None:
    """Write a GGUF file for llama.cpp and Ollama, and prove it by llama.cpp.

    Args:
        model: Hugging Face folder, hub id, GGUF file, or package:NAME.
        out: Folder to write to, or the file's name, NAME.gguf.
        config: The file's type, and how it is proven.
        dry_run: Check everything and print what would be done.
    """
    from regrow.checkpoint import load
    from regrow.stages.export.stage import describe
    from regrow.stages.export.stage import export as stage

    blend = text.blend() if text.data else None
    if dry_run:
        folder = None if out.suffix == ".gguf" else out
        _print(describe(load(model), config, model), folder)
        return
    print(stage(model, out, config, blend))


def report(
    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN")],
    out: Path | None = None,
    config: OmitArgPrefixes[ReportConfig] = ReportConfig(),
    dry_run: bool = False,
) -> None:
    """Write a run's one-page HTML report, or one of several runs compared.

    Args:
        runs: Folders that regrow run wrote.
        out: HTML file to write; default RUN/report.html for a single run.
        config: What to show.
        dry_run: Print what would be written.
    """
    from regrow.stages.report import report as stage
    from regrow.stages.report.stage import target_of

    if dry_run:
        print(f"report: of {', '.join(map(str, runs))} to {target_of(list(runs), out)}")
        return
    print(stage(runs, out, config))


def watch(
    run: Annotated[Positional[Path], tyro.conf.arg(metavar="RUN")],
    once: bool = False,
    every: float = 2.0,
) -> None:
    """Show a run that goes on, or is done, in the terminal, until it is complete.

    Args:
        run: Folder that regrow run writes.
        once: Print one frame and leave.
        every: Seconds from frame to frame.
    """
    from regrow.watch import watch as live

    if every <= 0:
        raise UserError(f"--every {every}: give a number of seconds above 0")
    live(run, once, every)


def _print(lines: list[str], out: Path | None = None) -> None:
    if out is not None:
        refuse_foreign(out)
    print("\n".join(lines))


def _open(model: str, quantized: bool = False) -> Checkpoint:
    """A checkpoint of a known family: the stages take any, and find out late."""
    from regrow import families
    from regrow.checkpoint import load

    checkpoint = load(model, quantized)
    families.of(checkpoint)
    return checkpoint


def _to_measure(model: str) -> Checkpoint | GgufFile:
    """As `_open`, and a file NAME.gguf for llama.cpp to run."""
    from regrow import families
    from regrow.stages.evaluate.gguf_file import GgufFile, open_model

    found = open_model(model)
    if not isinstance(found, GgufFile):
        families.of(found)
    return found


def _named(models: tuple[str, ...]) -> dict[str, str]:
    named: dict[str, str] = {}
    for model in models:
        name, equals, folder = model.partition("=")
        named[name if equals else Path(model).name] = folder if equals else model
    if len(named) < len(models):
        raise UserError("two models have the same name: give NAME=FOLDER for each")
    return named
