"""What a stage is: one object that the command line, a recipe, its dry run and the API read.

A stage is a folder below `regrow/stages/`. Its `__init__.py` defines one subclass of `Stage` and
its only instance, `STAGE`. A new stage is such a folder and nothing else (docs/add-a-stage.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from regrow import plugins
from regrow.config import Config, Options, parse
from regrow.data.config import DataConfig, Split
from regrow.errors import UserError, unknown

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.families import Family

STAGES = "regrow.stages"
"""The folder of the stages, for `plugins`."""
IN_ORDER = (
    *("profile", "rotate", "compare", "prune", "generate", "cache", "distill"),
    *("quantize", "evaluate", "export", "report"),
)
"""The order in which `regrow --help` lists the stages; others follow by name."""


class Step(Config):
    """One entry of a recipe's `stages`: a stage and its fields."""

    name: str
    """The stage."""
    config: Any
    """The stage's config, an instance of its `config` class."""
    extra: Any = None
    """Fields that only a recipe has, an instance of the stage's `recipe_fields` class."""
    teacher: str | None = None
    """The model it learns from or is compared with; None stands for the recipe's model."""
    where: str = ""
    """Its place in the recipe, for error messages."""

    @property
    def stage(self) -> Stage:
        """The stage's entry."""
        return find(self.name)


@dataclass
class RecipePlan:
    """What is known of a recipe's models and files at one stage, before anything has run.

    `Stage.check` and `Stage.dry_run` read it. `Stage.leave` writes to it what the stages that
    follow will find.
    """

    model: str
    """The recipe's model: the teacher, where a stage names no other."""
    checkpoint: Checkpoint
    data: DataConfig
    options: Options
    steps: list[Step]
    parameters: int = 0
    """Parameters of the model that the next stage works on; a target where it is not known yet."""
    config_now: dict[str, Any] | None = None
    """Config of that model; None after a cut whose sizes are searched for."""
    profiled: bool = False
    """Whether there is a profile of that model."""
    quantized: str = ""
    """Place of the stage whose quantized weights are final, or empty."""
    fewer_tokens: bool = False
    """Whether the vocabulary was cut."""
    caches: dict[str, str] = field(default_factory=dict)
    """Format of the last cache, by teacher."""
    answers: set[str] = field(default_factory=set)
    """Teachers whose answers are there; an empty name stands for the current model's own."""
    calibration_sequences: int = 0
    """Sequences of calibration text that the first profile takes."""
    calibration_to_choose: int = 0
    """Sequences of calibration text, beyond the profile's, that a choice of shape takes."""
    left: dict[str, Any] = field(default_factory=dict)
    """What stages leave for each other that has no field of its own, by a name of their choice."""

    @property
    def family(self) -> Family:
        """The family of the recipe's model."""
        from regrow import families

        return families.of(self.checkpoint)


@dataclass
class RecipeRun:
    """A recipe as it runs: what it is given, and what its stages have made so far."""

    model: str
    """The recipe's model: the teacher, where a stage names no other."""
    data: DataConfig
    steps: list[Step]
    out: Path
    options: Options
    current: str | Path = ""
    """The model that the next stage works on."""
    plain: str | Path = ""
    """The current model before it was quantized: files of other types are made from it."""
    profile: Path | None = None
    """The last profile of the current model."""
    caches: dict[str, Path] = field(default_factory=dict)
    """The last cache, by teacher."""
    answers: dict[str, Path] = field(default_factory=dict)
    """The last answers, by teacher."""
    own_answers: Path | None = None
    """Answers of the current model."""
    models: dict[str, str | Path] = field(default_factory=dict)
    """All models that an evaluation measures, by label."""
    reported: bool = False
    """Whether a report was written."""
    left: dict[str, Any] = field(default_factory=dict)
    """What stages leave for each other that has no field of its own, by a name of their choice."""

    def __post_init__(self) -> None:
        from regrow.checkpoint import load

        self.current = self.plain = self.model
        # Its folder: transformers measures the teacher, also where the model is a GGUF file.
        self.models = {"teacher": load(self.model).folder}

    def folder(self, name: str) -> Path:
        """The output folder of a stage."""
        return self.out / "stages" / name

    def add(self, label: str, folder: Path) -> None:
        """Make `folder` the current model, which later stages evaluate under `label`."""
        count = sum(known.split(" ")[0] == label for known in self.models)
        self.models[f"{label} {count + 1}" if count else label] = folder
        self.current = self.plain = folder
        self.own_answers = None


class Stage:
    """One stage of the path from a large model to a small one.

    The docstring of a subclass says what it takes from a recipe and what it leaves to it. A stage
    imports what is slow to import inside its methods, so that the command line starts quickly.
    """

    config: ClassVar[type[Config]]
    """Its fields, in a recipe and as flags."""
    recipe_fields: ClassVar[type[Config] | None] = None
    """Fields that only a recipe has, if any."""
    in_recipes: ClassVar[bool] = True
    """Whether a recipe can name it; otherwise it is a command only."""
    takes_teacher: ClassVar[bool] = False
    """Whether its entry in a recipe may name a `teacher`."""
    changes_weights: ClassVar[bool] = False
    """Whether it makes a new model: profiles and a model's own answers are then out of date."""
    needs_plain_weights: ClassVar[bool] = False
    """Whether it may not follow a `quantize` whose weights are final."""
    distributed: ClassVar[bool] = False
    """Whether all processes of a job (torchrun) share its work; otherwise process 0 does it."""
    reads: ClassVar[tuple[Split, ...]] = ()
    """Splits of the recipe's text that it reads."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Stages whose functions it calls; no stage imports another that is not named here."""

    @property
    def name(self) -> str:
        """Its name in recipes and on the command line: that of its folder."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def summary(self) -> str:
        """One line for `regrow --help`: the first one of its command's help."""
        return (self.command.__doc__ or "").strip().splitlines()[0]

    @property
    def function(self) -> Callable[..., Any]:
        """The stage as a Python function: `regrow.NAME`, found in `stage.py` of its folder."""
        module = import_module(f"{STAGES}.{self.name}.stage")
        function: Callable[..., Any] = getattr(module, self.name)
        return function

    def command(self, *arguments: Any, **flags: Any) -> None:
        """The stage as a command: its parameters are the flags, its docstring is the help."""
        raise NotImplementedError

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError, before any slow work, for what cannot succeed."""

    def accepts_teacher(self, step: Step, plan: RecipePlan, teacher: Checkpoint) -> bool:
        """Whether it takes a teacher whose tokenizer differs from the recipe's model."""
        return False

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The lines that `regrow run --dry-run` prints for it."""
        return [f"{self.name}: works on the models that are there by then"]

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Note in `plan` what the stages that follow will find."""

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Run it on what the recipe has come to, into `run.folder(folder)`."""
        raise NotImplementedError

    def needs_of_cache(self, step: Step) -> dict[str, int]:
        """Fields of a cache (`tokens`, `heldout_sequences`) that it will read of one."""
        return {}

    def inputs(self, step: Step) -> Iterable[str]:
        """Hashes of what it reads beyond the recipe's model, data and teacher."""
        return ()


def names() -> list[str]:
    """All stages, in the order in which they are listed."""
    found = plugins.names(STAGES)
    return sorted(found, key=lambda name: (IN_ORDER.index(name) if name in IN_ORDER else 99, name))


def find(name: str) -> Stage:
    """The stage of that name; raises UserError when there is none."""
    stage = plugins.load(STAGES, name).STAGE
    assert isinstance(stage, Stage)
    return stage


def parse_step(entry: dict[str, Any] | str, number: int) -> Step:
    """Read `name` or `{name: {its fields}}`; raises UserError for what is unknown."""
    entry = {entry: {}} if isinstance(entry, str) else entry
    where = f"stages.{number}"
    if len(entry) != 1:
        raise UserError(
            f"{where}: give one stage per entry, as `- name: {{fields}}` (given: {list(entry)})"
        )
    ((name, fields),) = entry.items()
    known = [each for each in names() if find(each).in_recipes]
    if name not in known:
        raise UserError(f"{where}: {unknown('stage', str(name), known)}")
    stage, where = find(name), f"{where}.{name}"
    if not isinstance(fields or {}, dict):
        raise UserError(f"{where}: give its fields as `key: value` (given: {fields!r})")
    fields = dict(fields or {})
    teacher = fields.pop("teacher", None) if stage.takes_teacher else None
    if teacher is not None and not isinstance(teacher, str):
        raise UserError(f"{where}.teacher: give a model folder or hub id (given: {teacher!r})")
    extra = None
    if stage.recipe_fields is not None:
        own = {key: fields.pop(key) for key in stage.recipe_fields.model_fields if key in fields}
        extra = parse(stage.recipe_fields, own, where)
    config = parse(stage.config, fields, where)
    return Step(name=name, config=config, extra=extra, teacher=teacher, where=where)
