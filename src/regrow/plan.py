"""A plan lists the units that a cut keeps; it is stored as plan.json in the student's folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow.config import Config, parse
from regrow.errors import UserError

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint

FILE = "plan.json"
"""The file, next to a model's weights, with the plan of the cut that produced the model."""
FROM_FIRST = "plan-from-first.json"
"""After several rounds: all cuts merged into one plan with the ids of the first parent."""
FILES = (FROM_FIRST, FILE)
"""The plan files that are copied with the weights, the one with the longest history first."""

PER_LAYER = ("mlp", "heads", "kv_heads", "experts")
PER_EXPERT = "expert_mlp"
WHOLE = ("layers", "hidden", "vocab")


class Plan(Config):
    """The ids, in the parent model, of the kept units of each dimension; None keeps all.

    Ids are ascending. mlp, heads, kv_heads and experts have an entry for every kept layer with such
    units, by the layer's id in the parent. expert_mlp has an entry for every kept expert, by layer
    and expert. All kept KV heads keep the same number of query heads.
    """

    format: int = 1
    """Version of the file format."""
    model_type: str
    """Family of the model, as in its config.json."""
    fingerprint: str
    """Fingerprint of the checkpoint that the ids belong to."""
    before: dict[str, int]
    """Number of units per dimension in that checkpoint."""
    after: dict[str, int]
    """Number of units per dimension after the cut."""
    layers: list[int] | None = None
    """Kept layers."""
    hidden: list[int] | None = None
    """Kept channels of the residual stream."""
    mlp: dict[int, list[int]] | None = None
    """Kept MLP channels per kept layer."""
    heads: dict[int, list[int]] | None = None
    """Kept query heads per kept layer."""
    kv_heads: dict[int, list[int]] | None = None
    """Kept key/value heads per kept layer."""
    vocab: list[int] | None = None
    """Kept token ids."""
    experts: dict[int, list[int]] | None = None
    """Kept experts per kept layer that has experts."""
    expert_mlp: dict[int, dict[int, list[int]]] | None = None
    """Kept channels inside each kept expert, per kept layer that has experts."""
    criterion: str | None = None
    """The criterion that chose the units, for information."""
    seed: int | None = None
    """The seed of that choice, for information."""
    parents: tuple[str, ...] = ()
    """Fingerprints of the intermediate models of a composed plan."""
    siblings: tuple[str, ...] = ()
    """Fingerprints of the models the plan was made for, if it was applied to a sibling."""

    def kept_layers(self) -> list[int]:
        """Ids in the parent of the kept layers, ascending."""
        return list(range(self.before["layers"])) if self.layers is None else self.layers

    def kept(
        self, dim: str, layer: int | None = None, expert: int | None = None
    ) -> list[int] | None:
        """Ids in the parent of the kept units of `dim`, in one layer and expert if it has them.

        None means all. Without `heads`, the query heads of all kept KV heads are kept.
        """
        if dim in WHOLE:
            return {"layers": self.layers, "hidden": self.hidden, "vocab": self.vocab}[dim]
        if dim == PER_EXPERT:
            if self.expert_mlp is None or layer not in self.expert_mlp or expert is None:
                return None
            return self.expert_mlp[layer][expert]
        if dim not in PER_LAYER or layer is None:
            return None
        chosen = self._chosen(dim)
        if chosen is not None:
            return chosen.get(layer)
        if dim == "heads" and self.kv_heads is not None and layer in self.kv_heads:
            group = self.group
            return [kv * group + q for kv in self.kv_heads[layer] for q in range(group)]
        return None

    def kept_experts(self, layer: int) -> list[int]:
        """Ids in the parent of the kept experts of parent layer `layer`, ascending."""
        kept = self.kept("experts", layer)
        return list(range(self.before.get("experts", 0))) if kept is None else kept

    def _chosen(self, dim: str) -> dict[int, list[int]] | None:
        return {
            "mlp": self.mlp,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "experts": self.experts,
        }[dim]

    @property
    def group(self) -> int:
        """Query heads per KV head in the parent."""
        return self.before["heads"] // self.before["kv_heads"]

    def check(
        self, sizes: dict[str, int], layers_of: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        """Raise UserError when the plan contradicts itself or a parent of these `sizes`.

        `layers_of` lists the layers that have units of a dimension, if not all layers do.
        """
        if self.format != 1:
            raise UserError(f"plan: format {self.format} is not known; this version reads format 1")
        if self.before != sizes:
            odd = sorted(
                dim for dim in {*sizes, *self.before} if sizes.get(dim) != self.before.get(dim)
            )
            raise UserError(
                f"plan: before.{odd[0]} is {self.before.get(odd[0])}, but the model has "
                f"{sizes.get(odd[0])}: the plan was made for another model"
            )
        if set(self.after) != set(self.before):
            raise UserError(
                f"plan: after must name the dimensions {', '.join(sorted(self.before))}"
            )
        for dim in WHOLE:
            self._check_ids(dim, self.kept(dim), dim)
        for dim in (*PER_LAYER, PER_EXPERT):
            having = (layers_of or {}).get(dim, range(self.before["layers"]))
            self._check_layers(dim, [n for n in self.kept_layers() if n in having])
        for dim in set(self.after) - {*WHOLE, *PER_LAYER, PER_EXPERT}:
            self._check_ids(dim, None, dim)
        for layer in self.kept_layers():
            self._check_groups(layer)

    def _check_layers(self, dim: str, layers: list[int]) -> None:
        chosen = self.expert_mlp if dim == PER_EXPERT else self._chosen(dim)
        if dim not in self.before:
            if chosen is not None:
                raise UserError(f"plan: {dim} is given, but the model has none")
            return
        if chosen is None and dim != "heads":
            self._check_ids(dim, None, dim)
        elif chosen is not None and set(chosen) != set(layers):
            odd = sorted(set(chosen) ^ set(layers))
            raise UserError(
                f"plan: {dim} must list exactly the kept layers that have it; these differ: "
                f"{odd[:8]}"
            )
        for layer in layers:
            if dim == PER_EXPERT:
                self._check_experts(layer)
            else:
                self._check_ids(dim, self.kept(dim, layer), f"{dim}.{layer}")

    def _check_experts(self, layer: int) -> None:
        if self.expert_mlp is None:
            return
        kept, chosen = self.kept_experts(layer), self.expert_mlp[layer]
        if set(chosen) != set(kept):
            odd = sorted(set(chosen) ^ set(kept))
            raise UserError(
                f"plan: expert_mlp.{layer} must list exactly the kept experts; these differ: "
                f"{odd[:8]}"
            )
        for expert, ids in chosen.items():
            self._check_ids(PER_EXPERT, ids, f"{PER_EXPERT}.{layer}.{expert}")

    def _check_ids(self, dim: str, ids: Sequence[int] | None, where: str) -> None:
        before, after = self.before[dim], self.after[dim]
        count = before if ids is None else len(ids)
        if ids is not None and (wrong := [i for i in ids if not 0 <= i < before]):
            raise UserError(f"plan: {where} names {wrong[0]}; allowed are 0 to {before - 1}")
        if ids is not None and any(a >= b for a, b in pairwise(ids)):
            raise UserError(f"plan: {where} must ascend, without an id twice")
        if count != after or count == 0:
            raise UserError(
                f"plan: {where} keeps {count} units, but after.{dim} is {after}; all layers must "
                "have the same width, at least 1"
            )

    def _check_groups(self, layer: int) -> None:
        heads, kv_heads = self.kept("heads", layer), self.kept("kv_heads", layer)
        if heads is None:
            return
        counts = dict.fromkeys(range(self.before["kv_heads"]) if kv_heads is None else kv_heads, 0)
        for head in heads:
            if head // self.group not in counts:
                raise UserError(
                    f"plan: heads.{layer} keeps query head {head}, but its key/value head "
                    f"{head // self.group} is not kept"
                )
            counts[head // self.group] += 1
        if len(set(counts.values())) > 1:
            raise UserError(
                f"plan: heads.{layer} must keep the same number of query heads for each kept "
                f"key/value head; it keeps {counts}"
            )

    def check_fingerprint(self, checkpoint: Checkpoint) -> None:
        """Raise UserError when the plan was made for another checkpoint."""
        if checkpoint.fingerprint != self.fingerprint:
            raise UserError(
                f"plan: it was made for the model {self.fingerprint[:12]}, but {checkpoint.folder} "
                f"is {checkpoint.fingerprint[:12]}: make a plan for this model, or, if that one "
                "is a sibling of it (fine-tuned, say), prune with --allow-sibling"
            )

    def for_sibling(self, checkpoint: Checkpoint) -> Plan:
        """The same plan for another checkpoint; call `check` with the sizes of that checkpoint."""
        if checkpoint.fingerprint == self.fingerprint:
            return self
        siblings = (*self.siblings, self.fingerprint)
        return self.model_copy(update={"fingerprint": checkpoint.fingerprint, "siblings": siblings})

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in a JSON file; raises UserError if it is missing, broken or unknown."""
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"no plan at {path}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid JSON: {error}") from None
        return parse(cls, fields, str(path))

    def write(self, path: Path) -> None:
        """Write JSON with one line per list, and layers in the order of their numbers."""
        fields = self.model_dump(mode="json", exclude_none=True)
        path.write_text(_indented(fields) + "\n")


def stored_plans(folder: Path) -> Iterator[Plan]:
    """Read the plans in a model's folder, the one with the longest history first."""
    for name in FILES:
        if (folder / name).exists():
            yield Plan.read(folder / name)


def copy_plans(source: Path, target: Path) -> None:
    """Copy the plan files of one model's folder to another."""
    for name in FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def compose(earlier: Plan, later: Plan) -> Plan:
    """Merge two consecutive plans into one with the ids of the parent of `earlier`.

    Raises UserError when `later` does not fit the shape of the model after `earlier`.
    """
    if later.before != earlier.after or later.model_type != earlier.model_type:
        raise UserError(
            f"plans do not follow each other: the earlier one leaves {earlier.after}, the later "
            f"one starts from {later.before}"
        )
    old_layers = earlier.kept_layers()
    layers = [(old_layers[new], new) for new in later.kept_layers()]

    def both(dim: str) -> dict[int, list[int]] | None:
        pairs = {old: (earlier.kept(dim, old), later.kept(dim, new)) for old, new in layers}
        merged = {old: _through(*pair) for old, pair in pairs.items()}
        chosen = {old: ids for old, ids in merged.items() if ids is not None}
        # A dimension that was cut only in layers dropped later still counts as cut.
        cut = later.after.get(dim) != earlier.before.get(dim)
        return chosen or ({} if cut else None)

    def channels(old: int, new: int) -> dict[int, list[int]] | None:
        experts = [(earlier.kept_experts(old)[i], i) for i in later.kept_experts(new)]
        merged = {
            e: _through(earlier.kept(PER_EXPERT, old, e), later.kept(PER_EXPERT, new, i))
            for e, i in experts
        }
        return {e: ids for e, ids in merged.items() if ids is not None} or None

    inside = {old: channels(old, new) for old, new in layers}
    return Plan(
        model_type=earlier.model_type,
        fingerprint=earlier.fingerprint,
        before=earlier.before,
        after=later.after,
        layers=_through(earlier.layers, later.layers),
        hidden=_through(earlier.hidden, later.hidden),
        mlp=both("mlp"),
        heads=both("heads"),
        kv_heads=both("kv_heads"),
        vocab=_through(earlier.vocab, later.vocab),
        experts=both("experts"),
        expert_mlp={old: ids for old, ids in inside.items() if ids is not None} or None,
        criterion=later.criterion,
        seed=later.seed,
        parents=(*earlier.parents, later.fingerprint, *later.parents),
        siblings=(*earlier.siblings, *later.siblings),
    )


def _through(earlier: list[int] | None, later: list[int] | None) -> list[int] | None:
    if earlier is None or later is None:
        return later if earlier is None else earlier
    return [earlier[i] for i in later]


def _indented(value: Any, indent: str = "") -> str:
    """JSON with objects spread over lines and each list on one line."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    inner = indent + "  "
    keys = sorted(value, key=int) if all(key.isdigit() for key in value) else list(value)
    lines = [f"{inner}{json.dumps(key)}: {_indented(value[key], inner)}" for key in keys]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
