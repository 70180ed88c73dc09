"""Importance criteria, one file each, named by the file; and how the profile scores by them.

`DIMS` are the dimensions a criterion can score, `NEEDS` the statistics it reads, of `STATISTICS`
(the profile gathers the union). `score(stats, weights, dim, generator)` gives one number per unit
[n], higher = keep; or, where the choice depends on how many units are dropped, a row for each
number [n, n], row k − 1 for k dropped units. `stats[name]` is [units, width], `stats["count"]` the
number of units, `stats["tokens"]` that of calibration tokens; `generator` is seeded.
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
"""Dimensions whose readers can have Gram matrices."""
READ = GRAMS | {"expert_mlp"}
"""Dimensions that one projection reads, whose input is observed channel by channel. Channels of an
expert are scored inside it, each times the router's weight for the token."""
WIDTHS = READ | {"hidden"}

GRADIENTS = frozenset({"gradient_square_sum", "taylor_abs_sum", "taylor_square_sum"})
"""Statistics that take a backward pass of the next-token loss."""
REMOVALS = {"kl_removal": "forward_kl", "cross_entropy_removal": "cross_entropy"}
"""Statistics for which layers are removed in turn, and the loss that is then measured."""
PAIRS = frozenset({"angular_distance"})
"""Statistics of pairs of layers, which take every layer's output of a batch at once."""
_SUMS = frozenset({"sum", "square_sum", "mean_abs_square_sum"})
STATISTICS: dict[str, frozenset[str]] = {
    **dict.fromkeys(("mlp", "heads"), _SUMS | GRADIENTS | {"gram"}),
    **dict.fromkeys(("hidden", "expert_mlp"), _SUMS | GRADIENTS),
    "layers": GRADIENTS | PAIRS | REMOVALS.keys() | {"input_output_distance"},
    "experts": GRADIENTS - {"gradient_square_sum"}
    | {"routed_tokens", "routed_norm_sum", "square_sum"},
    "vocab": frozenset({"token_count"}),
}
"""The statistics that can be gathered, by observed dimension; `gram` takes Gram matrices."""


class Weights(Protocol):
    """The weights of one dimension in one layer, read from the checkpoint one at a time."""

    def carrying(self) -> Iterator[Tensor]:
        """Every tensor that carries the dimension, readers and writers alike: [units, rest]."""
        ...

    def reading(self) -> Iterator[Tensor]:
        """Every projection that reads the dimension: [units, width, out]."""
        ...


def observed(dim: str) -> str:
    """The dimension whose activations are observed for `dim`: for KV heads their query heads."""
    return "heads" if dim == "kv_heads" else dim


def reads_grams(config: ProfileConfig) -> bool:
    """Whether a criterion reads Gram matrices; raises UserError for an unknown criterion."""
    return any("gram" in plugins.load(__name__, name).NEEDS for name in config.criteria)


def statistics_needed(config: ProfileConfig) -> dict[str, set[str]]:
    """Statistics to gather per observed dimension: the union of the criteria's `NEEDS`.

    Raises UserError for an unknown criterion, one whose statistics are not known here, and one
    that reads Gram matrices where `config` gathers none.
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
    """Refuse what only the end of a long pass would show: a statistic that nothing gathers."""
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
    """Dimensions that a criterion scores here: on Gram matrices, those they are gathered for."""
    if "gram" not in module.NEEDS:
        return set(module.DIMS)
    gathered = config.grams if config.resolved().gram_tokens else ()
    return {dim for dim in module.DIMS if observed(dim) in gathered}


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
    """Scores [units]; of expert_mlp [experts, units], one expert after the other."""
    if weights.dim != "expert_mlp":
        scores: Tensor = module.score({**stats, **more}, weights, weights.dim, generator)
        return scores
    each = []
    for expert in range(weights.family.sizes(weights.checkpoint.config)["experts"]):
        own = {name: value[expert][:, None] for name, value in stats.items()}
        weights_of_one = replace(weights, expert=expert)
        each.append(module.score({**own, **more}, weights_of_one, weights.dim, generator))
    return torch.stack(each)
