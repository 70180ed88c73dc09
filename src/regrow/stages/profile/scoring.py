"""From statistics to scores: what the chosen criteria need, and the scores they give.

The weights of a dimension are read from the checkpoint one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family, TensorRef
from regrow.plan import WHOLE
from regrow.stages.profile.config import ProfileConfig


def observed(dim: str) -> str:
    """The dimension whose activations tell of `dim`: KV heads are seen through their heads."""
    return "heads" if dim == "kv_heads" else dim


@dataclass(frozen=True)
class DimWeights:
    """The tensors of a checkpoint in which `dim` is an axis, in `layer` or, for "all", anywhere.

    For expert_mlp those of one `expert`; for experts also all that is in each of them.
    """

    checkpoint: Checkpoint
    family: Family
    dim: str
    layer: int | str
    expert: int | None = None

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor part with the dimension as an axis: [units, rest]."""
        sizes = self.family.sizes(self.checkpoint.config)
        for template, row in self.family.tensors.items():
            if self.dim == "experts" and "{expert}" in template:
                yield torch.stack([self._read(place).flatten() for place in self._places(template)])
            for axis, dims in enumerate(row.axes):
                parts = families.parts(dims)
                if self.dim not in parts:
                    continue
                lengths = [families.rows(part, sizes) for part in parts]
                for place in self._places(template):
                    pieces = self._read(place).split(lengths, axis)
                    for part, piece in zip(parts, pieces, strict=True):
                        if part == self.dim:
                            yield piece.movedim(axis, 0).reshape(sizes[self.dim], -1)

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension, KV heads through their heads' channels.

        Shape [units, width, out].
        """
        units = self.family.sizes(self.checkpoint.config)[self.dim]
        for template in self.family.readers(observed(self.dim)):
            for place in self._places(template):
                yield self._read(place).T.unflatten(0, (units, -1))

    def _read(self, place: TensorRef) -> Tensor:
        return self.checkpoint.tensor(place.name)

    def _places(self, template: str) -> Iterator[TensorRef]:
        layers = None if self.layer == "all" else [int(self.layer)]
        experts = None if self.expert is None else [self.expert]
        return self.family.places(template, self.checkpoint.config, layers, experts)


IMPORTANCE = "regrow.stages.profile.importance"


def statistics_needed(config: ProfileConfig) -> dict[str, set[str]]:
    """Statistics to gather per observed dimension: the union of what the criteria declare.

    Raises UserError for a criterion that there is not, or that lacks Gram matrices.
    """
    needs: dict[str, set[str]] = {}
    for name in config.criteria:
        module = plugins.load(IMPORTANCE, name)
        dims = dims_of(module, config)
        if not dims:
            raise UserError(
                f"the criterion {name} works on Gram matrices, and none are gathered: set "
                "gram_tokens to 65536 or so, and grams to mlp and heads"
            )
        for dim in dims:
            needs.setdefault(observed(dim), set()).update(module.NEEDS - {"gram"})
    return {dim: names for dim, names in needs.items() if names}


def dims_of(module: ModuleType, config: ProfileConfig) -> set[str]:
    """Dimensions that a criterion scores here: on Gram matrices, those they are gathered for."""
    if "gram" not in module.NEEDS:
        return set(module.DIMS)
    return {dim for dim in module.DIMS if config.gram_tokens and observed(dim) in config.grams}


def score_all(
    config: ProfileConfig,
    statistics: dict[str, Tensor],
    tokens: int,
    checkpoint: Checkpoint,
    family: Family,
    grams: Callable[[str, int], Tensor],
) -> dict[str, Tensor]:
    """Score of every unit, by `criterion/dim/layer`; `grams` reads a Gram matrix of the profile."""
    sizes = family.sizes(checkpoint.config)
    scores: dict[str, Tensor] = {}
    for criterion in config.criteria:
        module = plugins.load(IMPORTANCE, criterion)
        generator = torch.Generator().manual_seed(config.seed)
        for dim in sorted(dims_of(module, config)):
            layers = family.layers_of(dim, checkpoint.config) if dim not in WHOLE else ["all"]
            for layer in layers:
                place = f"{dim}/{layer}"
                stats = {
                    key.split("/")[0]: value
                    for key, value in statistics.items()
                    if key.endswith("/" + place)
                }
                more = {"count": torch.tensor(sizes[dim]), "tokens": torch.tensor(tokens)}
                if "gram" in module.NEEDS:
                    more["gram"] = grams(observed(dim), int(layer))
                weights = DimWeights(checkpoint, family, dim, layer)
                scores[f"{criterion}/{place}"] = _score(module, stats, more, weights, generator)
    return scores


def _score(
    module: ModuleType,
    stats: dict[str, Tensor],
    more: dict[str, Tensor],
    weights: DimWeights,
    generator: torch.Generator,
) -> Tensor:
    """Scores [units]; of expert_mlp [experts, units], one expert after the other."""
    if weights.dim != "expert_mlp":
        found: Tensor = module.score({**stats, **more}, weights, weights.dim, generator)
        return found
    each = []
    for expert in range(weights.family.sizes(weights.checkpoint.config)["experts"]):
        own = {name: value[expert][:, None] for name, value in stats.items()}
        inside = replace(weights, expert=expert)
        each.append(module.score({**own, **more}, inside, weights.dim, generator))
    return torch.stack(each)
