"""Choose the units to keep: in each layer those with the highest scores, in their old order."""

from __future__ import annotations

from torch import Tensor

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.plan import Plan
from regrow.profile_folder import Profile, scores_for
from regrow.pruning.vocabulary import choose_vocab

VOCAB_CRITERION = "token_count"
Sizes = dict[str, int]


def full_sizes(family: Family, before: Sizes, sizes: Sizes) -> Sizes:
    """All sizes after a cut to `sizes`; a cut of only KV heads also cuts their query heads."""
    after = {**before, **sizes}
    if "kv_heads" in sizes and "heads" not in sizes:
        after["heads"] = before["heads"] // before["kv_heads"] * sizes["kv_heads"]
    return after


def choose(
    checkpoint: Checkpoint,
    family: Family,
    profile: Profile,
    sizes: Sizes,
    criterion: str,
    layer_criterion: str,
    multiple_of: int = 1,
    expert_criterion: str | None = None,
) -> Plan:
    """A plan that keeps the highest-scoring units of each dimension, as many as `sizes` says.

    Query heads are ranked inside their KV head, and channels of an expert inside the expert.
    Experts are ranked by `expert_criterion`, by default `criterion`. Raises UserError for a shape
    that the model cannot have, and for a criterion without scores.
    """
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, sizes)
    families.check_sizes(family, checkpoint.config, after, multiple_of)
    cut = {dim for dim in before if after[dim] != before[dim]}
    layers = _layers(profile, layer_criterion, before, after)

    def having(dim: str) -> list[int]:
        return [n for n in layers if n in family.layers_of(dim, checkpoint.config)]

    def best_of(dim: str, scored_by: str = criterion) -> dict[int, list[int]] | None:
        return _per_layer(profile, scored_by, dim, having(dim), after[dim]) if dim in cut else None

    kv_heads = best_of("kv_heads")
    experts = best_of("experts", expert_criterion or criterion)
    kept_heads = kv_heads or _all_of("kv_heads", having("heads"), before)
    kept_experts = experts or _all_of("experts", having("experts"), before)
    return Plan(
        model_type=family.model_type,
        fingerprint=checkpoint.fingerprint,
        before=before,
        after=after,
        layers=layers if "layers" in cut else None,
        hidden=_hidden(profile, criterion, after) if "hidden" in cut else None,
        mlp=best_of("mlp"),
        heads=_heads(profile, criterion, kept_heads, before, after) if "heads" in cut else None,
        vocab=_vocab(checkpoint, profile, after) if "vocab" in cut else None,
        kv_heads=kv_heads,
        experts=experts,
        expert_mlp=(
            _expert_mlp(profile, criterion, kept_experts, after) if "expert_mlp" in cut else None
        ),
        criterion=criterion,
    )


def best(scores_n: Tensor, count: int) -> list[int]:
    """Ids of the `count` highest scores, ascending; among equal scores the lower id is kept."""
    order = scores_n.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def best_heads(scores_n: Tensor, kv_heads: list[int], group: int, keep: int) -> list[int]:
    """The `keep` best query heads of each KV head, which is shared by `group` query heads."""
    kept = []
    for kv in kv_heads:
        kept += [kv * group + head for head in best(scores_n[kv * group : (kv + 1) * group], keep)]
    return kept


def _all_of(dim: str, layers: list[int], before: Sizes) -> dict[int, list[int]]:
    return {layer: list(range(before[dim])) for layer in layers}


def _per_layer(
    profile: Profile, criterion: str, dim: str, layers: list[int], count: int
) -> dict[int, list[int]]:
    scores = profile.scores(criterion, dim)
    return {layer: best(scores[str(layer)], count) for layer in layers}


def _layers(profile: Profile, criterion: str, before: Sizes, after: Sizes) -> list[int]:
    """The kept layers; all layers when depth is not cut."""
    if after["layers"] == before["layers"]:
        return list(range(before["layers"]))
    depth = profile.scores(criterion, "layers")["all"]
    return best(scores_for(depth, before["layers"] - after["layers"]), after["layers"])


def _hidden(profile: Profile, criterion: str, after: Sizes) -> list[int]:
    return best(profile.scores(criterion, "hidden")["all"], after["hidden"])


def _heads(
    profile: Profile, criterion: str, kv_heads: dict[int, list[int]], before: Sizes, after: Sizes
) -> dict[int, list[int]]:
    scores = profile.scores(criterion, "heads")
    group, keep = (sizes["heads"] // sizes["kv_heads"] for sizes in (before, after))
    return {n: best_heads(scores[str(n)], kept, group, keep) for n, kept in kv_heads.items()}


def _expert_mlp(
    profile: Profile, criterion: str, experts: dict[int, list[int]], after: Sizes
) -> dict[int, dict[int, list[int]]]:
    scores, count = profile.scores(criterion, "expert_mlp"), after["expert_mlp"]
    return {
        n: {expert: best(scores[str(n)][expert], count) for expert in kept}
        for n, kept in experts.items()
    }


def _vocab(checkpoint: Checkpoint, profile: Profile, after: Sizes) -> list[int]:
    counts_V = profile.scores(VOCAB_CRITERION, "vocab")["all"]
    return choose_vocab(checkpoint, counts_V, after["vocab"])
