"""Prefer: train a student on pairs of its own answers, which its teacher ranks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import Field
from tyro.conf import OmitArgPrefixes, Positional

from regrow.config import Config, Machine
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Text, open_model, print_lines
from regrow.stages._prompts import PromptFields, check_prompts, prompt_digests, prompts_of


class PreferConfig(Config):
    """The answers that are compared, and the training on their pairs by DPO."""

    limit: int | None = Field(default=None, ge=1)
    """The number of prompts, from the first on; None takes all of the train split."""
    answers: int = Field(default=4, ge=2)
    """The student's answers to each prompt, of which the best and the worst make a pair."""
    max_new_tokens: int = Field(default=128, ge=1)
    """The maximum number of tokens in an answer; answers that it cuts off are not compared."""
    keep_unfinished: bool = False
    """Also compare answers that max_new_tokens cut off."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The temperature at which the student answers."""
    chat_template: bool = True
    """Make a plain prompt a user's turn if the tokenizer has a chat template. Otherwise, and
    without this, the student continues the prompt, as in rows of `prompt` + `completion`."""
    min_margin: float = Field(default=0.1, ge=0)
    """The least difference, in nats per token under the teacher, between the answers of a pair."""
    beta: float = Field(default=0.1, gt=0)
    """β of DPO: larger values keep the student nearer to what it was."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """Peak learning rate of AdamW, which then falls linearly to zero."""
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    batch_pairs: int = Field(default=8, ge=1)
    """Pairs per optimizer step."""
    epochs: int = Field(default=1, ge=1)
    """How often each pair is trained on."""
    save_pairs: int = Field(default=256, ge=1)
    """Pairs between two checkpoints, from which an interrupted run continues."""
    seed: int = 0
    """Seed of the draws and of the order of the pairs."""


class PreferStage(Stage):
    """Takes the current model and a teacher; leaves the model trained on its ranked answers."""

    config = PreferConfig
    takes_teacher = True
    changes_weights = True
    needs_plain_weights = True

    recipe_fields = PromptFields

    def command(  # type: ignore[override]
        self,
        student: Annotated[Positional[str], tyro.conf.arg(metavar="STUDENT")],
        teacher: str,
        text: OmitArgPrefixes[Text],
        out: Path,
        training: OmitArgPrefixes[PreferConfig] = PreferConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Train a student by DPO on pairs of its own answers, which its teacher ranks.

        Args:
            student: The model to train.
            teacher: The model that ranks the answers; it must have all tokens of the student.
            text: The prompts, in rows with `messages`, `prompt` or `question`.
            out: Folder to write the trained model to.
            training: Answers, and the training on their pairs.
            machine: Device and batch size.
            dry_run: Check everything and print what would be done.
        """
        require_trl()
        first, second = open_model(student), open_model(teacher)
        if dry_run:
            from regrow.stages.prefer.stage import ids_of_teacher, questions

            ids_of_teacher(first, second)
            count = len(questions(text.blend(), first, training))
            print_lines(estimate(count, training), out)
            return
        from regrow.stages.prefer.stage import prefer

        prefer(first, second, text.blend(), out, training, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError without trl, and for prompts that cannot be read."""
        require_trl()
        check_prompts(step, plan, "train")

    def dry_run(self, step: Step, plan: RecipePlan) -> list[str]:
        """The number of answers, if it is known."""
        return estimate(step.config.limit, step.config)

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Train the current model on its ranked answers."""
        from regrow.stages.prefer.stage import prefer

        data, teacher = prompts_of(step, run.data), step.teacher or run.model
        prefer(run.current, teacher, data, run.folder(folder), step.config, run.options)
        run.add("preferred", run.folder(folder))

    def inputs(self, step: Step) -> Iterable[str]:
        """The hash of the prompts."""
        return prompt_digests(step)


def estimate(prompts: int | None, config: PreferConfig) -> list[str]:
    """The dry run."""
    if prompts is None:
        return [f"prefer: {config.answers} answers to each prompt of the train split"]
    most = prompts * config.answers * config.max_new_tokens
    return [
        f"prefer: {prompts:,} prompts × {config.answers} answers, at most {most:,} tokens, and at "
        f"most {prompts:,} pairs"
    ]


def require_trl() -> None:
    """Raise UserError if trl is not installed."""
    from importlib.util import find_spec

    if find_spec("trl") is None:
        raise UserError("prefer needs trl: pip install 'regrow[prefer]' (Python 3.11 or later)")


STAGE = PreferStage()
