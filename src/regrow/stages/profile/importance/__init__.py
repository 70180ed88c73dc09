"""Importance criteria, one file each, named by the file, and functions that compute scores.

`DIMS` lists the dimensions that a criterion can score. `NEEDS` lists the statistics that it reads,
out of `STATISTICS`; the profile collects the union. `score(stats, weights, dim, generator)` returns
one number per unit [n], where higher means keep. If the choice depends on the number of dropped
units, it returns a matrix [n, n], whose row k − 1 has the scores for k dropped units. `stats[name]`
is [units, width], `stats["count"]` is the number of units, and `stats["tokens"]` the number of
calibration tokens. `generator` is seeded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

from regrow import families, plugins
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family, TensorRef
from regrow.plan import WHOLE

if TYPE_CHECKING:
    from regrow.stages.profile import ProfileConfig

Stats: TypeAlias = dict[str, Tensor]

GRAMS = frozenset({"mlp", "heads", "kv_heads"})
"""Dimensions for whose readers Gram matrices can be computed."""
READ = GRAMS | {"expert_mlp"}
"""Dimensions that are read by one projection, whose input is observed for each channel. Channels of
an expert are scored inside it, multiplied by the router's weight for the token."""
WIDTHS = READ | {"hidden"}

GRADIENTS = frozenset({"gradient_square_sum", "taylor_abs_sum", "taylor_square_sum"})
"""Statistics that need a backward pass of the next-token loss."""
REMOVALS = {"kl_removal": "forward_kl", "cross_entropy_removal": "cross_entropy"}
"""Statistics for which layers are removed one by one, and the loss that is measured for each."""
PAIRS = frozenset({"angular_distance"})
"""Statistics of pairs of layers, which need the outputs of all layers for a batch at once."""
_SUMS = frozenset({"sum", "square_sum", "mean_abs_square_sum"})
STATISTICS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("mlp", "heads"), _SUMS | GRADIENTS | {"gram"}),
    **dict.fromkeys(("hidden", "expert_mlp"), _SUMS | GRADIENTS),
    "layers": GRADIENTS | PAIRS | REMOVALS.keys() | {"input_output_distance"},
    "experts": GRADIENTS - {"gradient_square_sum"}
    | {"routed_tokens", "routed_norm_sum", "square_sum"},
    "vocab": frozenset({"token_count"}),
}
"""The statistics that can be collected, by observed dimension; `gram` needs Gram matrices."""


class Weights(Protocol):
    """The weights of one dimension in one layer, read from the checkpoint one at a time."""

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor with the dimension as an axis, readers and writers: [units, rest]."""
        ...

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension: [units, width, out]."""
        ...


def observed(dim: str) -> str:
    """The dimension whose activations are observed for `dim`; for KV heads, their query heads."""
    return "heads" if dim == "kv_heads" else dim


def reads_grams(config: ProfileConfig) -> bool:
    """Whether a criterion reads Gram matrices; raises UserError for an unknown criterion."""
    return any("gram" in plugins.load(__name__, name).NEEDS for name in config.criteria)


def statistics_needed(config: ProfileConfig) -> dict[str, set[str]]:
    """Statistics to collect for each observed dimension: the union of the criteria's `NEEDS`.

    Raises UserError for an unknown criterion, for a criterion with unknown statistics, and for one
    that reads Gram matrices when `config` computes none.
    """
    needs: dict[str, set[str]] = {}
    for name in config.criteria:
        module = plugins.load(__name__, name)
        _check_known(name, module)
        dims = dims_of(module, config)
        if not dims:
            raise UserError(
                f"the criterion {name} works on Gram matrices, and none are gathered: set "
                "gram_tokens to 65536 or so, and grams to mlp and heads"
            )
        for dim in dims:
            needs.setdefault(observed(dim), set()).update(module.NEEDS - {"gram"})
    return {dim: names for dim, names in needs.items() if names}


def _check_known(name: str, module: ModuleType) -> None:
    """Refuse a statistic that is never collected, before the long pass over the text."""
    for dim in sorted(module.DIMS):
        known = STATISTICS.get(observed(dim))
        if known is None:
            dims = ", ".join([*STATISTICS, "kv_heads"])
            raise UserError(f"criterion {name}: no dimension {dim!r}; there are: {dims}")
        if unknown := sorted(module.NEEDS - known):
            raise UserError(
                f"criterion {name}: no statistic {unknown[0]!r} of {dim} is gathered; there are: "
                f"{', '.join(sorted(known))}; a new one belongs in stages/profile/collect.py"
            )


def dims_of(module: ModuleType, config: ProfileConfig) -> set[str]:
    """Dimensions that a criterion scores; with Gram matrices, only those with matrices."""
    if "gram" not in module.NEEDS:
        return set(module.DIMS)
    gathered = config.grams if config.resolved().gram_tokens else ()
    return {dim for dim in module.DIMS if observed(dim) in gathered}


@dataclass(frozen=True)
class DimWeights:
    """The tensors of a checkpoint with `dim` as an axis, in `layer` or, for "all", in all layers.

    For expert_mlp these are the tensors of one `expert`. For experts they also include all tensors
    inside each expert.
    """

    checkpoint: Checkpoint
    family: Family
    dim: str
    layer: int | str
    expert: int | None = None

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor, or part of a fused tensor, with the dimension as an axis: [units, rest]."""
        sizes = self.family.sizes(self.checkpoint.config)
        for template, row in self.family.tensors.items():
            if self.dim == "experts" and "{expert}" in template:
                yield torch.stack([self._read(place).flatten() for place in self._places(template)])
            for axis, dims in enumerate(row.axes):
                parts = families.parts(dims)
                if self.dim not in parts:
                    continue
                lengths = [families.rows(part, sizes, row.unit) for part in parts]
                of_all = row.axes[0] == "experts" and len(row.axes) == 3
                inside = axis - (of_all and self.expert is not None)
                for place in self._places(template):
                    pieces = self._read(place).split(lengths, inside)
                    for part, piece in zip(parts, pieces, strict=True):
                        if part == self.dim:
                            yield piece.movedim(inside, 0).reshape(sizes[self.dim], -1)

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension; for KV heads, their query heads' channels.

        Shape [units, width, out].
        """
        units = self.family.sizes(self.checkpoint.config)[self.dim]
        stacked = ("experts", "hidden", self.dim)  # the down projections of all experts
        readers = self.family.readers(observed(self.dim))
        readers += [name for name, row in self.family.tensors.items() if row.axes == stacked]
        for template in readers:
            for place in self._places(template):
                yield self._read(place).T.unflatten(0, (units, -1))

    def _read(self, place: TensorRef) -> Tensor:
        """The tensor, or the part of `expert` of a tensor that all experts of a layer share."""
        tensor = self.checkpoint.tensor(place.name)
        stacked = self.family.tensors[place.template].axes[0] == "experts" and tensor.dim() == 3
        return tensor[self.expert] if stacked and self.expert is not None else tensor

    def _places(self, template: str) -> Iterator[TensorRef]:
        layers = None if self.layer == "all" else [int(self.layer)]
        experts = None if self.expert is None else [self.expert]
        return self.family.places(template, self.checkpoint.config, layers, experts)


def score_all(
    config: ProfileConfig,
    statistics: dict[str, Tensor],
    tokens: int,
    checkpoint: Checkpoint,
    family: Family,
    grams: Callable[[str, int], Tensor],
) -> dict[str, Tensor]:
    """Scores of all units, by `criterion/dim/layer`; `grams` reads a Gram matrix of the profile."""
    sizes = family.sizes(checkpoint.config)
    scores: dict[str, Tensor] = {}
    for criterion in config.criteria:
        module = plugins.load(__name__, criterion)
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
    """Scores [units]; for expert_mlp [experts, units], computed one expert at a time."""
    if weights.dim != "expert_mlp":
        scores: Tensor = module.score({**stats, **more}, weights, weights.dim, generator)
        return scores
    each = []
    for expert in range(weights.family.sizes(weights.checkpoint.config)["experts"]):
        own = {name: value[expert][:, None] for name, value in stats.items()}
        weights_of_one = replace(weights, expert=expert)
        each.append(module.score({**own, **more}, weights_of_one, weights.dim, generator))
    return torch.stack(each)
