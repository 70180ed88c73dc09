"""A place to prune in: a tiny model with its text and profile, and plans chosen by it."""

from __future__ import annotations

from pathlib import Path

from tiny_folders import data_of, write_model, write_text

from regrow import families
from regrow.checkpoint import Checkpoint
from regrow.options import Options
from regrow.plan import Plan
from regrow.stages.profile import ProfileConfig, profile
from regrow.stages.prune.choose import choose
from regrow.statistics import Profile

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


def chosen(place: Path, **sizes: int) -> Plan:
    checkpoint = Checkpoint(place / "model")
    found = Profile(place / "profile")
    family = families.of(checkpoint)
    return choose(checkpoint, family, found, sizes, "activation_l2", "block_influence")
