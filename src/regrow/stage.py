"""What a stage is: one object that the command line, a recipe, its dry run and the API read.

A stage is a folder below `regrow/stages/`. Its `__init__.py` defines one subclass of `Stage` and
its only instance, `STAGE`. A new stage is such a folder and nothing else (docs/add-a-stage.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from regrow import plugins
from regrow.config import Config, Options, parse
from regrow.data.config import DataConfig, Split
from regrow.errors import UserError, unknown
from regrow.runtime import distributed

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint
    from regrow.families import Family

T = TypeVar("T")
STAGES = "regrow.stages"
"""The folder of the stages, for `plugins`."""
BEFORE_PRUNE = "model before the last prune"
"""A note in `left`: a distillation may learn from that model."""
BEFORE_FIRST_PRUNE = "model before the first prune"
"""A note in `left`: distillations and evaluations may take that model as the teacher."""
IN_ORDER = (
    "advise",
    "prepare",
    "initialize",
    *(
        "profile",
        "learn_masks",
        "rotate",
        "compare",
        "prune",
        "reconstruct",
        "generate",
        "cache",
        "distill",
    ),
    "prefer",
    *("sparsify", "quantize", "evaluate", "export", "report"),
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
    """The model to learn from or to compare with; None stands for the recipe's model."""
    location: str = ""
    """Its position in the recipe, for error messages: stages.1.prune."""

    @property
    def stage(self) -> Stage:
        """The stage's entry."""
        return find(self.name)


@dataclass
class RecipePlan:
    """What is known at one stage of a recipe before anything has run.

    `Stage.check` and `Stage.dry_run` read it. `Stage.leave` notes in it the result of its stage,
    for the stages that follow.
    """

    model: str
    """The recipe's model: the teacher, where a stage names no other."""
    checkpoint: Checkpoint
    data: DataConfig
    options: Options
    steps: list[Step]
    parameters: int = 0
    """Parameters of the current model; the target where the number is not known yet."""
    config_now: dict[str, Any] | None = None
    """Config of the current model; None after a prune whose sizes are searched for."""
    configs: list[dict[str, Any] | None] = field(default_factory=list)
    """Config of the current model after each stage so far, as in `config_now`."""
    profiled: bool = False
    """Whether there is a profile of the current model."""
    quantized: str = ""
    """Location of the stage whose quantized weights are final; empty if there is none."""
    fewer_tokens: bool = False
    """Whether the vocabulary was cut."""
    caches: dict[str, str] = field(default_factory=dict)
    """Format of the last cache, by teacher."""
    answers: set[str] = field(default_factory=set)
    """Teachers that have answered prompts; an empty name stands for the current model."""
    calibration_sequences: int = 0
    """Sequences of calibration text that the first profile reads."""
    calibration_to_choose: int = 0
    """Further sequences of calibration text that the choice of a shape reads."""
    left: dict[str, Any] = field(default_factory=dict)
    """Other notes that stages leave for later stages, by a name of their choice."""

    @property
    def family(self) -> Family:
        """The family of the recipe's model."""
        from regrow import families

        return families.of(self.checkpoint)

    def note_profile(self, criteria: Sequence[str], samples: int, gram_tokens: int | None) -> None:
        """Record that the current model has a profile of so many sequences."""
        self.profiled = True
        self.left |= {"criteria": criteria, "samples": samples, "gram_tokens": gram_tokens}
        self.calibration_sequences = self.calibration_sequences or samples


@dataclass
class RecipeRun:
    """A recipe while it runs: its inputs, and the results of its stages so far."""

    model: str
    """The recipe's model: the teacher, where a stage names no other."""
    data: DataConfig
    steps: list[Step]
    out: Path
    options: Options
    current: str | Path = ""
    """The current model, on which the next stage works."""
    plain: str | Path = ""
    """The current model before it was quantized: export reads this one."""
    profile: Path | None = None
    """The last profile of the current model."""
    caches: dict[str, Path] = field(default_factory=dict)
    """The last cache, by teacher."""
    answers: dict[str, Path] = field(default_factory=dict)
    """The last answers, by teacher."""
    own_answers: Path | None = None
    """The last answers of the current model."""
    models: dict[str, str | Path] = field(default_factory=dict)
    """All models so far, by label: an evaluation measures them."""
    reported: bool = False
    """Whether a report was written."""
    left: dict[str, Any] = field(default_factory=dict)
    """Other notes that stages leave for later stages, by a name of their choice."""

    def __post_init__(self) -> None:
        from regrow.checkpoint import load

        self.current = self.plain = self.model
        # Its folder: transformers measures the teacher, also where the model is a GGUF file.
        self.models = {"teacher": load(self.model).folder}

    def folder(self, name: str) -> Path:
        """The output folder of a stage."""
        return self.out / "stages" / name

    def add(self, label: str, folder: Path) -> None:
        """Make `folder` the current model; evaluations show it under `label`."""
        count = sum(known.split(" ")[0] == label for known in self.models)
        self.models[f"{label} {count + 1}" if count else label] = folder
        self.current = self.plain = folder
        self.own_answers = None


class Stage:
    """One stage of the path from a large model to a small one.

    The docstring of a subclass says what the stage takes from a recipe and what it leaves to the
    stages that follow. Slow imports stand inside the methods, so that the command line starts
    quickly.
    """

    config: ClassVar[type[Config]]
    """Its config: the fields in a recipe, and the flags of its command."""
    recipe_fields: ClassVar[type[Config] | None] = None
    """Fields that only a recipe has, if any."""
    in_recipes: ClassVar[bool] = True
    """Whether recipes can use it; otherwise it is a command only."""
    takes_teacher: ClassVar[bool] = False
    """Whether its entry in a recipe may name a `teacher`."""
    changes_weights: ClassVar[bool] = False
    """Whether it writes a new model: a profile and own answers of the model before are outdated."""
    needs_plain_weights: ClassVar[bool] = False
    """Whether it is refused after a `quantize` whose weights are final."""
    ranks: ClassVar[Literal["first", "split"]] = "first"
    """What the processes of a job (torchrun) do: the first one works while the others wait, or
    the work is split among all of them."""
    less_memory: ClassVar[str] = "lower --batch-size"
    """The advice of a run that ran out of memory: what to change."""
    reads: ClassVar[tuple[Split, ...]] = ()
    """Splits of the recipe's text that it reads."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Other stages that it calls; it may import no others."""

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
        """The stage as a Python function, `regrow.NAME`: the one in `stage.py` of its folder."""
        module = import_module(f"{STAGES}.{self.name}.stage")
        own: Callable[..., Any] = getattr(module, self.name)
        return _on_ranks(self, own)

    def on_ranks(self, work: Callable[[], T]) -> T:
        """Do `work()` in the processes of a job, as `ranks` says; every process has the result."""
        with distributed.together():
            return work() if self.ranks == "split" else distributed.on_first(work)

    def command(self, *arguments: Any, **flags: Any) -> None:
        """The stage as a command: the parameters are its flags, the docstring is its help."""
        raise NotImplementedError

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError, before any slow work, when the stage cannot succeed."""

    def accepts_teacher(self, step: Step, plan: RecipePlan, teacher: Checkpoint) -> bool:
        """Whether the teacher's tokenizer may differ from that of the recipe's model."""
        return False

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The lines that `regrow run --dry-run` prints for it."""
        return [f"{self.name}: depends on the models that the stages before it write"]

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Note the result of the stage in `plan`, for the stages that follow."""

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Run the stage on the recipe's current model; write to `run.folder(folder)`."""
        raise NotImplementedError

    def needs_of_cache(self, step: Step) -> dict[str, int]:
        """Least `tokens` and `heldout_sequences` of a cache that this stage would read."""
        return {}

    def inputs(self, step: Step) -> Iterable[str]:
        """Hashes of further inputs, beside the recipe's model, data and teacher."""
        return ()


@cache
def _on_ranks(stage: Stage, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*arguments: Any, **fields: Any) -> Any:
        return stage.on_ranks(partial(function, *arguments, **fields))

    return call


def names() -> list[str]:
    """All stages, in the order in which they are listed."""
    return sorted(
        plugins.names(STAGES),
        key=lambda name: (IN_ORDER.index(name) if name in IN_ORDER else 99, name),
    )


def find(name: str) -> Stage:
    """The stage of that name; raises UserError when there is none."""
    stage = plugins.load(STAGES, name).STAGE
    assert isinstance(stage, Stage)
    return stage


def parse_step(entry: dict[str, Any] | str, number: int) -> Step:
    """Read `name` or `{name: {its fields}}`; raises UserError for what is unknown."""
    entry = {entry: {}} if isinstance(entry, str) else entry
    location = f"stages.{number}"
    if len(entry) != 1:
        raise UserError(
            f"{location}: give one stage per entry, as `- name: {{fields}}` (given: {list(entry)})"
        )
    ((name, fields),) = entry.items()
    known = [each for each in names() if find(each).in_recipes]
    if name not in known:
        raise UserError(f"{location}: {unknown('stage', str(name), known)}")
    stage, location = find(name), f"{location}.{name}"
    if not isinstance(fields or {}, dict):
        raise UserError(f"{location}: give its fields as `key: value` (given: {fields!r})")
    fields = dict(fields or {})
    teacher = fields.pop("teacher", None) if stage.takes_teacher else None
    if teacher is not None and not isinstance(teacher, str):
        raise UserError(f"{location}.teacher: give a model folder or hub id (given: {teacher!r})")
    extra = None
    if stage.recipe_fields is not None:
        own = {key: fields.pop(key) for key in stage.recipe_fields.model_fields if key in fields}
        extra = parse(stage.recipe_fields, own, location)
    config = parse(stage.config, fields, location)
    return Step(name=name, config=config, extra=extra, teacher=teacher, location=location)
