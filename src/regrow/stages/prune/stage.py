"""The prune stage: a checkpoint and its profile in, a smaller checkpoint out."""

from __future__ import annotations

from pathlib import Path

import torch

from regrow import families
from regrow.checkpoint import Checkpoint, load
from regrow.errors import UserError
from regrow.manifest import Figure, Stage, digest, require_space, write_json
from regrow.plan import Plan
from regrow.progress import say
from regrow.stages.prune.choose import choose, full_sizes
from regrow.stages.prune.config import PruneConfig
from regrow.stages.prune.cut import check, cut_folder
from regrow.stages.prune.repair import Repair
from regrow.statistics import Profile

PLAN = "plan.json"


def prune(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    extra: dict[str, object] | None = None,
) -> Path:
    """Cut a checkpoint, tensor by tensor from disk to disk, to explicit sizes or a given plan.

    `extra` (the table of a shape search) is kept beside the plan. Raises UserError for an
    impossible shape, a profile or plan of another model, or what is missing for the job.
    """
    out = Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    family = families.of(checkpoint)
    found = _profile_for(checkpoint, profile)
    plan = make_plan(checkpoint, config, found)
    repaired = config.repair and found is not None and bool(found.info["grams"])
    if config.repair and not repaired and (plan.mlp or plan.heads or plan.kv_heads):
        raise UserError(
            "repair needs a profile with Gram matrices: give --profile, or prune with --no-repair"
        )
    inputs = {"model": checkpoint.fingerprint, "plan": plan.digest()}
    if found is not None:
        inputs["profile"] = digest(found.info)
    stage = Stage(out, "prune", config, inputs)
    if stage.complete:
        say(f"prune: {out} is complete and unchanged")
        return out
    after = family.count(checkpoint.config, plan.after)
    before = family.count(checkpoint.config)
    require_space(out, sum(map(checkpoint.bytes, checkpoint.names())) * after // before)
    say(f"prune: {before:,} → {after:,} parameters ({after / before:.1%} kept), {describe(plan)}")
    with stage as folder:
        repair = Repair(checkpoint, family, found, plan) if repaired and found else None
        cut_folder(checkpoint, plan, folder, replace=repair)
        plan.write(folder / PLAN)
        for name, value in (extra or {}).items():
            write_json(folder / f"{name}.json", value)
        stage.figures += _figures(before, after, repair)
        stage.extra["repair"] = {} if repair is None else repair.solutions
        prove_reload(folder)
    return out


def make_plan(checkpoint: Checkpoint, config: PruneConfig, profile: Profile | None) -> Plan:
    """The plan that `config` asks for: read from its file, or chosen by the profile's scores."""
    family = families.of(checkpoint)
    sizes = config.sizes()
    if config.plan is not None:
        if sizes or config.keep_params is not None:
            raise UserError("give a plan or a target shape, not both")
        plan = Plan.read(Path(config.plan))
        plan.check_fingerprint(checkpoint)
        check(plan, family, checkpoint.config)
        return plan
    if not sizes:
        raise UserError(
            "nothing to prune to: give keep_params (with data to choose a shape on), sizes such as "
            "num_layers or intermediate_size, or a plan"
        )
    check_target(checkpoint, config)
    if profile is None:
        raise UserError("choosing what to keep needs a profile: make one with regrow profile")
    return choose(
        checkpoint,
        family,
        profile,
        sizes,
        config.criterion,
        config.layer_criterion,
        config.multiple_of,
    )


def check_target(checkpoint: Checkpoint, config: PruneConfig) -> None:
    """Raise UserError, before any slow work, for sizes this checkpoint cannot be cut to."""
    family = families.of(checkpoint)
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, config.sizes())
    family.check_sizes(checkpoint.config, after, config.multiple_of)


def describe(plan: Plan) -> str:
    """What a plan cuts, in words: `mlp 1536→1184, layers 30→28`."""
    changed = [d for d in plan.before if plan.after[d] != plan.before[d]]
    return ", ".join(f"{dim} {plan.before[dim]}→{plan.after[dim]}" for dim in changed) or "nothing"


def prove_reload(folder: Path) -> None:
    """Open the folder with the stock reader and run it; an assertion of ours, not of the user's."""
    if sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 4e9:
        return  # headers and names are checked for every size; running needs the model in memory
    checkpoint = Checkpoint(folder)
    model = checkpoint.model(torch.bfloat16)
    with torch.no_grad():
        logits = model(torch.arange(8)[None] % model.config.vocab_size).logits
    assert bool(logits.isfinite().all()), f"{folder} computes values that are not finite"


def _profile_for(checkpoint: Checkpoint, profile: str | Path | Profile | None) -> Profile | None:
    if profile is None:
        return None
    found = profile if isinstance(profile, Profile) else Profile(profile)
    if found.fingerprint != checkpoint.fingerprint:
        raise UserError(
            f"{found.folder} is the profile of another model ({found.fingerprint[:12]}, this one is "
            f"{checkpoint.fingerprint[:12]}): profile {checkpoint.folder} first"
        )
    return found


def _figures(before: int, after: int, repair: Repair | None) -> list[Figure]:
    figures = [
        Figure(name="parameters", value=after, convention="tied weights counted once"),
        Figure(name="kept share of parameters", value=after / before),
    ]
    if repair is not None and repair.solutions:
        errors = torch.tensor([row[1:] for row in repair.solutions.values()]).mean(0)
        convention = "mean over readers of |y' - y| / |y|, weighted tokens of held-out blocks"
        for name, value in zip(("before", "after"), errors.tolist(), strict=True):
            figures.append(
                Figure(
                    name=f"output error {name} repair",
                    value=value,
                    n=len(repair.solutions),
                    convention=convention,
                )
            )
    return figures
