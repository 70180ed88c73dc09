"""The distill stage: reads a student, its teacher and text, and writes a better student.

It continues from the last complete checkpoint, or from a finished run with a smaller token budget.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from regrow import stage_dir
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.checkpoint.carried import carry
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.plan import copy_plans
from regrow.quantization.fake_quantize import bind_rounding
from regrow.runtime import distributed
from regrow.runtime.memory import is_out_of_memory
from regrow.runtime.progress import progress, say
from regrow.sparsity import zeros
from regrow.stage_dir import Figure, StageDir, refuse_input, require_space
from regrow.stages.distill.config import LAST, DistillConfig
from regrow.stages.distill.domains import Domains, check_domains
from regrow.stages.distill.on_policy import check_on_policy, writer_of
from regrow.stages.distill.preflight import advice
from regrow.stages.distill.setup import TRAINER, DistillSetup, arguments_of
from regrow.stages.distill.student import Student, compile_layers, open_student
from regrow.stages.distill.teacher import (
    TeacherSetup,
    freeze,
    live_models,
    mass_lost,
    show_attentions,
)
from regrow.stages.distill.text import answer_digests, training_text
from regrow.training import adapters, optimizers, sharding
from regrow.training.attention import set_attention
from regrow.training.callbacks import CHOSEN_BY, MetricsWriter, ProgressCallback
from regrow.training.checkpoints import last_checkpoint
from regrow.training.dynamic_blend import BlendedSequences
from regrow.training.frozen_layers import decoder_layers
from regrow.training.load_once import load_once
from regrow.training.objective import bind_loss
from regrow.training.on_policy import NumberedSequences
from regrow.training.rates import FIXED, has_random_weights, usual_rate
from regrow.training.trainer import DistillTrainer, NotFiniteError

ADAPTER = "adapter"
METRICS = "metrics.jsonl"
VALIDATION = "the validation split, which is neither trained on nor evaluated on"


def distill(
    student: str | Path | Checkpoint,
    teacher: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: DistillConfig | None = None,
    options: Options | None = None,
    metrics: Path | None = None,
) -> Path:
    """Train `student` towards `teacher` on the train split of `data`; write the best student.

    If `student` is a config.json, the model has random weights and the teacher's tokenizer. A
    student may have only some of the teacher's tokens, or differ from it in added tokens: the
    teacher's distribution is then renormalised over the tokens that both have. With
    `cross_tokenizer: spans` the two may have different tokenizers, and the probabilities of spans
    of text are compared.

    Computes in bfloat16 (or what `precision.half` says) with float32 weights. Keeps the checkpoint
    with the lowest held-out KL, or with the lowest held-out loss `chosen_by`, or the
    last one.
    Writes metrics to `metrics.jsonl` in the folder and also to `metrics`, if set. An interrupted
    run continues from its last checkpoint; a larger `tokens` extends a finished run. Raises
    UserError for different tokenizers, too little text, and a loss that becomes NaN or infinite.
    """
    out, config, options = Path(out), config or DistillConfig(), options or Options()
    device = options.torch_device()
    teacher = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    check_on_policy(config, data, options)
    check_domains(config, data, options)
    opened = open_student(student, teacher)
    given, config = config, _with_rate(config, opened)
    teachers = TeacherSetup.open(config, opened, teacher, options, training_text(data, config))
    refuse_input(out, opened.like.folder, *(each.folder for each in teachers.checkpoints))
    inputs = {
        "student": opened.fingerprint,
        "data": data_digest(data),
        **teachers.inputs,
        **answer_digests(config),
    }
    parent = opened.like if opened.config is None else None
    stage = _stage(out, config, inputs, parent, data, teachers.checkpoints)
    if stage.complete:
        say(f"distill: {out} is complete and unchanged")
        return out
    setup = DistillSetup.of(opened, teachers, data, config, options)
    require_space(out, setup.bytes())
    teachers.read_targets()
    domains = Domains.open(setup) if config.dynamic_blend else None
    train, heldout = (
        setup.sequences() if domains is None else (domains.train, domains.all_heldout())
    )
    with stage as folder:
        if given.learning_rate is None:
            say(f"distill: the peak learning rate is {config.learning_rate:g}")
        if distributed.is_main():
            adopt_finished(out, folder, stage, config)
        distributed.wait()
        if device.index is not None:
            torch.cuda.set_device(device)  # the trainer uses the current device
        try:
            _run(setup, stage, folder, train, heldout, device, metrics, domains)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise _too_little_memory(setup, folder) from None
    return out


def _too_little_memory(setup: DistillSetup, folder: Path) -> UserError:
    """The error of a run that needed more memory than there is, with settings that need less."""
    last = last_checkpoint(folder / TRAINER) if (folder / TRAINER).exists() else None
    configs = [each.config for each in setup.teachers.checkpoints]
    less = advice(setup.student.fields, configs, setup.config, setup.data, setup.options)
    again = "starts again" if last is None else f"continues from {last.name}"
    return UserError(
        f"memory ran out: {less}; the same command then {again}. --dry-run shows further settings"
    )


def _with_rate(config: DistillConfig, student: Student) -> DistillConfig:
    """The config with a learning rate, if it has none."""
    if config.learning_rate is not None:
        return config
    new = student.config is not None or has_random_weights(student.like)
    rate = FIXED if new or config.adapter != "none" else usual_rate(student.like)
    return config.model_copy(update={"learning_rate": rate})


def _stage(
    out: Path,
    config: DistillConfig,
    inputs: dict[str, str],
    parent: Checkpoint | None,
    data: DataConfig,
    teachers: Iterable[Checkpoint],
) -> StageDir:
    # The digest for resuming leaves out the budget, so that a larger one extends the same run.
    # `inputs` has the digests of cache, answers and prompts, so the names of these do not matter.
    names = ("cache", "answers", "own_answers", "on_policy_prompts")
    config = config.model_copy(update=dict.fromkeys(names))
    same_run = config.model_copy(update={"tokens": 1})
    resume = StageDir(out, "distill", same_run, inputs).digest
    return ModelDir(out, "distill", config, inputs, parent, data, tuple(teachers), True, resume)


def _run(
    setup: DistillSetup,
    stage: StageDir,
    folder: Path,
    train: Sequences | BlendedSequences,
    heldout: Sequences,
    device: torch.device,
    metrics: Path | None,
    domains: Domains | None = None,
) -> None:
    """Train the student, then write the checkpoint to keep and the figures."""
    teachers, config, budget = setup.teachers, setup.config, setup.budget
    loss_weights, feature_losses = setup.loss_weights, setup.feature_losses
    dtype = optimizers.KINDS[config.optimizer].dtype
    model = _student(setup, device, dtype)
    keep_zeros(setup, model, stage)
    teacher_model = teachers.model(config, device, setup.placement)
    lost = mass_lost(teacher_model, heldout, budget.micro)
    show_attentions(model, teacher_model, feature_losses)
    if setup.options.attention != "sdpa":
        set_attention(model, setup.options.attention, check=not setup.sharded)
        for each in live_models(teacher_model):
            set_attention(each, setup.options.attention)
    shared = freeze(model, teacher_model, config, loss_weights, feature_losses, setup.placement)
    if setup.options.torch_compile:
        compile_layers(
            model, teacher_model, setup.placement, 0 if shared is None else config.freeze_layers
        )
    dataset: Sequences | BlendedSequences | NumberedSequences = train
    writer = None
    if isinstance(train, Sequences):
        writer = writer_of(setup, model, train)
        dataset = train if writer is None else NumberedSequences(train)
    blend = None if domains is None else domains.trained(teacher_model, budget.micro)
    trainer = DistillTrainer(
        model=model,
        args=arguments_of(folder, config, setup.options, device, budget, setup.chosen_by),
        train_dataset=dataset,
        eval_dataset=heldout,
        feature_losses=feature_losses,
        writer=writer,
        blend=blend,
        attention_rate=config.attention_rate,
        embedding_rate=config.embedding_rate,
        save_seconds=60 * setup.options.save_minutes,
    )
    with ExitStack() as bound:
        if shared is not None:
            bound.callback(shared.close)
        losses = (loss_weights, feature_losses, setup.measured)
        bound.callback(bind_loss(model, teacher_model, *losses))
        if setup.scheme is not None:
            bound.callback(bind_rounding(model, setup.scheme))
        _train(trainer, setup, stage.out, folder, metrics)
    if distributed.is_main():
        _write(trainer, setup, folder)
    stage.figures += _figures(trainer, config, budget.steps) + lost


def _student(setup: DistillSetup, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The student before training; only process 0 has its weights if they will be sharded."""
    student, adapter = setup.student, setup.adapter
    load = partial(student.model, setup.config.seed, adapter, device, dtype)
    return load_once(load, partial(student.skeleton, adapter)) if setup.sharded else load()


def keep_zeros(setup: DistillSetup, model: PreTrainedModel, stage: StageDir) -> None:
    """Hold the zeros of a sparse student, or warn that they will be filled."""
    sparsity = setup.student.sparsity
    if sparsity is None:
        return
    if not setup.config.keep_zeros:
        say(
            f"distill: keep_zeros is off: training fills the zeros of this sparse student "
            f"({sparsity}), and the result is dense"
        )
        stage.extra[zeros.NOTE] = None
        return
    zeros.keep("distill", decoder_layers(model), setup.student.like)
    stage.extra[zeros.NOTE] = sparsity


def _train(
    trainer: DistillTrainer, setup: DistillSetup, out: Path, folder: Path, metrics: Path | None
) -> None:
    from transformers.trainer_callback import PrinterCallback

    batch_tokens = setup.config.batch_tokens
    (folder / TRAINER).mkdir(exist_ok=True)
    last = last_checkpoint(folder / TRAINER)
    distributed.wait()
    trainer.args.eval_on_start = last is None  # a continued run already has that row
    if last is not None:
        sharding.require_same(last, trainer.is_fsdp_enabled)
        say(f"distill: continues from {last.name}")
    trainer.remove_callback(PrinterCallback)
    with progress("distill", setup.budget.steps * batch_tokens) as counter:
        paths = (folder / METRICS,) if metrics is None else (folder / METRICS, metrics)
        trainer.add_callback(MetricsWriter(paths, out.name, batch_tokens))
        trainer.add_callback(ProgressCallback(batch_tokens, counter))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except RuntimeError as error:  # gloo and NCCL raise this with different messages
            if not distributed.lost_peer(error):
                raise
            last = last_checkpoint(folder / TRAINER)
            raise UserError(
                "another process of this job has ended: run the same command again, it continues "
                f"from {'the start' if last is None else last.name}"
            ) from None
        except NotFiniteError as error:
            gathers = trainer.is_fsdp_enabled and setup.adapter is None
            finish = partial(_gather, setup) if gathers else None
            saved = rescue(folder / TRAINER, out, setup.student.like, finish)
            raise UserError(f"{error}; {saved}; lower the learning rate") from None


def _write(trainer: DistillTrainer, setup: DistillSetup, folder: Path) -> None:
    """Write the student to keep, its adapters if they are kept, and its plan files."""
    student, dtype = setup.student, setup.dtype
    dtypes = student.dtypes() if setup.scheme is None else {}
    trained = trainer.student
    if trainer.is_fsdp_enabled:
        trained = _whole(setup, folder / TRAINER / f"checkpoint-{_kept_step(trainer)}")
    if setup.config.keep_adapters and setup.adapter is not None:
        trained.save_pretrained(str(folder / ADAPTER))
    model = student.plain(trained, dtype, dtypes)
    model.config.use_cache = True
    checkpoints.write_model(model, folder, student.like, whole=student.config is None)
    if student.cut is not None:
        copy_plans(student.cut, folder)


def _whole(setup: DistillSetup, checkpoint: Path) -> PreTrainedModel:
    """The student of a sharded run's checkpoint, on the CPU; for one process."""
    dtype = optimizers.KINDS[setup.config.optimizer].dtype
    trained = setup.student.model(setup.config.seed, setup.adapter, dtype=dtype)
    if setup.adapter is None:
        sharding.load_shards(trained, checkpoint)
    else:
        adapters.load_adapter(trained, checkpoint)
    return trained


def _gather(setup: DistillSetup, checkpoint: Path) -> None:
    """Make a stock model of a checkpoint of shards, which stay beside it."""
    _whole(setup, checkpoint).save_pretrained(str(checkpoint))


def _kept_step(trainer: DistillTrainer) -> int:
    """The step of the checkpoint that is kept."""
    if not trainer.args.load_best_model_at_end:
        return int(trainer.state.global_step)
    assert trainer.state.best_global_step is not None
    return int(trainer.state.best_global_step)


def _figures(trainer: DistillTrainer, config: DistillConfig, steps: int) -> list[Figure]:
    metric = trainer.args.metric_for_best_model
    assert metric is not None
    rows = [row for row in trainer.state.log_history if metric in row]
    dtype = "bf16" if trainer.args.bf16 else "float32"
    name = "held-out KL"
    convention = f"KL(teacher || student) on {VALIDATION}, {dtype}, exact logits"
    if metric == "eval_cross_entropy":
        name = "held-out cross-entropy"
        convention = f"per scored token of {VALIDATION}, {dtype}"
    elif metric != f"eval_{CHOSEN_BY}":
        name = "held-out span KL"
        convention = (
            "τ · KL of the probabilities of spans to the power 1/τ, per scored token, on "
            f"{VALIDATION}"
        )
    first = Figure(name=f"{name} before", value=rows[0][metric], unit="nats", convention=convention)
    step = _kept_step(trainer)  # step 0 is also measured but has no checkpoint
    kept = next(row[metric] for row in reversed(rows) if row["step"] == step)
    _tell(name, rows[0][metric], kept, (step, steps), config)
    return [
        first,
        Figure(name=name, value=kept, unit="nats", convention=convention),
        Figure(name="training tokens", value=steps * config.batch_tokens, unit="tokens"),
        Figure(
            name="training tokens of the kept student",
            value=step * config.batch_tokens,
            unit="tokens",
        ),
    ]


def _tell(
    name: str, before: float, kept: float, steps: tuple[int, int], config: DistillConfig
) -> None:
    """Say which student is kept, and whether the training brought it nearer to its aim."""
    step, last = (each * config.batch_tokens for each in steps)
    say(f"distill: {name} {before:.3f} before, {kept:.3f} in the student that is kept")
    if step < last:
        taught = "" if set(config.losses) - {"cross_entropy"} else "; --chosen-by last keeps these"
        say(
            f"distill: that is the one after {step:,} of {last:,} tokens; later ones have a higher "
            f"{name}{taught}"
        )
    if kept > before and config.chosen_by != LAST:
        say(f"distill: the {name} was lower before the training: try a lower learning rate")


def adopt_finished(out: Path, folder: Path, stage: StageDir, config: DistillConfig) -> None:
    """Link the trainer's state of a finished run with a smaller budget, to extend that run."""
    manifest = stage_dir.read(out)
    if manifest is None or manifest.get("resume_digest") != stage.resume_digest:
        return
    tokens = manifest["config"]["tokens"]
    if (folder / TRAINER).exists() or tokens > config.tokens:
        return
    say(f"distill: extends a run of {tokens:,} tokens")
    partial = folder / f"{TRAINER}.partial"  # a killed run must not leave an incomplete folder
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(out / TRAINER, partial, copy_function=stage_dir.link)
    shutil.copyfile(out / METRICS, folder / METRICS)
    partial.rename(folder / TRAINER)


def rescue(
    trainer: Path, out: Path, like: Checkpoint, finish: Callable[[Path], None] | None = None
) -> str:
    """Move the last checkpoint of a failed run beside `out`, and return a message about it.

    All ranks call it: rank 0 moves the folder after all of them have looked for it, and calls
    `finish` with its new path.
    """
    last = last_checkpoint(trainer)
    distributed.wait()
    if last is None:
        return "no checkpoint had been written yet, and the student is unchanged"
    stopped = out.parent / f"{out.name}-stopped"
    if distributed.is_main():
        shutil.rmtree(stopped, ignore_errors=True)
        last.rename(stopped)
        carry(like.folder, stopped)
        if finish is not None:
            finish(stopped)
    distributed.wait()
    return f"the last good checkpoint ({last.name}) is kept in {stopped}"
