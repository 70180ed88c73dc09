"""Generate: a model answers prompts; its answers are training text for a distillation."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field
from tyro.conf import OmitArgPrefixes

from regrow.config import Config, Machine
from regrow.data.config import DataConfig
from regrow.errors import UserError
from regrow.stage import RecipePlan, RecipeRun, Stage, Step
from regrow.stages._flags import Model, OptionalText, open_model, print_lines
from regrow.stages._prompts import PromptFields, check_prompts, prompt_digests, prompts_of

if TYPE_CHECKING:
    from regrow.checkpoint import Checkpoint


class GenerateConfig(Config):
    """The selection of prompts, and the sampling of tokens."""

    limit: int | None = Field(default=None, ge=1)
    """The number of prompts to answer, from the first on; None answers all."""
    split: Literal["train", "calibration", "validation", "heldout", "all"] = "train"
    """The split of the prompts; train leaves out prompts whose rows are reserved for measuring."""
    max_new_tokens: int = Field(default=256, ge=1)
    """The maximum number of tokens in an answer."""
    keep_unfinished: bool = False
    """Also write answers that max_new_tokens cut off. A student then learns to stop in
    mid-sentence."""
    greedy: bool = False
    """Use the most likely token instead of drawing one."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The temperature, by which the logits are divided before a draw."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the smallest set of most likely tokens whose total probability reaches this."""
    seed: int = 0
    """Seed of the draws; the draws for a prompt do not depend on its batch."""
    chat_template: bool = True
    """Make a plain prompt from data a user's turn if the tokenizer has a chat template. Otherwise,
    and without this, the model continues the prompt, as in rows of `prompt` + `completion`."""
    self_prompts: int = Field(default=0, ge=0)
    """The number of prompts that MODEL writes itself, instead of reading them from data."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """What runs MODEL: transformers, or a vLLM server that is started for it. REGROW_VLLM_PYTHON
    names the Python that has vLLM, if this one has none."""
    endpoint: str | None = None
    """The address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1 (vLLM), whose
    answers replace those of MODEL. MODEL then only counts tokens and judges answers. batch_size
    prompts are asked at once."""
    served_model: str | None = None
    """The endpoint's name of its model; not needed if it has a single one."""
    api_key_variable: str = "OPENAI_API_KEY"
    """The environment variable with the endpoint's key, which is never written anywhere."""
    request_timeout: float = Field(default=120.0, gt=0, allow_inf_nan=False)
    """Seconds without any data after which a request has failed."""
    max_attempts: int = Field(default=6, ge=1)
    """Attempts for each prompt; the waits between them double, and follow Retry-After."""
    top_logprobs: int = Field(default=0, ge=0, le=20)
    """The number of most likely tokens to keep at each position of the answers, with their
    log-probabilities, in top_logprobs.jsonlines."""
    min_new_tokens: int = Field(default=1, ge=1)
    """Leave out answers with fewer tokens."""
    max_repetition: float | None = Field(default=None, ge=0, le=1)
    """Leave out answers in which a larger share of the runs of three words occurred before."""
    max_perplexity: float | None = Field(default=None, gt=1)
    """Leave out answers with a larger perplexity under MODEL."""
    languages: tuple[str, ...] = ()
    """Leave out answers in a language that is none of these (ISO 639 codes, such as en). An answer
    that is too short to tell is kept."""
    select: int | None = Field(default=None, ge=1)
    """The number of rows to write: those that differ most from each other."""
    licence: str | None = None
    """The licence of the answers, which is recorded; None reads it from the files of MODEL."""
    accept_licence: bool = False
    """Go on although the model's licence allows to train on its answers only models that are
    derived from it."""


class RecipeFields(PromptFields):
    """The fields that only a recipe has: the answering model and the prompts."""

    by: Literal["student", "teacher"] = "student"
    """The model that answers: the current model (student) or the teacher."""


class GenerateStage(Stage):
    """Generates answers of the current model or the teacher for later distillations."""

    config = GenerateConfig
    recipe_fields = RecipeFields
    takes_teacher = True
    ranks = "split"

    def command(
        self,
        model: Model,
        text: OmitArgPrefixes[OptionalText],
        out: Path,
        generation: OmitArgPrefixes[GenerateConfig] = GenerateConfig(),
        machine: OmitArgPrefixes[Machine] = Machine(),
        dry_run: bool = False,
    ) -> None:
        """Let a model answer prompts; its answers are training text for a distillation.

        Args:
            model: Hugging Face folder, hub id, GGUF file, or package:NAME; see also --endpoint.
            out: Folder to write answers.jsonl to; the folder can be given as --data.
            generation: Selection of prompts, and sampling of tokens.
            machine: Device and batch size, in prompts.
            dry_run: Check everything and print what would be done.
        """
        check(generation, bool(text.data))
        checkpoint = open_model(model, quantized=True)
        data = text.blend() if text.data else None
        if dry_run:
            print_lines(estimate(checkpoint, data, generation), out)
            return
        from regrow.stages.generate.stage import generate

        generate(checkpoint, data, out, generation, machine.options())

    def check(self, step: Step, plan: RecipePlan) -> None:
        """Raise UserError for prompts that cannot be read, and for a wrong endpoint or licence."""
        from regrow.stages.generate.stage import licence_for

        check(step.config, step.extra.prompts is not None or not step.config.self_prompts)
        licence_for(step.config, (step.teacher or plan.model) if step.extra.by == "teacher" else "")
        if not step.config.self_prompts:
            check_prompts(step, plan, "all")

    def leave(self, step: Step, plan: RecipePlan) -> None:
        """Record in the plan that answers of the teacher, or of the current model, exist."""
        from regrow.training.answer_targets import TOP_LOGPROBS

        by_teacher = step.extra.by == "teacher"
        plan.answers.add((step.teacher or plan.model) if by_teacher else "")
        if by_teacher:
            plan.left.pop(TOP_LOGPROBS, None)
            if step.config.top_logprobs:
                plan.left[TOP_LOGPROBS] = step.config.top_logprobs

    def run(self, step: Step, run: RecipeRun, folder: str) -> None:
        """Answer the prompts with the teacher or with the current model."""
        from regrow.stages.generate.stage import generate

        teacher = step.teacher or run.model
        model = teacher if step.extra.by == "teacher" else run.current
        data = None if step.config.self_prompts else prompts_of(step, run.data)
        answers = generate(model, data, run.folder(folder), step.config, run.options)
        if step.extra.by == "teacher":
            run.answers[teacher] = answers
        else:
            run.own_answers = answers

    def inputs(self, step: Step) -> Iterable[str]:
        """The hash of the prompts."""
        return prompt_digests(step)


def check(config: GenerateConfig, prompts: bool) -> None:
    """Raise UserError for fields that contradict each other, and for a wrong address."""
    if config.self_prompts and prompts:
        raise UserError("self_prompts and prompts from data: give one of them")
    if not config.self_prompts and not prompts:
        raise UserError("no prompts: give --data, or --self-prompts N to let the model write them")
    if config.languages:
        from regrow.stages.generate.language import check_languages

        check_languages(config.languages)
    if config.endpoint is None:
        if config.served_model is not None:
            raise UserError(f"served_model {config.served_model}: give the endpoint that serves it")
        if config.backend == "vllm":
            _check_vllm(config)
        return
    if config.backend == "vllm":
        raise UserError(
            "endpoint with backend vllm: give one of them; backend vllm starts a server for MODEL"
        )
    from regrow.stages.generate.endpoint import check_key_variable, check_url

    check_url(config.endpoint)
    check_key_variable(config.api_key_variable)
    if config.self_prompts:
        raise _self_prompts("endpoint")


def _check_vllm(config: GenerateConfig) -> None:
    from regrow.runtime import vllm_server

    if config.self_prompts:
        raise _self_prompts("backend vllm")
    vllm_server.check()


def _self_prompts(other: str) -> UserError:
    return UserError(
        f"self_prompts with {other}: let MODEL write the prompts first, in a command without "
        f"{other}, and give its folder as --data"
    )


def estimate(checkpoint: Checkpoint, data: DataConfig | None, config: GenerateConfig) -> list[str]:
    """The dry run: number of prompts, maximum number of answer tokens, and a minimum time."""
    from regrow.cost import forward_seconds
    from regrow.runtime.progress import clock
    from regrow.stages.generate.stage import ask, licence_for

    licence_for(config, str(checkpoint.folder))
    if data is None:
        count, read = config.self_prompts, 0
    else:
        asked = ask(data, config, checkpoint, checkpoint.tokenizer())
        count, read = len(asked), sum(len(ids) for _, ids in asked)
    most = count * config.max_new_tokens
    first = f"generate: {count:,} prompts of {read:,} tokens, at most {most:,} tokens of answers"
    if config.endpoint is not None:
        return [first, f"  from {config.endpoint}, which was not asked"]
    if config.backend == "vllm":
        return [first, "  from a vLLM server, which was not started"]
    seconds = forward_seconds(checkpoint, read + most)
    return [
        first,
        f"  time at best {clock(seconds)} if all are as long; small batches take many times that",
    ]


STAGE = GenerateStage()
