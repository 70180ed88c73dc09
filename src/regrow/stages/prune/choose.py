"""Choose which units are kept: the best-scored ones, by layer, in their old order."""

from __future__ import annotations

from torch import Tensor

from regrow.checkpoint import Checkpoint
from regrow.families import Family
from regrow.plan import Plan
from regrow.stages.prune.vocabulary import choose_vocab
from regrow.statistics import Profile, for_gone

VOCAB_CRITERION = "token_count"


def full_sizes(family: Family, before: dict[str, int], sizes: dict[str, int]) -> dict[str, int]:
    """All dimensions after a cut to `sizes`; KV heads cut alone take their query heads along."""
    after = {**before, **sizes}
    if "kv_heads" in sizes and "heads" not in sizes:
        after["heads"] = before["heads"] // before["kv_heads"] * sizes["kv_heads"]
    return after


def choose(
    checkpoint: Checkpoint,
    family: Family,
    profile: Profile,
    sizes: dict[str, int],
    criterion: str,
    layer_criterion: str,
    multiple_of: int = 1,
    expert_criterion: str | None = None,
) -> Plan:
    """A plan that keeps the `sizes` best-scored units of each dimension.

    Query heads are ranked inside their kept KV head, channels of an expert inside that; experts by
    `expert_criterion`, where it is not the `criterion` of the other widths. Raises UserError for a
    shape the model cannot have or a criterion without scores.
    """
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, sizes)
    family.check_sizes(checkpoint.config, after, multiple_of)
    cut = {dim for dim in before if after[dim] != before[dim]}
    layers = list(range(before["layers"]))
    if "layers" in cut:
        depth = profile.scores(layer_criterion, "layers")["all"]
        layers = best(for_gone(depth, before["layers"] - after["layers"]), after["layers"])
    hidden = None
    if "hidden" in cut:
        hidden = best(profile.scores(criterion, "hidden")["all"], after["hidden"])
    with_mlp, with_experts = (
        [n for n in layers if n in family.layers_of(dim, checkpoint.config)]
        for dim in ("mlp", "experts")
    )
    experts = expert_mlp = None
    if "experts" in cut:
        by = expert_criterion or criterion
        experts = _per_layer(profile, by, "experts", with_experts, after)
    if "expert_mlp" in cut:
        of = experts or {n: list(range(before["experts"])) for n in with_experts}
        scores = profile.scores(criterion, "expert_mlp")
        expert_mlp = {
            n: {e: best(scores[str(n)][e], after["expert_mlp"]) for e in of[n]} for n in of
        }
    kv_heads = heads = None
    if "kv_heads" in cut:
        kv_heads = _per_layer(profile, criterion, "kv_heads", layers, after)
    if "heads" in cut:
        scores = profile.scores(criterion, "heads")
        groups = kv_heads or {n: list(range(before["kv_heads"])) for n in layers}
        group, keep = (size["heads"] // size["kv_heads"] for size in (before, after))
        heads = {n: best_heads(scores[str(n)], groups[n], group, keep) for n in layers}
    vocab = None
    if "vocab" in cut:
        counts_V = profile.scores(VOCAB_CRITERION, "vocab")["all"]
        vocab = choose_vocab(checkpoint, counts_V, after["vocab"])
    return Plan(
        model_type=family.model_type,
        fingerprint=checkpoint.fingerprint,
        before=before,
        after=after,
        layers=layers if "layers" in cut else None,
        hidden=hidden,
        mlp=_per_layer(profile, criterion, "mlp", with_mlp, after) if "mlp" in cut else None,
        heads=heads,
        vocab=vocab,
        kv_heads=kv_heads,
        experts=experts,
        expert_mlp=expert_mlp,
        criterion=criterion,
    )


def best(scores_n: Tensor, count: int) -> list[int]:
    """Ids of the `count` highest scores, ascending; of equal scores the lower id is kept."""
    order = scores_n.argsort(descending=True, stable=True)
    return sorted(order[:count].tolist())


def best_heads(scores_n: Tensor, kv_heads: list[int], group: int, keep: int) -> list[int]:
    """The `keep` best query heads of each of `kv_heads`, each of which reads `group` of them."""
    kept = []
    for kv in kv_heads:
        kept += [kv * group + head for head in best(scores_n[kv * group : (kv + 1) * group], keep)]
    return kept


def _per_layer(
    profile: Profile, criterion: str, dim: str, layers: list[int], after: dict[str, int]
) -> dict[int, list[int]]:
    scores = profile.scores(criterion, dim)
    return {layer: best(scores[str(layer)], after[dim]) for layer in layers}
