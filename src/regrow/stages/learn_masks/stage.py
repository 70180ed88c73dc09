"""The learn_masks stage: a model and text in, scores of its units and the trained model out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.card import ModelDir
from regrow.checkpoint import Checkpoint, load
from regrow.checkpoint import checkpoint as checkpoints
from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.config import Split
from regrow.data.sequences import Sequences
from regrow.data.sources import data_digest
from regrow.errors import UserError
from regrow.plan import copy_plans
from regrow.profile_folder import INFO, SCORES, SEQUENCES
from regrow.runtime.precision import autocast, half, name_of
from regrow.runtime.progress import progress, say
from regrow.sparsity import zeros
from regrow.stage_dir import Figure, refuse_input, require_space, write_json
from regrow.stages.learn_masks import CRITERION, PROFILE, LearnMasksConfig
from regrow.training.loss_weights import LossWeights
from regrow.training.masks import Masks, masked
from regrow.training.model_check import check_model
from regrow.training.objective import bind_loss
from regrow.training.teacher import Teacher, place_teacher
from regrow.training.text import text_for

STATE = "state.pt"
FAR = 0.05
"""A shape is missed if an expected size is further from it than this share of the whole size."""
ADVICE = "set train_weights to false, or learn the masks before you sparsify"


def learn_masks(
    model: str | Path | Checkpoint,
    data: DataConfig,
    out: str | Path,
    config: LearnMasksConfig,
    options: Options | None = None,
) -> Path:
    """Train `model` with masks that reach a shape; write it with the masks' scores, return `out`.

    Xia et al., 2023, arXiv:2310.06694. `profile/` in the folder is the profile of the model there:
    it has the criterion `learned_masks`, and a unit's score is its log α. Without `train_weights`
    the model is the same as before. An interrupted run continues. Raises UserError for a shape
    that the model cannot have, for sparse weights that training would fill, and for a loss that is
    not finite.
    """
    out, options = Path(out), options or Options()
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    masks, steps = check(checkpoint, data, config)
    device = options.torch_device()
    refuse_input(out, checkpoint.folder)
    refuse_sparse(checkpoint, config)
    inputs = {"model": checkpoint.fingerprint, "data": data_digest(data)}
    stage = ModelDir(out, "learn_masks", config, inputs, checkpoint, data, resumable=True)
    if stage.complete:
        say(f"learn_masks: {out} is complete and unchanged")
        return out
    require_space(out, 3 * 12 * sum(math.prod(shape) for shape in checkpoint.shapes.values()))
    tokenizer = checkpoint.tokenizer()
    count = steps * (config.batch_tokens // data.sequence_length)

    def text(split: Split, sequences: int) -> Sequences:
        return text_for([checkpoint.config], data, tokenizer, split, sequences, checkpoint)

    train, heldout = text("train", count), text("validation", config.heldout_sequences)
    with stage as folder:
        run = _MaskTraining.of(checkpoint, masks, config, options, device)
        run.train(train, steps, folder)
        stage.figures += run.figures(heldout)
        _write(folder, stage, checkpoint, run, text("calibration", config.samples), data)
    return out


def refuse_sparse(checkpoint: Checkpoint, config: LearnMasksConfig) -> None:
    """Raise UserError for sparse weights that training would fill."""
    if config.train_weights:
        zeros.refuse_filling(checkpoint, "training with masks", ADVICE)


def check(
    checkpoint: Checkpoint,
    data: DataConfig,
    config: LearnMasksConfig,
    config_now: dict[str, Any] | None = None,
) -> tuple[Masks, int]:
    """The masks and the number of steps; raises UserError for impossible sizes."""
    family, fields = families.of(checkpoint), config_now or checkpoint.config
    if config.batch_tokens % data.sequence_length:
        raise UserError(
            f"batch_tokens {config.batch_tokens} is no multiple of the sequence_length "
            f"{data.sequence_length}: change one of them"
        )
    before, sizes = family.sizes(fields), config.sizes()
    if "kv_heads" in sizes and "heads" not in sizes:
        sizes["heads"] = before["heads"] // before["kv_heads"] * sizes["kv_heads"]
    families.check_sizes(family, fields, sizes, config.multiple_of)
    masks = Masks(family, fields, sizes, config.penalty)
    if not len(masks.log_alphas):
        raise UserError(f"the shape {sizes} is the model's own: give at least one smaller size")
    return masks, max(1, round(config.tokens / config.batch_tokens))


@dataclass
class _MaskTraining:
    """A model, its masks, and how both are trained."""

    model: PreTrainedModel
    masks: Masks
    teacher: Teacher | None
    losses: LossWeights
    config: LearnMasksConfig
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        masks: Masks,
        config: LearnMasksConfig,
        options: Options,
        device: torch.device,
    ) -> _MaskTraining:
        losses = LossWeights(config.losses)
        teacher = None
        if losses.needs_teacher:
            teacher = Teacher(place_teacher(checkpoint, "whole", device))
        model = checkpoint.model(torch.float32, device)
        check_model(model)
        model.requires_grad_(config.train_weights)
        dtype: torch.dtype = getattr(torch, checkpoint.main_dtype)
        size = max(1, options.batch_size)
        return cls(model, masks.to(device), teacher, losses, config, size, device, dtype)

    def train(self, train: Sequences, steps: int, folder: Path) -> None:
        """Train masks, multipliers and weights, from the last state in `folder` on."""
        config, length = self.config, train.length
        optimizer = self._optimizer()
        start = self._restore(folder / STATE, optimizer)
        every = max(1, round(config.save_tokens / config.batch_tokens))
        in_step = config.batch_tokens // length
        warm = max(1, round(steps / 10))
        undo = bind_loss(self.model, self.teacher, self.losses)
        self.model.train()
        with progress("learn_masks", steps * config.batch_tokens) as counter:
            counter.resume_at(start * config.batch_tokens)
            for step in range(start, steps):
                optimizer.param_groups[-1]["lr"] = config.learning_rate * min(1, (step + 1) / warm)
                rows = train.select(range(step * in_step, (step + 1) * in_step))
                progress_now = (step + 1) / max(1, round(config.target_warmup * steps))
                loss = self._step(rows, step, progress_now, optimizer)
                counter.advance(config.batch_tokens, f"loss {loss:.3f}, {self.describe()}")
                if (step + 1) % every == 0 and step + 1 < steps:
                    self._save(folder / STATE, optimizer, step + 1)
        undo()
        self.model.eval()

    def _optimizer(self) -> torch.optim.AdamW:
        groups: list[dict[str, Any]] = [
            {"params": list(self.masks.log_alphas.values()), "lr": self.config.mask_rate}
        ]
        if self.config.train_weights:
            groups.append({"params": list(self.model.parameters())})
        else:
            groups.append({"params": [torch.nn.Parameter(torch.zeros(0))]})
        return torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95))

    def _step(
        self, rows: Sequences, step: int, progress_now: float, optimizer: torch.optim.AdamW
    ) -> float:
        """One step on the sequences `rows`; returns the mean loss per scored token."""
        config = self.config
        scored = max(1, int((rows.labels[:, 1:] != -100).sum()))
        total = 0.0
        for batch in self._batches(rows):
            draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            self.masks.draw(draw)  # the same masks in all micro-batches of a step
            with masked(self.model, self.masks), autocast(self.device):
                loss = self.model(**batch)["loss"] / scored
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise UserError(f"the loss became {total} at step {step + 1}: lower learning_rate")
        self.masks.loss(progress_now).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.masks.ascend(config.multiplier_rate, progress_now)
        return total

    def _batches(self, rows: Sequences) -> Iterator[dict[str, Tensor]]:
        for batch in rows.batches(self.batch_size):
            names = ("input_ids", "position_ids", "labels")
            yield {name: batch[name].to(self.device) for name in names}

    def _save(self, path: Path, optimizer: torch.optim.AdamW, step: int) -> None:
        state = {
            "step": step,
            "masks": self.masks.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model": self.model.state_dict() if self.config.train_weights else {},
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def _restore(self, path: Path, optimizer: torch.optim.AdamW) -> int:
        """Load the last state, if there is one; returns the number of steps done."""
        if not path.exists():
            return 0
        state = torch.load(path, map_location=self.device)
        self.masks.load_state_dict(state["masks"])
        optimizer.load_state_dict(state["optimizer"])
        if state["model"]:
            self.model.load_state_dict(state["model"])
        say(f"learn_masks: continues from step {state['step']}")
        return int(state["step"])

    def describe(self) -> str:
        """The expected sizes now, and the target: hidden 412/384."""
        return ", ".join(f"{dim} {now:.0f}/{goal}" for dim, (now, goal) in self.sizes().items())

    def sizes(self) -> dict[str, tuple[float, int]]:
        """Expected number of open masks (mean over layers) and target, by dimension."""
        masks, found = self.masks, dict[str, list[float]]()
        shares = masks.shares().detach().split(list(masks.rows.values()))
        for key, share in zip(masks.rows, shares, strict=True):
            found.setdefault(key.split("/")[0], []).append(float(share.mean()))
        sizes = {}
        for dim, each in found.items():
            kept = masks.after["kv_heads"] / masks.before["kv_heads"] if dim == "heads" else 1
            sizes[dim] = (sum(each) / len(each) * kept * masks.before[dim], masks.after[dim])
        return sizes

    @torch.no_grad()
    def figures(self, heldout: Sequences) -> list[Figure]:
        """Expected sizes, and the held-out cross-entropy of the whole and of the cut model."""
        say(f"learn_masks: expected sizes, and the target: {self.describe()}")
        missed = [
            dim
            for dim, (now, goal) in self.sizes().items()
            if abs(now - goal) > FAR * self.masks.before[dim]
        ]
        if missed:
            say(
                f"learn_masks: the masks did not reach the shape in {', '.join(missed)}: raise "
                "tokens, penalty or multiplier_rate"
            )
        sizes = [
            Figure(name=f"expected {dim}", value=now, convention=f"open masks; target {goal}")
            for dim, (now, goal) in self.sizes().items()
        ]
        undo = bind_loss(self.model, None, LossWeights({"cross_entropy": 1.0}))
        chosen = {key: z.to(self.device) for key, z in self.masks.chosen().items()}
        whole = {key: torch.ones_like(z) for key, z in chosen.items()}
        names = ("held-out cross-entropy, whole", "held-out cross-entropy, cut to the shape")
        for name, values in zip(names, (whole, chosen), strict=True):
            self.masks.set(values)
            loss = tokens = 0.0
            for batch in self._batches(heldout):
                with masked(self.model, self.masks), autocast(self.device):
                    outputs = self.model(**batch)
                loss, tokens = loss + float(outputs["loss"]), tokens + int(outputs["tokens"])
            dtype = name_of(half(self.device))
            convention = f"nats per scored token of the validation split, {dtype}"
            sizes.append(Figure(name=name, value=loss / tokens, unit="nats", convention=convention))
            say(f"learn_masks: {name} {loss / tokens:.4f} nats")
        undo()
        return sizes


def _write(
    folder: Path,
    stage: ModelDir,
    checkpoint: Checkpoint,
    run: _MaskTraining,
    sequences: Sequences,
    data: DataConfig,
) -> None:
    """Write the model, its scores, and the text for a repair."""
    scores = {
        f"{CRITERION}/{key}": log_alpha_U.detach().float().cpu().contiguous()
        for key, log_alpha_U in run.masks.log_alphas.items()
    }
    stored = {name: getattr(torch, checkpoint.dtype(name)) for name in checkpoint.names()}
    for name, weight in run.model.named_parameters():
        weight.data = weight.data.to(stored.get(name, run.dtype))
    checkpoints.write_model(run.model, folder, checkpoint)
    copy_plans(checkpoint.folder, folder)
    measured = folder / PROFILE
    measured.mkdir(exist_ok=True)
    save_file(scores, measured / SCORES)
    sequences.save(measured / SEQUENCES)
    info = {
        "digest": stage.digest,
        "grams": [],
        "gram_tokens": 0,
        "fingerprint": Checkpoint(folder).fingerprint,
        "model_type": checkpoint.config["model_type"],
        "criteria": [CRITERION],
        "samples": len(sequences),
        "tokens": int(sequences.real.sum()),
        "sequence_length": data.sequence_length,
        "token_weight": "uniform",
        "target": run.masks.after,
    }
    write_json(measured / INFO, info)
    (folder / STATE).unlink(missing_ok=True)
