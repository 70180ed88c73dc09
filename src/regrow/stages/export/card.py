"""Writes the model card, README.md: lineage, licences, data, recipe, figures and usage.

The card states lineage and licences only as far as files document them; it guesses nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from regrow import families, stage_dir
from regrow.checkpoint import Checkpoint
from regrow.checkpoint.licence import Licence, licence_of
from regrow.families import Family

CARD = "README.md"
RECIPE = "recipe.yaml"
PACKAGE = "package:"
TEXTS = {"/data/enwik8.gz": "GFDL (English Wikipedia of 2006)"}
"""Licences of texts that the project itself uses, by the end of the source's name."""


@dataclass(frozen=True)
class Lineage:
    """A model's parent, and the texts and stages that produced the model."""

    name: str
    parent: str
    licence: Licence
    sources: list[dict[str, Any]] = field(default_factory=list)
    """Text sources of the recipe."""
    recipe: str = ""
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Manifests by the name of the stage's folder, in order."""
    by_regrow: bool = True
    """Whether regrow produced the model; False for a model from elsewhere."""


def lineage_of(folder: Path, model_name: str | None = None) -> Lineage:
    """The known lineage of the model in `folder`, which the user named `model_name`.

    For a folder in a run, the lineage comes from the run's recipe and stages. For the output of a
    single stage, it comes from that stage's manifest. Any other model is its own parent.
    """
    run = _run_of(folder)
    if run is not None:
        recipe = (run / RECIPE).read_text()
        fields = yaml.safe_load(recipe)
        parent, sources = str(fields["model"]), _sources(fields.get("data"))
        name = run.resolve().name
        stages = _stages(run, folder.resolve())
        return Lineage(name, parent_name(parent), licence_of(parent), sources, recipe, stages)
    manifest = stage_dir.read(folder)
    if manifest is not None and "stage" in manifest:
        name = folder.resolve().name
        return Lineage(name, "not recorded", Licence(), stages={name: manifest})
    parent = model_name or str(folder)
    return Lineage(
        short_name(parent), parent_name(parent), licence_of(parent, folder), by_regrow=False
    )


def _run_of(folder: Path) -> Path | None:
    for above in list(folder.resolve().parents)[:2]:
        if (above / RECIPE).exists() and (above / "stages").is_dir():
            return above
    return None


def _sources(data: Any) -> list[dict[str, Any]]:
    sources = data.get("sources", []) if isinstance(data, dict) else data
    sources = sources if isinstance(sources, list) else [sources]
    return [
        {"source": source} if isinstance(source, str) else source for source in sources if source
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


NOT_COMPARED = ("speed", "seconds", "tokens/s")
MADE = ("profile", "prune", "distill", "quantize")
"""Stages that take part in producing a model."""


def write_card(folder: Path, stage_folder: Path) -> None:
    """Write README.md for the published model in `folder`; `stage_folder` is its last stage."""
    lineage = lineage_of(stage_folder)
    family = families.of_config(Checkpoint(folder, quantized=True).config)
    (folder / CARD).write_text(text(lineage.name, lineage, family), encoding="utf-8")


def text(
    name: str,
    lineage: Lineage,
    family: Family,
    exported: dict[str, Any] | None = None,
    file: str | None = None,
) -> str:
    """The card of a model, or of the GGUF file `file`, whose export has the manifest `exported`."""
    parts = [
        _front(lineage, file),
        f"# {name}\n",
        _lineage(lineage, family),
        _licence(lineage),
        _data(lineage),
        _recipe(lineage),
        _figures(lineage, exported),
        _run(name, file),
    ]
    return "\n".join(part for part in parts if part)


def _front(lineage: Lineage, file: str | None) -> str:
    """The YAML metadata for the hub; it names a licence only if one is known."""
    fields: dict[str, Any] = {}
    if lineage.licence.id is not None:
        fields["license"] = lineage.licence.id
    if "/" in lineage.parent and not lineage.parent.startswith("package:"):
        fields["base_model"] = lineage.parent
    fields["library_name"] = "gguf" if file else "transformers"
    fields["pipeline_tag"] = "text-generation"
    if lineage.by_regrow:
        stages = {manifest["stage"] for manifest in _producing_stages(lineage).values()}
        fields["tags"] = ["regrow", *sorted(stages)]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _producing_stages(lineage: Lineage) -> dict[str, dict[str, Any]]:
    return {name: m for name, m in lineage.stages.items() if m.get("stage") in MADE}


def _lineage(lineage: Lineage, family: Family) -> str:
    lines = ["## Lineage\n", f"- parent: {lineage.parent}", f"- architecture: {family.model_type}"]
    if not lineage.by_regrow:
        return "\n".join([*lines[:1], f"- model: {lineage.parent}, not changed", lines[2]]) + "\n"
    for name, manifest in _producing_stages(lineage).items():
        inputs = manifest.get("inputs") or {}
        of = next((value[:12] for key, value in inputs.items() if "data" not in key), "")
        lines.append(f"- {name}: {manifest['stage']}" + (f" of `{of}`" if of else ""))
    last = [*lineage.stages.values()][-1:]
    versions = last[0].get("versions", {}) if last else {}
    if versions:
        lines.append("- made with " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines) + "\n"


def _licence(lineage: Lineage) -> str:
    return (
        f"## Licence\n\n- of the parent: {lineage.licence}\n"
        f"- models made from it: {lineage.licence.terms}\n"
        "- this model keeps the parent's licence; the licences of the texts may add conditions\n"
    )


def _data(lineage: Lineage) -> str:
    """The section on the training text: each source with its licence, if known."""
    if not lineage.sources:
        return "" if not lineage.by_regrow else "## Data\n\nNot recorded with this model.\n"
    lines = ["## Data\n"]
    for source in lineage.sources:
        name = str(source["source"])
        public = name.startswith("package:") or not name.startswith(("/", ".", "~"))
        shown = name if public else name.rsplit("/", 1)[-1]
        licence = text_licence(name) or "licence unknown: look it up where the text comes from"
        lines.append(f"- {shown}: {licence}")
    return "\n".join(lines) + "\n"


def _recipe(lineage: Lineage) -> str:
    if not lineage.recipe:
        return ""
    fields = yaml.safe_load(lineage.recipe)
    stages = yaml.safe_dump(fields["stages"], sort_keys=False, allow_unicode=True)
    return f"## Recipe\n\n```yaml\nstages:\n{stages}```\n"


def _figures(lineage: Lineage, exported: dict[str, Any] | None) -> str:
    rows: list[str] = []
    evaluated = [m for m in lineage.stages.values() if m.get("stage") == "evaluate"]
    for manifest in [*evaluated[-1:], *([exported] if exported else [])]:
        rows += [_row(f) for f in manifest.get("figures", []) if f.get("unit") not in NOT_COMPARED]
    if not rows:
        return "## Figures\n\nNone were measured.\n"
    head = "| figure | value | unit | n | how |\n|---|---:|---|---:|---|\n"
    fallbacks = "".join(f"\n- {line}" for line in (exported or {}).get("fallbacks", []))
    fallback_note = f"\nTensors in another type:\n{fallbacks}\n" if fallbacks else ""
    return f"## Figures\n\n{head}" + "\n".join(rows) + f"\n{fallback_note}"


def _row(figure: dict[str, Any]) -> str:
    value = figure["value"]
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    convention = str(figure.get("convention", "")).replace("|", "\\|")
    cells = (figure["name"], shown, figure.get("unit", ""), figure.get("n", ""), convention)
    return f"| {' | '.join(map(str, cells))} |"


def _run(name: str, file: str | None) -> str:
    if file is None:
        return (
            "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
            'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```\n\n'
            "    vllm serve PATH\n    regrow export PATH --out FILE.gguf    # llama.cpp, Ollama\n"
        )
    ollama = name.lower().replace(" ", "-")
    return (
        "## Use\n\n"
        f"    llama-cli -m {file}\n"
        f"    llama-server -m {file}\n"
        f"    ollama create {ollama} -f Modelfile && ollama run {ollama}\n\n"
        "The Modelfile is in the same folder.\n"
    )
