"""Choice of shape: cut every candidate in memory, score it untrained, keep the best.

A handful of shapes, or hundreds in rounds on more and more text, scored by KL to the dense model on
calibration text that was not profiled. It stands above the stages: it joins cutting and measuring.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig
from regrow.data.digest import data_digest
from regrow.errors import UserError
from regrow.manifest import Stage, digest, read
from regrow.options import Options
from regrow.progress import progress, say
from regrow.stages.prune import PruneConfig
from regrow.stages.prune.choose import choose
from regrow.stages.prune.shapes import Shape, candidates, grid
from regrow.stages.prune.stage import check_target
from regrow.stages.prune.stage import prune as prune_to
from regrow.statistics import Profile
from regrow.trial import TRIAL_BLOCKS, Trial

RIDGE = (1e-1,)  # one ridge strength is enough to rank shapes
HANDFUL = 8  # shapes that are tried in one round
SHOWN = 10


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    data: DataConfig | None = None,
    options: Options | None = None,
) -> Path:
    """Prune to a share of the parameters (the shape is searched for), to sizes, or by a plan.

    Raises UserError for an impossible target and for keep_params without `data` to choose on.
    """
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    if config.keep_params is None:
        return prune_to(checkpoint, out, config, profile)
    if profile is None:
        raise UserError("keep_params needs a profile: make one with regrow profile, give --profile")
    found = profile if isinstance(profile, Profile) else Profile(profile)
    shapes = check_keep_params(checkpoint, config)
    asked = digest(config.model_dump(mode="json"), None if data is None else data_digest(data))
    table = _earlier_choice(Path(out), asked, checkpoint, found, config)
    if table is None:
        if len(shapes) > 1 and data is None:
            raise UserError("keep_params needs data to choose a shape on: give --data, or sizes")
        table = choose_shape(checkpoint, shapes, found, config, data, options or Options())
    chosen = next(row for row in table if row["chosen"])
    sizes = with_sizes(config, chosen["sizes"])
    return prune_to(checkpoint, out, sizes, found, extra={"candidates": table}, search=asked)


def check_keep_params(checkpoint: Checkpoint, config: PruneConfig) -> list[Shape]:
    """The candidate shapes for `config.keep_params`; raises UserError when none meets it."""
    if config.keep_params is None:
        check_target(checkpoint, config)
        return []
    if config.sizes() or config.plan:
        raise UserError("give keep_params, or sizes, or a plan: one of them")
    family = families.of(checkpoint)
    target = (family, checkpoint.config, config.keep_params, config.multiple_of)
    if config.num_candidates <= HANDFUL:
        return candidates(*target)[: config.num_candidates]
    return grid(*target, config.num_candidates)


def with_sizes(config: PruneConfig, sizes: dict[str, int]) -> PruneConfig:
    """`config` with explicit sizes by dimension in place of keep_params."""
    keys = {"layers": "num_layers", "hidden": "hidden_size", "mlp": "intermediate_size"}
    keys |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    keys |= {"experts": "num_experts", "expert_mlp": "moe_intermediate_size"}
    named = {keys[dim]: size for dim, size in sizes.items()}
    return config.model_copy(update={"keep_params": None, **named})


def choose_shape(
    checkpoint: Checkpoint,
    shapes: list[Shape],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig | None,
    options: Options,
) -> list[dict[str, Any]]:
    """Score the shapes, print and return the table, the best first.

    Rows: name, sizes, parameters, keep, kl (of the last round the shape was in), round, chosen.
    """
    total = families.of(checkpoint).count(checkpoint.config)
    rows: list[dict[str, Any]] = [
        {
            "name": shape.name,
            "sizes": shape.sizes,
            "parameters": shape.parameters,
            "keep": shape.parameters / total,
            "kl": 0.0,
            "round": 0,
            "chosen": False,
        }
        for shape in shapes
    ]
    if data is not None and len(rows) > 1:
        rows = _tried(checkpoint, rows, profile, config, data, options)
    rows[0]["chosen"] = True
    say(f"search: chose {rows[0]['name']}")
    return rows


def _tried(
    checkpoint: Checkpoint,
    rows: list[dict[str, Any]],
    profile: Profile,
    config: PruneConfig,
    data: DataConfig,
    options: Options,
) -> list[dict[str, Any]]:
    """The rows with their scores, the best of the last round first, then those of earlier ones."""
    family = families.of(checkpoint)
    rounds = rounds_for(len(rows))
    trial = Trial(checkpoint, profile, data, options, blocks_for(len(rows)))
    left, out = rows, list[dict[str, Any]]()
    cost = 0.0
    for number, (share, survivors) in enumerate(rounds, start=1):
        last = number == len(rounds)
        before = [row["kl"] for row in left]
        with progress(f"search, round {number} of {len(rounds)}", len(left), "shapes") as counter:
            for row in left:
                plan = choose(
                    checkpoint,
                    family,
                    profile,
                    row["sizes"],
                    config.criterion,
                    config.layer_criterion,
                    expert_criterion=config.expert_criterion,
                )
                ridges = RIDGE if config.repair and last else None
                row |= {"kl": trial.kl(plan, ridges, share), "round": number}
                cost += share * row["keep"]
                counter.advance(1, f"KL {row['kl']:.3f}")
        if number > 1:
            agreement = rank_correlation(before, [row["kl"] for row in left])
            say(f"search: rank correlation of rounds {number - 1} and {number}: {agreement:.2f}")
        left = sorted(left, key=_cost)
        out = left[survivors:] + out
        left = left[:survivors]
    for row in left[:SHOWN]:
        say(f"search: {row['keep']:6.1%} kept  KL {row['kl']:.3f} nats  {row['name']}")
    say(f"search: cost {cost:.1f} dense evaluations of {trial.tokens:,} tokens")
    return left + out


def rounds_for(count: int) -> list[tuple[float, int]]:
    """(share of the text, survivors) of each round; a handful is scored on all of it at once."""
    if count <= HANDFUL:
        return [(1.0, count)]
    few = max(HANDFUL, count // 20)
    return [(1 / 16, max(few, count // 4)), (1 / 4, few), (1.0, few)]


def blocks_for(count: int) -> int:
    """Blocks of text to score `count` shapes on."""
    return TRIAL_BLOCKS if count <= HANDFUL else 4 * TRIAL_BLOCKS


def passes_for(count: int) -> float:
    """How often the text is read in all, in evaluations of one shape on all of it."""
    entered, passes = count, 0.0
    for share, survivors in rounds_for(count):
        entered, passes = survivors, passes + share * entered
    return passes if count > 1 else 0.0


def rank_correlation(one: list[float], other: list[float]) -> float:
    """Spearman's: the correlation of the ranks. 1 for fewer than two."""
    if len(one) < 2:
        return 1.0
    ranks = torch.tensor([one, other]).double().argsort(dim=1).argsort(dim=1)
    return float(torch.corrcoef(ranks.double())[0, 1])


def _cost(row: dict[str, Any]) -> float:
    return float(row["kl"]) if math.isfinite(row["kl"]) else math.inf


def _earlier_choice(
    out: Path, asked: str, checkpoint: Checkpoint, profile: Profile, config: PruneConfig
) -> list[dict[str, Any]] | None:
    """The table of an earlier run of this very search, so that a resumed job need not repeat it."""
    found, path = read(out), out / "candidates.json"
    if found is None or not path.exists():
        return None
    inputs = found.get("inputs", {})
    known = {"search": asked, "model": checkpoint.fingerprint, "profile": digest(profile.info)}
    if any(inputs.get(name) != value for name, value in known.items()):
        return None
    table: list[dict[str, Any]] = json.loads(path.read_text())
    chosen = next(row for row in table if row["chosen"])
    stage = Stage(out, "prune", with_sizes(config, chosen["sizes"]), inputs)
    return table if stage.complete else None
