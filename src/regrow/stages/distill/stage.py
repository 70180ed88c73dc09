"""The distill stage: a student, its teacher and text in, a better student out.

It goes on from the last whole checkpoint, or from a finished run with a smaller token budget.
"""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch

from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import Sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.plan import FILES
from regrow.quantization.fake_quantize import bind_rounding
from regrow.runtime import distributed
from regrow.runtime.progress import progress, say
from regrow.stage_dir import Figure, StageDir, refuse_input, require_space
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.resume import METRICS, TRAINER, adopt_finished, last_checkpoint, rescue
from regrow.stages.distill.setup import DistillSetup, arguments_of
from regrow.stages.distill.student import compile_layers, open_student
from regrow.stages.distill.teacher import TeacherSetup, freeze, mass_lost, show_attentions
from regrow.stages.distill.text import answer_digests, loss_weights_of, training_text
from regrow.training import sharding
from regrow.training.callbacks import CHOSEN_BY, MetricsWriter, ProgressCallback
from regrow.training.objective import bind_loss
from regrow.training.trainer import DistillTrainer

ADAPTER = "adapter"


def distill(
    student: str | Path | Checkpoint,
    teacher: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: DistillConfig | None = None,
    options: Options | None = None,
    journal: Path | None = None,
) -> Path:
    """Train `student` towards `teacher` on the train split of `data`; write the best student.

    A student given as a config.json is made fresh, with the teacher's tokenizer. One whose tokens
    are some of the teacher's, or differ in added tokens alone, is taught on its own tokens; the
    teacher's distribution is renormalised over those that both have. With `cross_tokenizer: spans`
    a teacher of another tokenizer teaches by the probabilities of spans of text.
    bf16 compute over float32 master weights; the checkpoint with the lowest held-out KL is kept.
    Metrics go to `metrics.jsonl` in the folder and, if given, to `journal` as well.
    An interrupted run goes on from its last checkpoint, a raised `tokens` extends a finished one.
    Raises UserError for tokenizers that differ, too little text, a loss that is no number.
    """
    out, config, options = Path(out), config or DistillConfig(), options or Options()
    device = options.torch_device()
    known = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    opened = open_student(student, known)
    text = training_text(data, config)
    loss_weights = loss_weights_of(config, text)
    teachers = TeacherSetup.open(config, opened, known, options, text)
    refuse_input(out, opened.like.folder, *(each.folder for each in teachers.checkpoints))
    inputs = {
        "student": opened.fingerprint,
        "data": data_digest(data),
        **teachers.inputs,
        **answer_digests(config),
    }
    stage = _stage(out, config, inputs)
    if stage.complete:
        say(f"distill: {out} is complete and unchanged")
        return out
    setup = DistillSetup.of(opened, teachers, loss_weights, data, config, options)
    require_space(out, setup.bytes())
    train, heldout = setup.sequences(data, text)
    distributed.join(cpu=device.type == "cpu")
    with stage as folder:
        if distributed.is_main():
            adopt_finished(out, folder, stage, config)
        distributed.wait()
        if device.index is not None:
            torch.cuda.set_device(device)  # the trainer takes the current one
        _teach(setup, stage, folder, train, heldout, device, journal)
    return out


def _stage(out: Path, config: DistillConfig, inputs: dict[str, str]) -> StageDir:
    # Without the budget, so that a run with a raised one is known as the same run, extended.
    # Cache and answers are among the inputs, by what is in them; where they lie does not matter.
    config = config.model_copy(update={"cache": None, "answers": None, "own_answers": None})
    same_run = config.model_copy(update={"tokens": 1})
    resume = StageDir(out, "distill", same_run, inputs).digest
    return StageDir(out, "distill", config, inputs, resumable=True, resume_digest=resume)


def _teach(
    setup: DistillSetup,
    stage: StageDir,
    folder: Path,
    train: Sequences,
    heldout: Sequences,
    device: torch.device,
    journal: Path | None,
) -> None:
    """Train the student as `setup` says; write the best one and the figures."""
    teachers, config, budget = setup.teachers, setup.config, setup.budget
    loss_weights, feature_losses = setup.loss_weights, setup.feature_losses
    model = setup.student.model(config.seed, setup.adapter, device)
    teacher_model = teachers.model(config, device, setup.placement)
    lost = mass_lost(teacher_model, heldout, budget.micro)
    show_attentions(model, teacher_model, feature_losses)
    shared = freeze(model, teacher_model, config, loss_weights, feature_losses, setup.placement)
    if setup.options.torch_compile:
        compile_layers(
            model, teacher_model, setup.placement, 0 if shared is None else config.freeze_layers
        )
    trainer = DistillTrainer(
        model=model,
        args=arguments_of(folder, config, setup.options, device, budget, teachers.chosen_by),
        train_dataset=train,
        eval_dataset=heldout,
        feature_losses=feature_losses,
    )
    with ExitStack() as bound:
        if shared is not None:
            bound.callback(shared.close)
        bound.callback(bind_loss(model, teacher_model, loss_weights, feature_losses))
        if setup.rounding is not None:
            bound.callback(bind_rounding(model, setup.rounding))
        _train(trainer, setup, stage.out, folder, journal)
    if distributed.is_main():
        _write(trainer, setup, folder)
    stage.figures += _figures(trainer, budget.steps * config.batch_tokens) + lost


def _train(
    trainer: DistillTrainer, setup: DistillSetup, out: Path, folder: Path, journal: Path | None
) -> None:
    from transformers.trainer_callback import PrinterCallback

    batch_tokens = setup.config.batch_tokens
    (folder / TRAINER).mkdir(exist_ok=True)
    last = last_checkpoint(folder / TRAINER)
    distributed.wait()
    trainer.args.eval_on_start = last is None  # a run that goes on has that row
    if last is not None:
        sharding.require_same(last, trainer.is_fsdp_enabled)
        say(f"distill: goes on from {last.name}")
    trainer.remove_callback(PrinterCallback)
    with progress("distill", setup.budget.steps * batch_tokens) as counter:
        paths = (folder / METRICS,) if journal is None else (folder / METRICS, journal)
        trainer.add_callback(MetricsWriter(paths, out.name, batch_tokens))
        trainer.add_callback(ProgressCallback(batch_tokens, counter))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except RuntimeError as error:  # what gloo and NCCL raise, each in its own words
            if not distributed.lost_peer(error):
                raise
            kept = last_checkpoint(folder / TRAINER)
            raise UserError(
                "another process of this job has ended: run the same command again, it goes on "
                f"from {'the start' if kept is None else kept.name}"
            ) from None
        except UserError as error:
            saved = rescue(folder / TRAINER, out, setup.student.like)
            raise UserError(f"{error}; {saved}; lower the learning rate") from None


def _write(trainer: DistillTrainer, setup: DistillSetup, folder: Path) -> None:
    """Write the best student, with what travels beside it."""
    student, dtype = setup.student, setup.dtype
    dtypes = student.dtypes() if setup.rounding is None else {}
    if setup.config.keep_adapters and setup.adapter is not None:
        trainer.student.save_pretrained(str(folder / ADAPTER))
    if trainer.is_fsdp_enabled:  # the best checkpoint is a stock folder, put together from shares
        assert trainer.state.best_model_checkpoint is not None
        best = Checkpoint(trainer.state.best_model_checkpoint)
        model = student.plain(best.model(torch.float32 if dtypes else dtype), dtype, dtypes)
    else:
        model = student.plain(trainer.student, dtype, dtypes)
    model.config.use_cache = True
    checkpoints.write_model(model, folder, student.like)
    for name in FILES:
        path = student.carried(name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def _figures(trainer: DistillTrainer, tokens: int) -> list[Figure]:
    metric = trainer.args.metric_for_best_model
    assert metric is not None
    rows = [row for row in trainer.state.log_history if metric in row]
    name, convention = "held-out KL", "KL(teacher || student) on held-out blocks, bf16"
    if metric != f"eval_{CHOSEN_BY}":
        name = "held-out span KL"
        convention = "of the probabilities of spans, to the power 1/τ, times τ, per scored token"
    first = Figure(name=f"{name} before", value=rows[0][metric], unit="nats", convention=convention)
    # Of the checkpoint that was kept: none is made at step 0, which is measured too.
    assert trainer.state.best_metric is not None
    best = Figure(
        name=name,
        value=trainer.state.best_metric,
        unit="nats",
        convention=convention,
    )
    return [first, best, Figure(name="training tokens", value=tokens, unit="tokens")]
