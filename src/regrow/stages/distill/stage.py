"""The distill stage: a student, its teacher and text in, a better student out."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import torch
from transformers import TrainingArguments

from regrow import checkpoint as checkpoints
from regrow import families, plugins, ranks
from regrow.checkpoint import Checkpoint, load
from regrow.data import DataConfig, build_blocks
from regrow.data.digest import data_digest
from regrow.errors import UserError
from regrow.manifest import Figure, Stage, refuse_input, require_space
from regrow.options import Options
from regrow.plan import Plan
from regrow.progress import progress, say
from regrow.quantization.schemes import Scheme, find
from regrow.stages.distill.config import DistillConfig
from regrow.stages.distill.resume import (
    METRICS,
    TRAINER,
    adopt_finished,
    last_checkpoint,
    rescue,
)
from regrow.stages.distill.student import Student, open_student
from regrow.training.fake_quantize import bind_rounding
from regrow.training.head import Mix
from regrow.training.signals.hidden import Hidden, LayerMap
from regrow.training.teacher import Teacher
from regrow.training.tokens import teacher_ids
from regrow.training.trainer import DistillTrainer, Journal, Pace, bind_loss

CARRIED = ("plan.json", "plan-from-first.json")


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
    are some of the teacher's is taught on its own tokens, over which the teacher's distribution is
    renormalised.
    bf16 compute over float32 master weights; the checkpoint with the lowest held-out KL is kept.
    Metrics go to `metrics.jsonl` in the folder and, if given, to `journal` as well.
    An interrupted run goes on from its last checkpoint, a raised `tokens` extends a finished one.
    Raises UserError for tokenizers that differ, too little text, a loss that is no number.
    """
    out, config, options = Path(out), config or DistillConfig(), options or Options()
    device = options.torch_device()
    master = teacher if isinstance(teacher, Checkpoint) else load(teacher)
    pupil = open_student(student, master)
    refuse_input(out, pupil.like.folder, master.folder)
    ids_V = teacher_ids(pupil.like, master)
    inputs = {
        "student": pupil.fingerprint,
        "teacher": master.fingerprint,
        "data": data_digest(data),
    }
    stage = _stage(out, config, inputs)
    if stage.complete:
        say(f"distill: {out} is complete and unchanged")
        return out
    signal = _signal(pupil, master, config.hidden_weight)
    rounding = _rounding(pupil, config.fake_quantize)
    written = pupil.dtype if rounding is None else torch.float32
    steps, micro, accumulation = steps_of(config, data, options)
    # Weights and optimizer of the best, the last and the next checkpoint, and the result.
    require_space(out, pupil.parameters * (3 * 12 + written.itemsize))
    tokenizer = (master if ids_V is None else pupil.like).tokenizer()
    heldout = build_blocks(data, tokenizer, "heldout", config.heldout_blocks)
    count = steps * config.batch_tokens // data.sequence_length
    blocks = build_blocks(data, tokenizer, "train", count)
    ranks.join(cpu=device.type == "cpu")
    with stage as folder:
        if ranks.is_main():
            adopt_finished(out, folder, stage, config)
        ranks.wait()
        model = pupil.model(config.seed)
        if device.index is not None:
            torch.cuda.set_device(device)  # the trainer takes the current one
        taught_by = Teacher(master.model(torch.bfloat16, device), ids_V)
        arguments = _arguments(folder, config, device, steps, micro, accumulation)
        trainer = DistillTrainer(
            model=model, args=arguments, train_dataset=blocks, eval_dataset=heldout
        )
        undo = bind_loss(model, taught_by, Mix(config.loss_weights(), config.temperature), signal)
        unround = bind_rounding(model, rounding) if rounding is not None else lambda: None
        _train(trainer, folder, stage, pupil, steps, journal)
        unround()
        undo()
        if ranks.is_main():
            _write(trainer, pupil, folder, written)
        stage.figures += _figures(trainer, steps * config.batch_tokens)
    return out


def _signal(pupil: Student, master: Checkpoint, weight: float) -> Hidden | None:
    """The hidden-state signal, by the plan that the student was cut by."""
    if weight == 0:
        return None
    for path in filter(None, map(pupil.carried, CARRIED)):
        plan = Plan.read(path)
        if plan.fingerprint == master.fingerprint:
            return Hidden(weight, LayerMap.of(plan))
    raise UserError(
        "hidden_weight compares layers of the student with the teacher's, and needs the plan.json "
        f"of a student that was cut from {master.folder}: set it to 0, or give that student"
    )


def _rounding(pupil: Student, name: str | None) -> Scheme | None:
    """The scheme to train for; raises UserError for experts, which are no linear layers."""
    if name is None:
        return None
    model_type = (pupil.config.to_dict() if pupil.config else pupil.like.config)["model_type"]
    known = model_type in plugins.names(families.__name__)
    if known and "experts" in families.get(model_type).config_keys:
        raise UserError(f"fake_quantize {name}: not for a mixture of experts ({model_type})")
    return find(name)


def steps_of(config: DistillConfig, data: DataConfig, options: Options) -> tuple[int, int, int]:
    """Optimizer steps of the budget, blocks per micro-batch, and micro-batches per step and device.

    A micro-batch has at most `options.batch_size` blocks. Raises UserError when batch_tokens cannot
    be made of whole blocks on every device.
    """
    devices = ranks.world_size()
    unit = data.sequence_length * devices
    if config.batch_tokens % unit:
        raise UserError(
            f"batch_tokens {config.batch_tokens} is no multiple of {unit} (sequence_length "
            f"{data.sequence_length} × {devices} devices); change one of them"
        )
    blocks = config.batch_tokens // unit
    micro = max(n for n in range(1, min(options.batch_size, blocks) + 1) if blocks % n == 0)
    return max(1, round(config.tokens / config.batch_tokens)), micro, blocks // micro


def _stage(out: Path, config: DistillConfig, inputs: dict[str, str]) -> Stage:
    # Without the budget, so that a run with a raised one is known as the same run, extended.
    same_run = config.model_copy(update={"tokens": 1})
    resume = Stage(out, "distill", same_run, inputs).digest
    return Stage(out, "distill", config, inputs, resumable=True, resume_digest=resume)


def _arguments(
    folder: Path,
    config: DistillConfig,
    device: torch.device,
    steps: int,
    micro: int,
    accumulation: int,
) -> TrainingArguments:
    every = max(1, min(steps, round(config.eval_tokens / config.batch_tokens)))
    arguments = TrainingArguments(
        output_dir=str(folder / TRAINER),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_learning_rate_ratio},
        warmup_steps=max(1, round(config.warmup_ratio * steps)),
        weight_decay=config.weight_decay,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=device.type == "cpu",
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best and the last; with 1 Trainer drops the last when it ends
        load_best_model_at_end=True,
        metric_for_best_model="eval_forward_kl",
        greater_is_better=False,
        report_to=_trackers(folder),
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        average_tokens_across_devices=True,
        ignore_data_skip=False,
        disable_tqdm=True,
        seed=config.seed,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # without torchrun: DataParallel would multiply batch_tokens
    return arguments


def _trackers(folder: Path) -> list[str]:
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        return []
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return ["tensorboard"]


def _train(
    trainer: DistillTrainer,
    folder: Path,
    stage: Stage,
    pupil: Student,
    steps: int,
    journal: Path | None,
) -> None:
    from transformers.trainer_callback import PrinterCallback

    config, out = stage.config, stage.out
    assert isinstance(config, DistillConfig)
    (folder / TRAINER).mkdir(exist_ok=True)
    last = last_checkpoint(folder / TRAINER)
    ranks.wait()
    trainer.args.eval_on_start = last is None  # a run that goes on has that row
    if last is not None:
        say(f"distill: goes on from {last.name}")
    trainer.remove_callback(PrinterCallback)
    with progress("distill", steps * config.batch_tokens) as counter:
        paths = (folder / METRICS,) if journal is None else (folder / METRICS, journal)
        trainer.add_callback(Journal(paths, out.name, config.batch_tokens))
        trainer.add_callback(Pace(config.batch_tokens, counter))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*pin_memory.*")
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except UserError as error:
            raise UserError(
                f"{error}; {rescue(folder / TRAINER, out, pupil.like)}; lower the learning rate"
            ) from None


def _write(trainer: DistillTrainer, pupil: Student, folder: Path, dtype: torch.dtype) -> None:
    """Write the best student, with what travels beside it."""
    model = trainer.student.to(dtype)  # type: ignore[arg-type]
    model.config.use_cache = True
    checkpoints.write_model(model, folder, pupil.like)
    for name in CARRIED:
        path = pupil.carried(name)
        if path is not None:
            shutil.copyfile(path, folder / name)


def _figures(trainer: DistillTrainer, tokens: int) -> list[Figure]:
    rows = [row for row in trainer.state.log_history if "eval_forward_kl" in row]
    convention = "KL(teacher || student) on held-out blocks, bf16"
    first = Figure(
        name="held-out KL before",
        value=rows[0]["eval_forward_kl"],
        unit="nats",
        convention=convention,
    )
    # Of the checkpoint that was kept: none is made at step 0, which is measured too.
    assert trainer.state.best_metric is not None
    best = Figure(
        name="held-out KL",
        value=trainer.state.best_metric,
        unit="nats",
        convention=convention,
    )
    return [first, best, Figure(name="training tokens", value=tokens, unit="tokens")]
