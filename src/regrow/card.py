"""The model card, README.md, of a model folder or a GGUF file.

It states the base model, licences, data, recipe, figures and usage, as far as files document them;
it guesses nothing. Each stage that writes a model writes it into a `ModelDir`, which adds the card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regrow import stage, stage_dir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.licence import Licence, licence_of
from regrow.checkpoint.model_config import read_json
from regrow.config import Config
from regrow.data.config import DataConfig, SourceConfig
from regrow.data.prepared_folder import PreparedFolder
from regrow.stage_dir import StageDir

CARD = "README.md"
RECIPE = "recipe.yaml"
LINEAGE = "lineage"
"""The key of a manifest under which a model folder records where its model is from."""
PACKAGE = "package:"
TEXTS = {
    "/data/enwik8.gz": "GFDL (English Wikipedia of 2006)",
    "/test/botchan.txt": "public domain (a novel of 1906, Project Gutenberg)",
}
"""Licences of texts that the project itself uses, by the end of the source's name."""
TIMES = ("speed", "seconds", "tokens/s", "ms")
"""Units of figures that hold for one machine only; a card leaves them out."""
RELATIVE_TIMES = ("_speedup", "_of_flops")
"""Endings of the names of such figures without a unit."""


@dataclass(frozen=True)
class Lineage:
    """A model's base model, and the texts and stages that produced the model."""

    name: str
    parent: str
    """Public name of the base model."""
    licence: Licence
    teachers: dict[str, Licence] = field(default_factory=dict)
    """Further models that taught it, by their public names."""
    sources: list[str] = field(default_factory=list)
    """Text sources."""
    recipe: list[Any] = field(default_factory=list)
    """The stages with the fields that were given, as in a recipe."""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests by the name of the stage's folder, in order."""
    by_regrow: bool = True
    """Whether regrow produced the model; False for a model from elsewhere."""

    def record(self) -> dict[str, Any]:
        """The part that a manifest keeps, for the cards of models that are made from this one."""
        return {
            "parent": self.parent,
            "licence": vars(self.licence),
            "teachers": {name: vars(each) for name, each in self.teachers.items()},
            "sources": self.sources,
            "recipe": self.recipe,
            "stages": {
                name: {key: manifest[key] for key in ("stage", "inputs") if key in manifest}
                for name, manifest in self.stages.items()
            },
        }


class ModelDir(StageDir):
    """The output folder of a stage that writes a model; the finished folder has a model card.

    `parent` is the model that the stage starts from, None for random weights; `teachers` are the
    models that it learns from. The note on the sparsity of the parent holds for the new model too,
    unless the stage sets another one; None removes it.
    """

    def __init__(
        self,
        out: Path,
        name: str,
        config: Config,
        inputs: dict[str, str],
        parent: Checkpoint | None,
        data: DataConfig | None = None,
        teachers: tuple[Checkpoint, ...] = (),
        resumable: bool = False,
        resume_digest: str | None = None,
    ) -> None:
        super().__init__(out, name, config, inputs, resumable, resume_digest)
        self.parent, self.data, self.teachers = parent, data, teachers

    def _finish(self) -> None:
        if self.parent is not None:
            noted = stage_dir.read(self.parent.folder) or {}
            self.extra.setdefault(stage_dir.SPARSITY, noted.get(stage_dir.SPARSITY))
        self.extra = {key: value for key, value in self.extra.items() if value is not None}
        before = _before(self.parent)
        fields = self.config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        given = _without_paths(fields)
        own = [_text_of(source) for source in self.data.sources] if self.data else []
        names = {parent_name(each.name): each for each in self.teachers}
        further = {
            name: licence_of(each.name, each.folder)
            for name, each in names.items()
            if name != before.parent and stage_dir.read(each.folder) is None
        }
        lineage = Lineage(
            self.out.resolve().name,
            before.parent,
            before.licence,
            {**before.teachers, **further},
            list(dict.fromkeys([*before.sources, *map(public_source, own)])),
            [*before.recipe, {self.name: given} if given else self.name],
            {**before.stages, f"{len(before.stages) + 1:02d}-{self.name}": self.manifest()},
        )
        self.extra[LINEAGE] = lineage.record()
        write(self.partial, lineage)
        super()._finish()


def _before(parent: Checkpoint | None) -> Lineage:
    """The lineage of the model that a stage starts from."""
    if parent is None:
        return Lineage("", "none: random weights", Licence())
    manifest = stage_dir.read(parent.folder)
    if manifest is not None and LINEAGE in manifest:
        return _of_manifest(parent.folder.resolve().name, manifest)
    return lineage_of(parent.folder, parent.name)


def lineage_of(folder: Path, model_name: str | None = None) -> Lineage:
    """The known lineage of the model in `folder`, which the user named `model_name`.

    For a folder in a run, the lineage comes from the run's recipe and stages. For the output of a
    single stage, it comes from that stage's manifest. Any other model is its own base model.
    """
    run = _run_of(folder)
    if run is not None:
        return _of_run(run, folder.resolve())
    manifest = stage_dir.read(folder)
    if manifest is not None and "stage" in manifest:
        return _of_manifest(folder.resolve().name, manifest)
    parent = model_name or str(folder)
    licence = licence_of(parent, folder)
    return Lineage(short_name(parent), parent_name(parent), licence, by_regrow=False)


def _of_run(run: Path, model: Path) -> Lineage:
    fields = yaml.safe_load((run / RECIPE).read_text(encoding="utf-8"))
    parent = str(fields["model"])
    steps = [step for each in fields["stages"] if isinstance(each, dict) for step in each.values()]
    named = [name for step in steps if step for name in _teachers(step) if name != parent]
    teachers = {parent_name(name): _licence(name) for name in named}
    return Lineage(
        run.resolve().name,
        parent_name(parent),
        _licence(parent),
        teachers,
        [public_source(source) for source in _sources(fields.get("data"))],
        _without_paths(fields["stages"]),
        _stages(run, model),
    )


def _teachers(step: dict[str, Any]) -> list[str]:
    """The teachers that the fields of a stage name."""
    return [*filter(None, [step.get("teacher")]), *(step.get("extra_teachers") or {})]


def _of_manifest(name: str, manifest: dict[str, Any]) -> Lineage:
    known = manifest.get(LINEAGE)
    if not isinstance(known, dict):
        return Lineage(name, "not recorded", Licence(), stages={name: manifest})
    stages = dict(known["stages"])
    last = next(reversed(stages), name)
    return Lineage(
        name,
        known["parent"],
        Licence(**known["licence"]),
        {teacher: Licence(**each) for teacher, each in known["teachers"].items()},
        known["sources"],
        known["recipe"],
        {**stages, last: manifest},
    )


def _licence(model: str) -> Licence:
    """The licence of a model that the user named, from its folder."""
    return licence_of(model, load(model).folder)


def _run_of(folder: Path) -> Path | None:
    for above in list(folder.resolve().parents)[:2]:
        if (above / RECIPE).exists() and (above / "stages").is_dir():
            return above
    return None


def _sources(data: Any) -> list[str]:
    sources = data.get("sources", []) if isinstance(data, dict) else data
    sources = sources if isinstance(sources, list) else [sources]
    return [
        source if isinstance(source, str) else str(source["source"]) for source in sources if source
    ]


def _stages(run: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Manifests of the stages that produced `model`, and of evaluations, also of later ones."""
    manifests = {}
    for path in sorted(run.glob("stages/*")):
        manifest = stage_dir.read(path)
        later = model.parent.name == "stages" and path.name > model.name
        if manifest is not None and (not later or manifest.get("stage") == "evaluate"):
            manifests[path.name] = manifest
    return manifests


def short_name(model: str) -> str:
    """A model's name without its path, which is private to the user's machine."""
    if model.startswith(PACKAGE):
        return model.removeprefix(PACKAGE)
    path = Path(model).expanduser()
    if not path.exists():
        return model.rpartition("/")[2]
    return path.stem if path.is_file() else path.resolve().name


def text_licence(source: str) -> str | None:
    """The licence of a text source, or None when the project does not know it."""
    if not source.startswith(PACKAGE):
        return None
    return next((licence for end, licence in TEXTS.items() if source.endswith(end)), None)


def parent_name(model: str) -> str:
    """A parent's public name: a hub id or a package unchanged, for a local path only the name."""
    public = model.startswith(PACKAGE) or not Path(model).expanduser().exists()
    return model if public else short_name(model)


def _text_of(source: SourceConfig) -> str:
    """A source, or for a prepared one the text that it was prepared from."""
    prepared = PreparedFolder.of(source)
    return source.source if prepared is None else prepared.index.source.source


def public_source(source: str) -> str:
    """A source's public name: a hub id or a package unchanged, for a local path only the name."""
    local = source.startswith(("/", ".", "~")) or Path(source).exists()
    return source.rstrip("/").rpartition("/")[2] if local else source


def _without_paths(value: Any) -> Any:
    """The value with the local paths in it cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each) for each in value]
    return public_source(value) if isinstance(value, str) and "/" in value else value


def write_card(folder: Path, stage_folder: Path) -> None:
    """Write the card of the published model in `folder`; `stage_folder` is its last stage."""
    write(folder, lineage_of(stage_folder))


def write(folder: Path, lineage: Lineage) -> None:
    """Write README.md into a model folder, with a rename: a file that is linked stays as it was."""
    partial = folder / f".{CARD}.partial"
    config = read_json(folder / "config.json")
    partial.write_text(text(lineage.name, lineage, config), encoding="utf-8")
    partial.replace(folder / CARD)


def text(
    name: str,
    lineage: Lineage,
    config: dict[str, Any],
    exported: dict[str, Any] | None = None,
    file: str | None = None,
) -> str:
    """The card of a model, or of the GGUF file `file`, whose export has the manifest `exported`.

    `config` is the model's config.json.
    """
    parts = [
        _front(lineage, file),
        f"# {name}\n",
        _lineage(lineage, str(config["model_type"])),
        _licences(lineage),
        _data(lineage),
        _recipe(lineage),
        _figures(lineage, exported),
        _use(name, file) if file else _open(config),
    ]
    return "\n".join(part for part in parts if part)


def _front(lineage: Lineage, file: str | None) -> str:
    """The YAML metadata for the hub; it names a licence only if one is known."""
    fields: dict[str, Any] = lineage.licence.metadata()
    if "/" in lineage.parent and not lineage.parent.startswith(PACKAGE):
        fields["base_model"] = lineage.parent
    on_hub = [each for each in lineage.sources if "/" in each and not each.startswith(PACKAGE)]
    if on_hub:
        fields["datasets"] = [each.partition(":")[0] for each in on_hub]
    fields["library_name"] = "gguf" if file else "transformers"
    fields["pipeline_tag"] = "text-generation"
    if lineage.by_regrow:
        stages = {manifest["stage"] for manifest in _producing_stages(lineage).values()}
        fields["tags"] = ["regrow", *sorted(stages)]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _producing_stages(lineage: Lineage) -> dict[str, dict[str, Any]]:
    return {n: m for n, m in lineage.stages.items() if _changes_weights(str(m.get("stage")))}


def _changes_weights(name: str) -> bool:
    """Whether a stage changes the weights; a stage that is not installed here may have done so."""
    return name not in stage.names() or stage.find(name).changes_weights


def _lineage(lineage: Lineage, model_type: str) -> str:
    lines = ["## Lineage\n", f"- base model: {lineage.parent}", f"- architecture: {model_type}"]
    if not lineage.by_regrow:
        return "\n".join([*lines[:1], f"- model: {lineage.parent}, not changed", lines[2]]) + "\n"
    lines += [f"- taught by: {name}" for name in lineage.teachers]
    for name, manifest in _producing_stages(lineage).items():
        inputs = manifest.get("inputs") or {}
        of = next((value[:12] for key, value in inputs.items() if "data" not in key), "")
        lines.append(f"- {name}: {manifest['stage']}" + (f" of `{of}`" if of else ""))
    last = [*lineage.stages.values()][-1:]
    versions = last[0].get("versions", {}) if last else {}
    if versions:
        lines.append("- made with " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines) + "\n"


def _licences(lineage: Lineage) -> str:
    lines = [
        f"- of the base model: {lineage.licence}",
        f"- models made from it: {lineage.licence.terms}",
    ]
    for name, licence in lineage.teachers.items():
        lines += [f"- of {name}, which taught it: {licence}"]
        lines += [f"- models taught by {name}: read its licence: some forbid to train other models"]
    lines += [
        "- this model keeps the base model's licence; the licences of the texts may add conditions"
    ]
    return "## Licence\n\n" + "\n".join(lines) + "\n"


def _data(lineage: Lineage) -> str:
    """The section on the training text: each source with its licence, if known."""
    if not lineage.sources:
        return "" if not lineage.by_regrow else "## Data\n\nNot recorded with this model.\n"
    unknown = "licence unknown: look it up where the text comes from"
    lines = [f"- {source}: {text_licence(source) or unknown}" for source in lineage.sources]
    return "## Data\n\n" + "\n".join(lines) + "\n"


def _recipe(lineage: Lineage) -> str:
    if not lineage.recipe:
        return ""
    stages = yaml.safe_dump(lineage.recipe, sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\n```yaml\nstages:\n{stages}```\n"


def _figures(lineage: Lineage, exported: dict[str, Any] | None) -> str:
    """The figures of the last evaluation, else of the last stage, and those of the export."""
    evaluated = [m for m in lineage.stages.values() if m.get("stage") == "evaluate"]
    others = [m for m in lineage.stages.values() if "figures" in m]
    parts = _compared(_lasting(evaluated[-1])) if evaluated else []
    flat = [] if evaluated else others[-1:]
    rows = [_row(f) for m in [*flat, *([exported] if exported else [])] for f in _lasting(m)]
    if rows:
        parts += ["| figure | value | unit | n | how |\n|---|---:|---|---:|---|", *rows]
    if not parts:
        return "## Figures\n\nNone were measured.\n"
    fallbacks = "".join(f"\n- {line}" for line in (exported or {}).get("fallbacks", []))
    fallback_note = f"\nTensors in another type:\n{fallbacks}\n" if fallbacks else ""
    return "## Figures\n\n" + "\n".join(parts) + f"\n{fallback_note}"


def _lasting(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that do not depend on the machine."""
    return [
        figure
        for figure in manifest.get("figures", [])
        if figure.get("unit") not in TIMES and not str(figure["name"]).endswith(RELATIVE_TIMES)
    ]


def _compared(figures: list[dict[str, Any]]) -> list[str]:
    """A table of an evaluation: the first and the last of its models side by side, and the methods.

    The names of its figures are MODEL/FIGURE.
    """
    values: dict[str, dict[str, dict[str, Any]]] = {}
    labels = list(dict.fromkeys(str(figure["name"]).partition("/")[0] for figure in figures))
    shown = list(dict.fromkeys([*labels[:1], *labels[-1:]]))
    for figure in figures:
        label, _, name = str(figure["name"]).partition("/")
        if label in shown:
            values.setdefault(name, {})[label] = figure
    lines = [
        f"| figure | {' | '.join(shown)} | unit | n |",
        "|---|" + "---:|" * len(shown) + "---|---:|",
    ]
    methods = []
    for name, by_label in values.items():
        last = [*by_label.values()][-1]
        cells = [_number(by_label[label]["value"]) if label in by_label else "–" for label in shown]
        cells = [name, *cells, last.get("unit", ""), str(last.get("n", ""))]
        lines.append(f"| {' | '.join(cells)} |")
        if last.get("convention"):
            methods.append(f"- {name}: {last['convention']}")
    return [*lines, "\nHow they were measured:\n", *methods, ""] if values else []


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _row(figure: dict[str, Any]) -> str:
    convention = str(figure.get("convention", "")).replace("|", "\\|")
    cells = (
        figure["name"],
        _number(figure["value"]),
        figure.get("unit", ""),
        figure.get("n", ""),
        convention,
    )
    return f"| {' | '.join(map(str, cells))} |"


PYTHON = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def _open(config: dict[str, Any]) -> str:
    """How to use a folder, and which programs open it; PATH stands for the folder or its hub id."""
    kind = (config.get("quantization_config") or {}).get("format")
    if kind == "sparse-bitmask":
        return (
            "## Use\n\nregrow opens this folder as any model. compressed-tensors up to 0.14 opens "
            "it; transformers 5 and vLLM from 0.19.1 on do not: give them the dense folder.\n"
        )
    if kind is not None:
        return (
            f"## Use\n\n    pip install transformers compressed-tensors\n\n{PYTHON}\n"
            "    vllm serve PATH\n\nThe weights are stored in the compressed-tensors format "
            f"({kind}), which transformers and vLLM open.\n"
        )
    return (
        f"## Use\n\n{PYTHON}\n"
        "    vllm serve PATH\n    regrow export PATH --out FILE.gguf    # llama.cpp, Ollama\n"
    )


def _use(name: str, file: str) -> str:
    """How to use a GGUF file."""
    ollama = name.lower().replace(" ", "-")
    return (
        "## Use\n\n"
        f"    llama-cli -m {file}\n"
        f"    llama-server -m {file}\n"
        f"    ollama create {ollama} -f Modelfile && ollama run {ollama}\n\n"
        "The Modelfile is in the same folder.\n"
    )
