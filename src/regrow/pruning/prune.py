"""The prune stage: it reads a checkpoint and its profile and writes a smaller checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from regrow import families, plugins
from regrow import plan as plans
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint.from_config import on_meta
from regrow.config import Options
from regrow.data.sequences import VALIDATE_EVERY
from regrow.errors import UserError
from regrow.plan import Plan, compose
from regrow.profile_folder import Profile
from regrow.pruning.choose import choose, full_sizes
from regrow.pruning.config import SEARCH, SIZES, PruneConfig
from regrow.pruning.cut import check, cut_config, cut_folder
from regrow.pruning.repair import REPAIR, Repaired, RepairSetup
from regrow.pruning.vocabulary import check_vocab_size
from regrow.runtime.progress import say
from regrow.sparsity import zeros
from regrow.sparsity.pattern import parse
from regrow.stage_dir import Figure, digest, refuse_input, require_space, write_json
from regrow.training.rates import RANDOM_WEIGHTS, has_random_weights

DEEP = 0.6  # below this share of the parameters, one round cuts too much (Minitron: 1/3 a round)
RUN_BYTES = 500_000_000


@dataclass(frozen=True)
class Search:
    """The choice of a shape that comes before a cut."""

    digest: str
    """Hash of what it was asked."""
    seconds: float | None
    """The time that it took; None if it was made before."""


def prune_to_sizes(
    model: str | Path | Checkpoint,
    out: str | Path,
    config: PruneConfig,
    profile: str | Path | Profile | None = None,
    extra: dict[str, object] | None = None,
    search: Search | None = None,
    options: Options | None = None,
) -> Path:
    """Cut a checkpoint, tensor by tensor from disk to disk, to explicit sizes or a given plan.

    A repair is applied only if it brings the cut model closer to the dense model on text that was
    not used to fit it. `extra` (the table of a shape search) is written next to the plan. If the
    model is itself the result of a cut, a second plan with the ids of the first model is written.
    Raises UserError for an impossible shape, for sizes that cut nothing, for a profile or plan of
    another model, and for a missing input.
    """
    out = Path(out)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    refuse_input(out, checkpoint.folder)
    family = families.of(checkpoint)
    measured = _profile_for(checkpoint, profile)
    plan = make_plan(checkpoint, config, measured)
    narrower = any(plan.after[dim] != plan.before[dim] for dim in plan.before if dim != "vocab")
    method = repair_method(config, measured) if config.repair and narrower else None
    if config.plan is not None:  # its digest matters, not its path; a copy is written to `out`
        config = config.model_copy(update={"plan": plans.FILE, "allow_sibling": False})
    inputs = _inputs(checkpoint, plan, measured, search)
    stage = ModelDir(out, "prune", config, inputs, checkpoint)
    if stage.complete:
        say(f"prune: {out} is complete and unchanged")
        return out
    from_first = _from_first(checkpoint, plan)
    after = family.count(cut_config(checkpoint.config, plan, family))
    before = family.count(checkpoint.config)
    space = sum(map(checkpoint.bytes, checkpoint.names())) * after // before
    if method is not None and measured is not None:
        tokens = min(config.repair_tokens, int(measured.info["tokens"]))
        space += method.work_bytes(plan.before, tokens)
    require_space(out, space)
    _announce(before, after, plan)
    with stage as folder:
        trial = RepairTrial()
        if method is not None and measured is not None:
            work, machine = folder / "work", options or Options()
            setup = repair_setup(checkpoint, measured, plan, config, work, machine)
            trial = try_repair(setup, config)
        cut_folder(checkpoint, plan, folder, replace=trial.accepted)
        shutil.rmtree(folder / "work", ignore_errors=True)
        plan.write(folder / plans.FILE)
        if from_first is not None:
            from_first.write(folder / plans.FROM_FIRST)
        for name, value in (extra or {}).items():
            write_json(folder / f"{name}.json", value)
        stage.figures += _figures(before, after, trial)
        stage.extra[SEARCH] = None if search is None else search.seconds
        stage.extra[zeros.NOTE] = _sparsity_after(checkpoint, plan)
        stage.extra[RANDOM_WEIGHTS] = has_random_weights(checkpoint) or None
        stage.extra["repair"] = {} if trial.accepted is None else trial.accepted.solutions
        prove_reload(folder)
    return out


def _sparsity_after(checkpoint: Checkpoint, plan: Plan) -> str | None:
    """The note on the zeros; a cut of widths breaks the groups of N:M, and leaves a share."""
    noted = zeros.recorded(checkpoint)
    cut = {dim for dim in plan.before if plan.after[dim] != plan.before[dim]}
    if noted is None or ":" not in noted or not cut - {"layers", "vocab", "experts"}:
        return noted
    return f"{parse(noted).share:g}"


def _inputs(
    checkpoint: Checkpoint, plan: Plan, profile: Profile | None, search: Search | None
) -> dict[str, str]:
    """Hashes of all inputs other than the config."""
    hashes = {"model": checkpoint.fingerprint, "plan": plan.digest()}
    if profile is not None:
        hashes["profile"] = digest(profile.info)
    if search is not None:
        hashes["search"] = search.digest
    return hashes


def _announce(before: int, after: int, plan: Plan) -> None:
    say(f"prune: {before:,} → {after:,} parameters ({after / before:.1%} kept), {describe(plan)}")
    if after < DEEP * before:
        say(
            f"prune: less than {DEEP:.0%} is kept in one cut: pruning a third at most, distilling, "
            "and pruning again loses less (examples/two_rounds.yaml)"
        )


def _from_first(checkpoint: Checkpoint, plan: Plan) -> Plan | None:
    """All cuts since the first model, merged into one plan; None when this is the first cut."""
    earlier = next(plans.stored_plans(checkpoint.folder), None)
    # A plan for this model itself, stored here to be applied, is not part of its history.
    if earlier is None or earlier.fingerprint in (checkpoint.fingerprint, *plan.siblings):
        return None
    return compose(earlier, plan)


def make_plan(checkpoint: Checkpoint, config: PruneConfig, profile: Profile | None) -> Plan:
    """The plan for a `config`: read from its file, or chosen by the profile's scores."""
    family = families.of(checkpoint)
    sizes = config.sizes()
    if config.plan is not None:
        if sizes or config.keep_params is not None:
            raise UserError("give a plan or a target shape, not both")
        plan = Plan.read(Path(config.plan))
        if config.allow_sibling:
            plan = plan.for_sibling(checkpoint)
        plan.check_fingerprint(checkpoint)
        check(plan, family, checkpoint.config)
        return plan
    if not sizes:
        raise UserError(
            "no target to prune to: give keep_params (with data to choose a shape on), sizes such "
            "as num_layers or intermediate_size, or a plan"
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
        config.expert_criterion,
    )


def repair_setup(
    checkpoint: Checkpoint,
    profile: Profile,
    plan: Plan,
    config: PruneConfig,
    work: Path,
    options: Options,
) -> RepairSetup:
    """The inputs of a repair method; `work` is a folder for temporary files."""
    family, limits = families.of(checkpoint), (config.repair_tokens, config.repair_upstream)
    return RepairSetup(checkpoint, family, profile, plan, work, options, *limits)


def repair_by(setup: RepairSetup, config: PruneConfig) -> Repaired | None:
    """The repaired weights for a plan, not yet validated; None if the config wants no repair.

    Raises the UserErrors of `repair_method`.
    """
    if reason := setup.family.refused.get("repair"):
        say(f"prune: no repair for this {setup.family.model_type} model: {reason}")
        return None
    if not config.repair:
        return None
    repaired: Repaired = repair_method(config, setup.profile).repair(setup)
    return repaired


@dataclass(frozen=True)
class RepairTrial:
    """A repair, if one was tried, and KL(dense ‖ cut) on validation text, without and with it."""

    repaired: Repaired | None = None
    kl_without: float = 0.0
    kl_with: float = 0.0
    tokens: int = 0

    @property
    def accepted(self) -> Repaired | None:
        """The repair if it lowers the KL, otherwise None; a NaN does not count as lower."""
        return self.repaired if self.kl_with < self.kl_without else None


def try_repair(setup: RepairSetup, config: PruneConfig) -> RepairTrial:
    """Repair with `repair_by`, and measure the whole model with and without the repair."""
    from regrow.pruning.repair._validate import validation_kl

    repaired = repair_by(setup, config)
    if repaired is None:
        return RepairTrial()
    (kl_without, kl_with), tokens = validation_kl(setup, (None, repaired))
    trial = RepairTrial(repaired, kl_without, kl_with, tokens)
    kept = "" if trial.accepted is not None else "; the repair does not help and is not applied"
    say(
        f"prune: KL to the dense model {kl_without:.3f} without repair, {kl_with:.3f} with it, on "
        f"{tokens:,} validation tokens{kept}"
    )
    return trial


def repair_method(config: PruneConfig, profile: Profile | None) -> ModuleType:
    """The module of the method; raises UserError for an unknown method or a missing input."""
    module = plugins.load(REPAIR, config.repair_method)
    if profile is None:
        raise UserError("repair needs a profile: give --profile, or prune with --no-repair")
    if module.GRAMS and not profile.info["grams"]:
        raise UserError(
            f"{profile.folder} has no Gram matrices, which repair by {config.repair_method} needs: "
            "profile again with --gram-tokens 65536, or use another method or --no-repair"
        )
    if not module.GRAMS:
        profile.sequences_path()
        check_sequences(config, profile.info["samples"], str(profile.folder))
    return module


def check_sequences(config: PruneConfig, samples: int, profile: str) -> None:
    """Raise UserError if `profile` has too few sequences of text for a repair that runs them."""
    if samples < VALIDATE_EVERY:
        raise UserError(
            f"{profile} has {samples} sequences of text; repair by {config.repair_method} takes "
            f"{VALIDATE_EVERY} or more: profile with more samples, or prune without repair"
        )


def check_target(checkpoint: Checkpoint, config: PruneConfig) -> None:
    """Raise UserError, before any slow work, for sizes that this checkpoint cannot be cut to."""
    family = families.of(checkpoint)
    before = family.sizes(checkpoint.config)
    after = full_sizes(family, before, config.sizes())
    check_cuts(config, before, after)
    families.check_sizes(family, checkpoint.config, after, config.multiple_of)
    if after["vocab"] != before["vocab"]:
        check_vocab_size(checkpoint, after["vocab"])


def check_cuts(config: PruneConfig, before: dict[str, int], after: dict[str, int]) -> None:
    """Raise UserError for sizes that are those of the model."""
    if config.sizes() and after == before:
        given = ", ".join(f"{SIZES[dim]} {size}" for dim, size in config.sizes().items())
        raise UserError(f"{given}: the model has that already, so nothing is cut; give less")


def describe(plan: Plan) -> str:
    """The changed sizes of a plan as text: `mlp 1536→1184, layers 30→28`."""
    changed = [d for d in plan.before if plan.after[d] != plan.before[d]]
    return ", ".join(f"{dim} {plan.before[dim]}→{plan.after[dim]}" for dim in changed) or "nothing"


def prove_reload(folder: Path) -> None:
    """Check that transformers can load the written folder; a failure is a bug in regrow.

    A model up to 0.5 GB is loaded and run. A larger model may not fit into memory, so its
    transformers class is built on the meta device, and the names and shapes are compared.
    """
    checkpoint = Checkpoint(folder)
    family = families.of(checkpoint)
    if sum(map(checkpoint.bytes, checkpoint.names())) <= RUN_BYTES:
        model = checkpoint.model(torch.bfloat16)
        with torch.no_grad():
            logits = model(torch.arange(8)[None] % model.config.vocab_size).logits
        assert bool(logits.isfinite().all()), f"{folder} computes values that are not finite"
        if checkpoint.whole is not None:
            checkpoint.whole_model(torch.bfloat16)
        return
    config = checkpoint.stock_config()
    stock = families.as_on_disk(family, on_meta(config).state_dict())
    shapes = {name: tuple(value.shape) for name, value in stock.items()}
    assert checkpoint.shapes.items() <= shapes.items(), f"{folder} is not what its config says"


def _profile_for(checkpoint: Checkpoint, profile: str | Path | Profile | None) -> Profile | None:
    if profile is None:
        return None
    opened = profile if isinstance(profile, Profile) else Profile(profile)
    opened.check_fingerprint(checkpoint)
    return opened


def _figures(before: int, after: int, trial: RepairTrial) -> list[Figure]:
    figures = [
        Figure(name="parameters", value=after, convention="tied weights counted once"),
        Figure(name="kept share of parameters", value=after / before),
    ]
    if trial.repaired is None:
        return figures
    convention = "KL(dense ‖ cut), on validation sequences of the profile's text"
    for name, kl in (("without", trial.kl_without), ("with", trial.kl_with)):
        figures.append(
            Figure(
                name=f"KL {name} repair",
                value=kl,
                unit="nats per token",
                n=trial.tokens,
                convention=convention,
            )
        )
    if trial.accepted is not None and trial.accepted.solutions:
        rows = torch.tensor([row[1:] for row in trial.accepted.solutions.values()])
        convention = "mean over readers of |y' - y| / |y|, weighted tokens of validation sequences"
        for name, error in zip(("before", "after"), rows.mean(0).tolist(), strict=True):
            figures.append(
                Figure(
                    name=f"output error {name} repair",
                    value=error,
                    n=len(rows),
                    convention=convention,
                )
            )
    return figures
