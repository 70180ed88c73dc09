"""Prune: cut a model to a target, to sizes or by a plan, and repair the cut model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from regrow.config import Machine
from regrow.errors import UserError
from regrow.pruning.config import SIZES, PruneConfig
from regrow.stage import BEFORE_FIRST_PRUNE, BEFORE_PRUNE, RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, open_model, print_lines

FILLS_ZEROS = "set repair to false, or prune before you sparsify"


class PruneStage(Stage):
    """Cuts the current model by its profile; writes the smaller model with and without repair."""

    config = PruneConfig
    changes_weights = True
    needs_plain_weights = True
    ranks = "split"
    uses = ("distill",)

    def command(
        self,
        model: Model,
        out: Path,
        profile: Path | None = None,
        text: OmitArgPrefixes[OptionalText] = OptionalText(),
        pruning: OmitArgPrefixes[PruneConfig] = PruneConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Cut a model to a share of its parameters, to sizes or by a plan, and repair what is left.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            out: Folder to write the smaller model to.
            profile: Folder that regrow profile wrote for this model.
            pruning: Target, criteria and repair.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        checkpoint = open_model(model)  # raises for an unreadable model before the slow imports
        from regrow.profile_folder import Profile
        from regrow.sparsity.zeros import refuse_filling
        from regrow.stages.prune.dry_run import estimate

        if dry_run:
            if pruning.repair:
                refuse_filling(checkpoint, "repair", FILLS_ZEROS)
            tokens = Profile(profile).info["tokens"] if profile is not None else None
            print_lines(estimate(checkpoint, pruning, text.sequence_length, tokens), out)
            return
        from regrow.stages.prune.stage import prune

        prune(model, out, pruning, profile, text.blend() if text.data else None, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for a missing profile, no target or several, or impossible sizes."""
        from regrow.pruning.prune import check_sequences, make_plan
        from regrow.pruning.repair import reads_grams
        from regrow.search.shapes import check_keep_params
        from regrow.sparsity.zeros import NOTE, would_fill
        from regrow.stages.prune.dry_run import check_one_target, config_after

        if NOTE in plan.left and step.config.repair:
            raise would_fill(plan.left[NOTE], "repair", FILLS_ZEROS)
        if not plan.profiled:
            raise UserError("put a profile stage of the same model before it")
        check_one_target(step.config)
        if reads_grams(step.config) and not plan.left.get("gram_tokens"):
            raise UserError(
                f"repair by {step.config.repair_method} needs Gram matrices, and the profile "
                "before it gathers none: raise its gram_tokens, or leave that field out"
            )
        if step.config.repair and not reads_grams(step.config):
            check_sequences(step.config, plan.left["samples"], "the profile before it")
        _check_criteria(step.config, plan.left.get("criteria", ()))
        if _is_first(step, plan) and step.config.plan is not None:
            make_plan(plan.checkpoint, step.config, None)
        elif _is_first(step, plan):
            check_keep_params(plan.checkpoint, step.config)
        config_after(plan.config_now, plan.family, step.config)

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The sizes of the candidates, and the time of the search."""
        from regrow.stages.prune.dry_run import estimate, parameters_after

        if _is_first(step, plan):
            length = plan.data.sequence_length
            tokens = plan.calibration_sequences * length
            return estimate(plan.checkpoint, step.config, length, tokens or None)
        after = parameters_after(plan.checkpoint, step.config, plan.parameters)
        return [f"prune: {plan.parameters:,} parameters then; to about {after:,}"]

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record the smaller number of parameters, and of tokens if the vocabulary is cut."""
        from regrow.search.score import sequences_for
        from regrow.search.shapes import check_keep_params, to_try
        from regrow.stages.prune.dry_run import config_after, parameters_after

        if _is_first(step, plan):
            tried = to_try(step.config, check_keep_params(plan.checkpoint, step.config))
            plan.calibration_to_choose = sequences_for(tried) if tried else 0
        plan.parameters = parameters_after(plan.checkpoint, step.config, plan.parameters)
        plan.config_now = config_after(plan.config_now, plan.family, step.config)
        plan.left[BEFORE_PRUNE] = step.location
        plan.left.setdefault(BEFORE_FIRST_PRUNE, step.location)
        plan.fewer_tokens = plan.fewer_tokens or step.config.vocab_size is not None

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Cut with and without repair into two folders, so that the gain of repair is measured.

        If the repair does not help, it is not applied, and there is only one folder.
        """
        from regrow import stage_dir
        from regrow.plan import FILE
        from regrow.runtime import distributed
        from regrow.stages.prune.stage import prune

        config, parent = step.config, run.current
        run.left[BEFORE_PRUNE] = str(parent)
        run.left.setdefault(BEFORE_FIRST_PRUNE, str(parent))
        assert run.profile is not None
        given = (run.profile, run.data, run.options)
        if not config.repair:
            prune(parent, run.folder(folder), config, *given)
            run.add("pruned", run.folder(folder))
            return
        repaired = run.folder(folder + "-repaired")
        prune(parent, repaired, config, *given)
        plain = PruneConfig(plan=str(repaired / FILE), repair=False)
        prune(parent, run.folder(folder), plain, run.profile)
        run.add("pruned", run.folder(folder))
        if distributed.from_first(lambda: (stage_dir.read(repaired) or {}).get("repair")):
            run.add("repaired", repaired)


def _check_criteria(config: PruneConfig, measured: Collection[str]) -> None:
    """Raise UserError if explicit sizes need a criterion that the profile does not compute."""
    from regrow.pruning.choose import VOCAB_CRITERION

    named = {"layers": config.layer_criterion, "vocab": VOCAB_CRITERION}
    named["experts"] = config.expert_criterion or config.criterion
    for dim in config.sizes():
        criterion = named.get(dim, config.criterion)
        if criterion not in measured:
            raise UserError(
                f"{SIZES[dim]} is chosen by {criterion}, which the profile before it does not "
                f"compute ({', '.join(measured)}): add it to the criteria of the profile"
            )


def _is_first(step: Step, plan: RecipePlan) -> bool:
    """Whether this is the recipe's first prune; only then are the model's sizes known."""
    return next(each for each in plan.steps if each.name == "prune") is step


STAGE = PruneStage()
