"""The model card: lineage, licences, data, recipe, figures and how to run it, as README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.stages.export.lineage import Lineage, lineage_of, text_licence
from regrow.stages.export.place import CARD

NOT_COMPARED = ("speed", "seconds", "tokens/s")
MADE = ("profile", "prune", "distill", "quantize")
"""Stages that a model is made with."""


def write_card(folder: Path, made: Path) -> None:
    """The card README.md of a published model `folder`, which the stage in `made` wrote."""
    lineage = lineage_of(made)
    family = families.get(Checkpoint(folder, quantized=True).config["model_type"])
    (folder / CARD).write_text(text(lineage.name, lineage, family), encoding="utf-8")


def text(
    name: str,
    lineage: Lineage,
    family: Family,
    exported: dict[str, Any] | None = None,
    file: str | None = None,
) -> str:
    """The card of a model; with `file`, of a GGUF file that `exported` is the manifest of."""
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
    """What the hub reads; a licence only where one is known."""
    fields: dict[str, Any] = {}
    if lineage.licence.id is not None:
        fields["license"] = lineage.licence.id
    if "/" in lineage.parent and not lineage.parent.startswith("package:"):
        fields["base_model"] = lineage.parent
    fields["library_name"] = "gguf" if file else "transformers"
    fields["pipeline_tag"] = "text-generation"
    if lineage.made:
        fields["tags"] = ["regrow", *sorted({made["stage"] for made in _made(lineage).values()})]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _made(lineage: Lineage) -> dict[str, dict[str, Any]]:
    return {name: m for name, m in lineage.stages.items() if m.get("stage") in MADE}


def _lineage(lineage: Lineage, family: Family) -> str:
    lines = ["## Lineage\n", f"- parent: {lineage.parent}", f"- architecture: {family.model_type}"]
    if not lineage.made:
        return "\n".join([*lines[:1], f"- model: {lineage.parent}, not changed", lines[2]]) + "\n"
    for name, made in _made(lineage).items():
        inputs = made.get("inputs") or {}
        of = next((value[:12] for key, value in inputs.items() if "data" not in key), "")
        lines.append(f"- {name}: {made['stage']}" + (f" of `{of}`" if of else ""))
    last = [*lineage.stages.values()][-1:]
    versions = last[0].get("versions", {}) if last else {}
    if versions:
        lines.append("- made with " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines) + "\n"


def _licence(lineage: Lineage) -> str:
    return (
        f"## Licence\n\n- of the parent: {lineage.licence}\n"
        f"- models made from it: {lineage.licence.terms}\n"
        "- this model keeps the parent's licence, and what the text's licences ask for\n"
    )


def _data(lineage: Lineage) -> str:
    """The text that the model was made with, each source with its licence where it is known."""
    if not lineage.sources:
        return "" if not lineage.made else "## Data\n\nNot recorded with this model.\n"
    lines = ["## Data\n"]
    for source in lineage.sources:
        named = str(source["source"])
        public = named.startswith("package:") or not named.startswith(("/", ".", "~"))
        shown = named if public else named.rsplit("/", 1)[-1]
        licence = text_licence(named) or "licence unknown to regrow, look where it comes from"
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
    for made in [*evaluated[-1:], *([exported] if exported else [])]:
        rows += [_row(f) for f in made.get("figures", []) if f.get("unit") not in NOT_COMPARED]
    if not rows:
        return "## Figures\n\nNone were measured.\n"
    head = "| figure | value | unit | n | how |\n|---|---:|---|---:|---|\n"
    told = "".join(f"\n- {line}" for line in (exported or {}).get("fallbacks", []))
    fell = f"\nRows that the type cannot hold:\n{told}\n" if told else ""
    return f"## Figures\n\n{head}" + "\n".join(rows) + f"\n{fell}"


def _row(figure: dict[str, Any]) -> str:
    value = figure["value"]
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
    how = str(figure.get("convention", "")).replace("|", "\\|")
    return (
        f"| {figure['name']} | {shown} | {figure.get('unit', '')} | {figure.get('n', '')} | {how} |"
    )


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
        "The Modelfile lies beside the file.\n"
    )
