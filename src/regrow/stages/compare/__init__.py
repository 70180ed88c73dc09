"""Compare importance criteria: make the same cut by each, and score the result untrained."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import OmitArgPrefixes

from regrow.config import Machine
from regrow.pruning.config import PruneConfig
from regrow.stage import Stage
from regrow.stages._flags import Model, Text, open_model, print_lines


class CompareStage(Stage):
    """A command (not a recipe step) that prints a table for choosing a criterion."""

    config = PruneConfig
    in_recipes = False
    ranks = "split"
    uses = ("profile", "prune")

    def command(
        self,
        model: Model,
        profile: Path,
        text: OmitArgPrefixes[Text],
        pruning: OmitArgPrefixes[PruneConfig] = PruneConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        out: Path | None = None,
        rounds: int = 1,
        heads: int = 0,
        dry_run: bool = False,
    ) -> None:
        """Make the same cut by every criterion of a profile, and print the KL of each, untrained.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME.
            profile: Folder that regrow profile wrote for this model.
            pruning: Target of the cut; its criterion is the one for `rounds`.
            machine: Device and batch size.
            out: JSON file to write the table to.
            rounds: Also prune in this many rounds, with importance re-estimated in each.
            heads: Also remove one query head: the least important, and this many at random.
            dry_run: Check everything and print what would be done.
        """
        checkpoint, data = open_model(model), text.blend()
        from regrow.stages.compare.stage import compare, estimate, output_of

        if dry_run:
            if out is not None:
                output_of(out)
            print_lines(estimate(checkpoint, profile, data, pruning, rounds, heads))
            return
        compare(checkpoint, profile, data, pruning, out, machine.options(), rounds, heads)


STAGE = CompareStage()
