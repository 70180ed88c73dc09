"""From statistics to scores: what the chosen criteria need, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from regrow import plugins
from regrow.checkpoint import Checkpoint
from regrow.errors import UserError
from regrow.families import Family
from regrow.plan import WHOLE
from regrow.stages.profile.config import ProfileConfig
from regrow.stages.profile.weights import DimWeights, observed

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
