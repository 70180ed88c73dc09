"""The progress display and metrics file of a training run, and mean losses per scored token."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from regrow.runtime.progress import Progress

TOKENS = "tokens"
COUNT_PREFIX = "tokens of "
"""Prefix of a loss's own token count, for a loss that only some tokens have."""


class MetricSums:
    """Sums by name, for means: each is divided by `tokens of NAME` if present, else by `tokens`."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, row: Mapping[str, Tensor]) -> None:
        """Add the sums of a micro-batch, which include `tokens`."""
        for name, value in row.items():
            so_far = self.sums.get(name, torch.zeros((), device=value.device))
            self.sums[name] = so_far + value.detach()

    def means(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The mean of each sum, by name; resets the sums to 0.

        `reduce` sums a tensor over the ranks. A name without scored tokens is left out.
        """
        sums, self.sums = self.sums, {}
        if not sums:
            return {}
        totals = reduce(torch.stack([value.double() for value in sums.values()])).tolist()
        by_name = dict(zip(sums, totals, strict=True))
        tokens = by_name.pop(TOKENS)
        own = {
            name.removeprefix(COUNT_PREFIX): n
            for name, n in by_name.items()
            if name.startswith(COUNT_PREFIX)
        }
        counts = {
            name: own.get(name, tokens) for name in by_name if not name.startswith(COUNT_PREFIX)
        }
        return {name: by_name[name] / count for name, count in counts.items() if count}


CHOSEN_BY = "forward_kl"
"""The loss whose mean on the validation sequences chooses the best checkpoint."""
SPAN_CHOSEN_BY = f"span_{CHOSEN_BY}"
"""The loss that chooses the best checkpoint if the teacher has another tokenizer."""
HELDOUT = {f"eval_{CHOSEN_BY}": "heldout_kl", f"eval_{SPAN_CHOSEN_BY}": "heldout_span_kl"}
"""Names in metrics.jsonl by logged name; any other eval_x becomes heldout_x."""


class ProgressCallback(TrainerCallback):
    """Shows tokens/s and remaining time; requests evaluation and checkpoint at the last step."""

    def __init__(self, tokens_per_step: int, progress: Progress) -> None:
        self.tokens_per_step, self.progress, self.note = tokens_per_step, progress, ""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the display at the last step of an earlier process.

        A run with a larger budget measures less often, and Trainer would keep the old interval.
        """
        state.eval_steps, state.save_steps = int(args.eval_steps or 0), int(args.save_steps)
        self.progress.resume_at(state.global_step * self.tokens_per_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step's tokens."""
        if state.is_world_process_zero:
            self.progress.advance(self.tokens_per_step, self.note)
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the latest losses, which the progress line shows."""
        for key, name in (
            ("loss", "loss"),
            (f"eval_{CHOSEN_BY}", "held-out KL"),
            (f"eval_{SPAN_CHOSEN_BY}", "held-out span KL"),
            ("eval_cross_entropy", "held-out cross-entropy"),
        ):
            if logs and key in logs and key in ("loss", args.metric_for_best_model):
                self.note = f"{name} {logs[key]:.3f}"


class MetricsWriter(TrainerCallback):
    """Writes the metrics.jsonl of the stage and of the run: one JSON object per logged step."""

    def __init__(self, paths: tuple[Path, ...], stage: str, tokens_per_step: int) -> None:
        self.paths, self.stage, self.tokens_per_step = paths, stage, tokens_per_step
        self.start = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """After a killed run, drop the rows of steps that will be repeated."""
        if state.is_world_process_zero:
            # A run that starts from the beginning also writes the row of step 0 again.
            for path in self.paths:
                _drop_later_rows(path, self.stage, state.global_step or -1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Append {stage, step, tokens, seconds in this process, and each value by name}."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if not state.is_world_process_zero or "train_runtime" in numbers:
            return
        row = {
            "stage": self.stage,
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "seconds": round(time.monotonic() - self.start, 2),
            **{_row_name(name): value for name, value in numbers.items()},
        }
        for path in self.paths:
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")


def _row_name(logged: str) -> str:
    """The name in metrics.jsonl of a logged value."""
    name = logged.removeprefix("eval_")
    return logged if name == logged else HELDOUT.get(logged, f"heldout_{name}")


def _drop_later_rows(path: Path, stage: str, step: int) -> None:
    """Remove the stage's rows after `step`, and an incomplete last line of a killed run."""
    if not path.exists():
        return
    rows = [line for line in path.read_text().splitlines() if line.endswith("}")]
    kept = [r for r in rows if json.loads(r)["stage"] != stage or json.loads(r)["step"] <= step]
    path.write_text("".join(row + "\n" for row in kept))
