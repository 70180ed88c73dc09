"""The stages of a recipe, a file a stage, named as the recipe names it.

- `check(step, checkpoint, data, options)`: raises UserError, before any slow work, for what of its
  config cannot succeed.
- `run(job, step, name)`: the stage on what the job has come to, into the folder `name`.
- `estimate(…)`: what its command prints for --dry-run, where it has one.

What one stage asks of another that stands before it is in `regrow.checks`.
"""

from __future__ import annotations

from regrow.steps._step import CONFIGS, LATER, Step, fitted, parse_step, prompts_of

__all__ = ["CONFIGS", "LATER", "STEPS", "Step", "fitted", "parse_step", "prompts_of"]

STEPS = "regrow.steps"
"""The folder, for `plugins.load`."""
