"""A place to distil in, a short run's config, and what a run wrote down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_folders import data_of, write_model, write_text
from tiny_models import random_plan, tiny_config
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from regrow.config import Options
from regrow.data import DataConfig
from regrow.data.sequences import build_sequences
from regrow.pruning.config import PruneConfig
from regrow.stage_dir import read
from regrow.stages.distill.config import DistillConfig
from regrow.stages.prune.stage import prune

STEPS = 12

OPTIONS = Options(device="cpu", batch_size=2)

CONFIG = DistillConfig(
    tokens=STEPS * 128,
    batch_tokens=128,
    learning_rate=1e-3,
    min_learning_rate_ratio=0.1,
    warmup_ratio=0.05,
    eval_tokens=4 * 128,
    heldout_sequences=6,
)


def write_place(folder: Path) -> Path:
    """A bfloat16 teacher, a pruned child, a smaller stranger, a config.json, and text."""
    folder.mkdir(exist_ok=True)
    write_text(folder / "text.jsonl")
    teacher = write_model(folder / "teacher", dtype=torch.bfloat16, num_hidden_layers=2)
    plan = random_plan(teacher.config, teacher.fingerprint, mlp=32)
    plan.write(folder / "plan.json")
    config = PruneConfig(plan=str(folder / "plan.json"), repair=False)
    prune(teacher, folder / "pruned", config)
    write_model(folder / "stranger", "qwen3", torch.float32, hidden_size=36, num_hidden_layers=1)
    fresh = tiny_config("llama", hidden_size=36, head_dim=6, vocab_size=400, num_hidden_layers=1)
    fields = {**fresh.to_diff_dict(), "model_type": "llama", "rms_norm_eps": 1e-6}
    del fields["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def data(place: Path) -> DataConfig:
    return data_of(place / "text.jsonl")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out(folder: Path) -> dict[int, float]:
    """Held-out KL by step."""
    rows = [row for row in rows_of(folder) if "heldout_kl" in row]
    kl_by_step = {row["step"]: row["heldout_kl"] for row in rows}
    assert len(kl_by_step) == len(rows)
    return kl_by_step


def figures(folder: Path) -> dict[str, float]:
    manifest = read(folder)
    assert manifest is not None
    return {figure["name"]: figure["value"] for figure in manifest["figures"]}


def kl_of(folder: Path, place: Path) -> float:
    """KL(teacher ‖ model) in nats per scored held-out token, in float32 by the stock classes."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        for path in (folder, place / "teacher")
    )
    sequences = build_sequences(
        data(place), tiny_tokenizer(), "validation", CONFIG.heldout_sequences
    )
    batch = next(sequences.batches(len(sequences)))
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        log_q, log_p = (
            model(**inputs, use_cache=False).logits[:, :-1, : len(tiny_tokenizer())].log_softmax(-1)
            for model in (student, teacher)
        )
    kl_BT = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(kl_BT[batch["labels"][:, 1:] != -100].mean())
