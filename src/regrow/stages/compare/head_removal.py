"""Remove one query head: compare the least important head with random heads.

To remove a head, its columns in the output projection are set to zero, which has the same effect on
the model's output as a cut. Shapes do not change, so a single head can be removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from statistics import mean, stdev
from typing import Any

import torch
from rich.table import Table

from regrow import families
from regrow.errors import UserError
from regrow.profile_folder import Profile
from regrow.search.score import CutScorer
from regrow.training.head import head_loss, head_of
from regrow.training.loss_weights import LossWeights
from regrow.training.teacher import final_hidden, scored

Heads = list[tuple[int, int]]
"""(layer, query head) of each head that is removed."""
BOTH = LossWeights({"forward_kl": 1.0, "cross_entropy": 1.0})


def check_heads(profile: Profile) -> list[str]:
    """The profile's criteria that score query heads; raises UserError when there are none."""
    names = [name for name in profile.criteria({"heads"}) if name != "random"]
    if not names:
        raise UserError(
            f"{profile.folder} scores no query heads: profile with --criteria activation_l2, or "
            "leave --heads out"
        )
    return names


def remove_heads(scorer: CutScorer, draws: int) -> list[dict[str, Any]]:
    """Rows with the cost of removing one head of the whole model, or one head of every layer.

    Each row has `removed`, and `chosen`: a criterion, for its least important heads, or random, for
    the mean over `draws`. In nats per token it has `kl` to the whole model, `loss` minus the whole
    model's loss, and for random their standard deviations over the draws.
    """
    names = check_heads(scorer.profile)
    scores = {name: scorer.profile.scores(name, "heads") for name in names}
    sizes = families.of(scorer.checkpoint).sizes(scorer.checkpoint.config)
    layers, heads = range(sizes["layers"]), range(sizes["heads"])
    every = [(layer, head) for layer in layers for head in heads]
    whole = _losses(scorer)["cross_entropy"]
    rows = []
    for removed in ("one head", "one head in every layer"):
        for name in names:
            least = [(layer, int(scores[name][str(layer)].argmin())) for layer in layers]
            if removed == "one head":
                least = [min(least, key=lambda at: float(scores[name][str(at[0])][at[1]]))]
            rows.append({"removed": removed, "chosen": name, **_row(scorer, [least], whole)})
        if removed == "one head":
            some = [[at] for at in Random(0).sample(every, min(draws, len(every)))]
        else:
            some = [
                [(n, Random(f"{draw}/{n}").choice(heads)) for n in layers] for draw in range(draws)
            ]
        rows.append({"removed": removed, "chosen": "random", **_row(scorer, some, whole)})
    return rows


def heads_table(rows: list[dict[str, Any]], draws: int) -> Table:
    """The rows as a table for the terminal."""
    title = f"Query heads removed; random: mean ± standard deviation of {draws} draws"
    table = Table(
        "removed", "chosen", "KL, nats", "Δ loss, nats", title=title, title_justify="left"
    )
    for row in rows:
        cells = []
        for name in ("kl", "loss"):
            spread = row.get(f"{name}_spread")
            cells.append(f"{row[name]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
        table.add_row(row["removed"], row["chosen"], *cells)
    return table


def _row(scorer: CutScorer, choices: list[Heads], whole: float) -> dict[str, float]:
    losses = []
    for heads in choices:
        with _without(scorer, heads):
            losses.append(_losses(scorer))
    row = {"kl": mean(one["forward_kl"] for one in losses)}
    row["loss"] = mean(one["cross_entropy"] for one in losses) - whole
    if len(losses) > 1:
        row["kl_spread"] = stdev(one["forward_kl"] for one in losses)
        row["loss_spread"] = stdev(one["cross_entropy"] for one in losses)
    return row


@contextmanager
@torch.no_grad()
def _without(scorer: CutScorer, heads: Heads) -> Iterator[None]:
    """A context in which the scorer's dense model has no such heads."""
    family = families.of(scorer.checkpoint)
    width = family.sizes(scorer.checkpoint.config)["head_dim"]
    saved = []
    for layer, head in heads:
        for template in family.readers("heads"):
            weight = scorer.dense.model.get_parameter(template.format(layer=layer))
            columns = weight.detach()[:, head * width : (head + 1) * width]
            saved.append((columns, columns.clone()))
            columns.zero_()
    try:
        yield
    finally:
        for columns, values in saved:
            columns.copy_(values)


@torch.no_grad()
def _losses(scorer: CutScorer) -> dict[str, float]:
    """KL to the whole model and next-token loss of the current model, per scored token."""
    head = head_of(scorer.dense.model)
    sums, tokens = dict.fromkeys(BOTH.weights, 0.0), 0
    for batch, reference_NH in scorer.text():
        mask = scored(batch)
        hidden_NH = final_hidden(scorer.dense.model, batch)[mask]
        targets_N = batch["labels"][:, 1:][mask].to(hidden_NH.device)
        _, parts = head_loss(hidden_NH, head, targets_N, BOTH, reference_NH, head)
        sums = {name: sums[name] + float(parts[name]) for name in sums}
        tokens += len(targets_N)
    return {name: value / tokens for name, value in sums.items()}
