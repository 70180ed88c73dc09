"""`regrow inspect`: a model's family, its axes with legal widths, and sizes at a few targets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from rich.console import Console
from rich.table import Table

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.errors import UserError
from regrow.families import Family
from regrow.search.shapes import candidates

TARGETS = (0.9, 0.8, 0.7, 0.5)
MULTIPLE = 32
FLAGS = {
    "layers": "--num-layers",
    "hidden": "--hidden-size",
    "mlp": "--intermediate-size",
    "heads": "--num-attention-heads",
    "kv_heads": "--num-key-value-heads",
    "experts": "--num-experts",
    "expert_mlp": "--moe-intermediate-size",
}


ODD = {
    "cache": "Its logits with a cache of keys and values differ from those without: {}.",
    "documents": "Documents that are packed into one sequence see each other in this model, so "
    "regrow gives each sequence one document: {}.",
}
"""What a derived model does that others do not; see `Derived.odd`."""


def describe_model(source: str) -> None:
    """Print family, axes with legal widths, and candidate sizes at a few targets.

    Raises UserError for a model that cannot be opened or whose family is unknown.
    """
    checkpoint = load(source)
    family = families.of(checkpoint)
    console = Console()
    size = sum(map(checkpoint.bytes, checkpoint.names()))
    parameters = family.count(checkpoint.config)
    active = family.active(checkpoint.config)
    per_token = f", {active:,} of them for each token" if active < parameters else ""
    count = f"{parameters:,} parameters{per_token}"
    tied = "tied" if family.value(checkpoint.config, "tie_word_embeddings") else "untied"
    console.print(
        f"{source}: family [b]{family.model_type}[/b], {count} ({tied} "
        f"embeddings counted {'once' if tied == 'tied' else 'both'}), {size / 1e6:,.1f} MB in "
        f"{checkpoint.main_dtype}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_axes(checkpoint, family))
    for line in _derived(checkpoint, family):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(_targets(checkpoint, family, parameters))


def _axes(checkpoint: Checkpoint, family: Family) -> Table:
    sizes = family.sizes(checkpoint.config)
    table = Table("axis", "now", "legal widths", "flag", title="Axes")
    for dim, flag in FLAGS.items():
        if dim in family.refused:
            continue
        if dim != "layers" and not family.layers_of(dim, checkpoint.config):
            continue
        table.add_row(dim, str(sizes[dim]), _legal(checkpoint, family, dim), flag)
    if "vocab" not in family.refused:
        legal = f"multiples of {MULTIPLE}, special tokens and the base alphabet at least"
        table.add_row("vocab", str(sizes["vocab"]), legal, "--vocab-size")
    return table


def _derived(checkpoint: Checkpoint, family: Family) -> Iterator[str]:
    """Lines about a derived table: what was proven of it, and what not, with the reasons."""
    if not family.derived:
        return
    derived = families.derived(checkpoint.config)
    proven = ", ".join(dim for dim in (*FLAGS, "vocab") if dim in derived.proven) or "nothing"
    yield (
        "The table was derived from the model's class in transformers. Proven by cuts of a tiny "
        f"random copy of this config: {proven}."
    )
    for dim, reason in family.refused.items():
        if dim == "repair":
            yield f"There is no repair after a cut: {reason}."
        elif dim in family.config_keys:
            yield f"{dim} cannot be cut: {reason}."
    for odd, reason in derived.odd.items():
        yield ODD[odd].format(reason)


def _legal(checkpoint: Checkpoint, family: Family, dim: str) -> str:
    """Legal widths of an axis if only this axis is pruned, as a range or a list."""
    full = family.sizes(checkpoint.config)
    legal = []
    for width in range(1, full[dim] + 1):
        sizes = {dim: width}
        if dim == "kv_heads":
            sizes["heads"] = full["heads"] // full["kv_heads"] * width
        multiple_of = MULTIPLE if dim in ("mlp", "expert_mlp", "hidden") else 1
        if not families.can_have(family, checkpoint.config, sizes, multiple_of):
            continue
        legal.append(width)
    steps = {b - a for a, b in pairwise(legal)}
    if len(legal) > 6 and len(steps) == 1:
        return f"{legal[0]} to {legal[-1]} in steps of {steps.pop()}"
    if len(legal) > 12:
        return f"{legal[0]}, {legal[1]}, …, {legal[-2]}, {legal[-1]}"
    return ", ".join(map(str, legal))


def _targets(checkpoint: Checkpoint, family: Family, parameters: int) -> Table:
    table = Table("keep", "shape", "parameters", "sizes", title="Sizes at a few targets")
    for keep in TARGETS:
        try:
            shapes = candidates(family, checkpoint.config, keep, MULTIPLE)
        except UserError as error:
            table.add_row(f"{keep:.0%}", "none", "", str(error))
            continue
        for shape in shapes:
            sizes = ", ".join(f"{dim} {size}" for dim, size in shape.sizes.items())
            share = shape.parameters / parameters
            table.add_row(f"{keep:.0%}", shape.name, f"{shape.parameters:,} ({share:.1%})", sizes)
        table.add_section()
    return table
