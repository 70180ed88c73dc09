"""A place to prune in: a tiny model with its text and profile, and plans chosen by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_folders import data_of, write_model, write_text
from torch import Tensor
from transformers import PreTrainedModel

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.config import Options
from regrow.data.sequences import Sequences, build_sequences
from regrow.plan import Plan
from regrow.profile_folder import Profile
from regrow.pruning.choose import choose
from regrow.stages.profile import ProfileConfig
from regrow.stages.profile.stage import profile

OPTIONS = Options(device="cpu", batch_size=4, order="resident")


def write_place(folder: Path) -> Path:
    """`folder` with model/, text.jsonl and profile/ of the model on it."""
    text = write_text(folder / "text.jsonl", documents=400)
    checkpoint = write_model(
        folder / "model", num_hidden_layers=4, head_dim=8, intermediate_size=160
    )
    config = ProfileConfig(samples=24, gram_tokens=24 * 32)
    profile(checkpoint, data_of(text), folder / "profile", config, OPTIONS)
    return folder


def write_trained(folder: Path, text: Path, name: str = "llama", **config: Any) -> Checkpoint:
    """A tiny model that has learnt a little of the text, so that its channels mean something."""
    checkpoint = write_model(folder, name, torch.float32, **config)
    model = checkpoint.model(torch.float32)
    sequences = build_sequences(data_of(text), checkpoint.tokenizer(), "train", 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in [b for _ in range(5) for b in sequences.batches(8)]:
        outputs = model(batch["input_ids"], labels=batch["labels"])
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(checkpoint.folder))
    return Checkpoint(checkpoint.folder)


def kl_between(dense: PreTrainedModel, student: PreTrainedModel, sequences: Sequences) -> float:
    """Mean KL(dense ‖ student) in nats per token, from full logits."""
    inputs = {"input_ids": sequences.input_ids, "position_ids": sequences.position_ids}
    with torch.no_grad():
        log_p, log_q = (
            model(**inputs, use_cache=False).logits.log_softmax(-1) for model in (dense, student)
        )
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def chosen(place: Path, **sizes: int) -> Plan:
    checkpoint = Checkpoint(place / "model")
    profile = Profile(place / "profile")
    family = families.of(checkpoint)
    return choose(checkpoint, family, profile, sizes, "activation_l2", "block_influence")


def slow_kl(place: Path, student: PreTrainedModel, sequences: int = 8) -> float:
    """KL(dense ‖ student) by full float32 logits, on the blocks after the 24 profiled."""
    checkpoint = Checkpoint(place / "model")
    dense = checkpoint.model(torch.float32)
    data = data_of(place / "text.jsonl")
    sequences_built = build_sequences(data, checkpoint.tokenizer(), "calibration", 24 + sequences)
    batch = next(sequences_built.select(range(24, 24 + sequences)).batches(sequences))
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        log_p, log_q = (
            model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
            for model in (dense, student)
        )
    kl_BT: Tensor = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(kl_BT[batch["labels"][:, 1:] != -100].mean())
