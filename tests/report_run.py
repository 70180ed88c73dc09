"""Writes a run folder as `regrow run` leaves it, with made-up figures, for tests of the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from regrow.plan import Plan

BEFORE = {"layers": 6, "hidden": 64, "mlp": 200, "heads": 8, "kv_heads": 2, "vocab": 384}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def figures_of(step: int, parameters: int) -> list[dict[str, Any]]:
    how = "first 16,384 tokens of test.txt, windows of 512"
    values = [28.5, 61.0, 47.0, 42.0]
    found: list[dict[str, Any]] = [
        {"name": "parameters", "value": parameters, "convention": "tied weights counted once"},
        {"name": "bytes", "value": 2 * parameters, "unit": "bytes", "convention": "tensors"},
        {
            "name": "prefill",
            "value": 900.0 + 100 * step,
            "unit": "tokens/s",
            "n": 3,
            "convention": f"batch 1; runs from {890 + step} to {910 + step}",
        },
    ]
    for number, text in enumerate(("heldout", "wikitext2")):
        value = values[step] * (1 + number / 10)
        found.append(
            {
                "name": f"perplexity/{text}",
                "value": value,
                "n": 16352,
                "stderr": value / 40,
                "convention": how,
            }
        )
        if step:
            kl = {"name": f"kl/{text}", "value": 0.9 / step, "unit": "nats", "n": 16352}
            found.append({**kl, "stderr": 0.01, "convention": how})
    return found


def write_evaluation(folder: Path, labels: list[str], prompt: str, answer: str) -> None:
    full = 134_515_008
    found = {
        label: figures_of(step, full if step == 0 else 108_800_000)
        for step, label in enumerate(labels)
    }
    generations = {
        label: [{"prompt": prompt, "text": f"{answer} {n}"}] for n, label in enumerate(labels)
    }
    conventions = {f["name"]: f["convention"].partition("; runs")[0] for f in found[labels[1]]}
    evaluation = {
        "labels": labels,
        "teacher": labels[0],
        "figures": found,
        "generations": generations,
        "conventions": conventions,
    }
    write_json(folder / "evaluation.json", evaluation)


def write_profile(folder: Path, before: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"block_influence/layers/all": torch.rand(before["layers"], generator=generator)}
    scores["activation_l2/hidden/all"] = torch.rand(before["hidden"], generator=generator).exp()
    for layer in range(before["layers"]):
        for dim in ("mlp", "heads", "kv_heads"):
            draw = torch.randn(before[dim], generator=generator)
            scores[f"activation_l2/{dim}/{layer}"] = (2 * draw + layer / 5).exp()
            scores[f"random/{dim}/{layer}"] = torch.rand(before[dim], generator=generator)
    folder.mkdir(parents=True)
    save_file(scores, folder / "scores.safetensors")
    criteria = ["activation_l2", "random", "block_influence"]
    write_json(folder / "profile.json", {"fingerprint": "f" * 64, "criteria": criteria})


def make_plan(before: dict[str, int]) -> Plan:
    draw = random.Random(0)
    layers = [n for n in range(before["layers"]) if n != before["layers"] - 2]
    mlp = before["mlp"] * 3 // 4
    return Plan(
        model_type="llama",
        fingerprint="f" * 64,
        before=before,
        after={**before, "layers": len(layers), "mlp": mlp, "kv_heads": 1, "heads": 4},
        layers=layers,
        mlp={n: sorted(draw.sample(range(before["mlp"]), mlp)) for n in layers},
        kv_heads={n: [draw.randrange(2)] for n in layers},
        criterion="activation_l2",
    )


def write_manifest(folder: Path, stage: str, **extra: Any) -> None:
    made = {
        "stage": stage,
        "digest": "d1" * 32,
        "config": {"samples": 4},
        "inputs": {"model": "f" * 64},
        "figures": [{"name": "parameters", "value": 108800000.0}],
        "versions": {"regrow": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "x86_64", "system": "Linux"},
        "seconds": 61.5,
        "finished": "2026-01-02T03:04:05Z",
        **extra,
    }
    write_json(folder / "manifest.json", made)


def write_metrics(path: Path, stage: str, steps: int = 200) -> None:
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        common = {"stage": stage, "step": step, "tokens": 2048 * step, "seconds": 7.0 * step}
        loss = 0.4 + 0.5 * math.exp(-step / 40) + draw.gauss(0, 0.03)
        rows.append({**common, "loss": loss, "learning_rate": 2e-4})
        if step % 25 == 0:
            rows.append({**common, "heldout_kl": 0.42 + 0.4 * math.exp(-step / 40)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_candidates(path: Path, name: str) -> None:
    shapes = [(name, {"mlp": 150}, 0.61), ("depth", {"layers": 5}, 0.9), ("mix", {"mlp": 170}, 0.5)]
    rows = [
        {
            "name": label,
            "sizes": sizes,
            "parameters": 108_000_000 + n * 300_000,
            "keep": 0.8 + n / 400,
            "kl": kl,
            "chosen": n == 2,
        }
        for n, (label, sizes, kl) in enumerate(shapes)
    ]
    write_json(path, rows)


def write_run(
    folder: Path,
    labels: tuple[str, ...] = ("teacher", "pruned", "repaired", "distilled"),
    words: str = "plain words",
    before: dict[str, int] = BEFORE,
) -> Path:
    """A run folder as `regrow run` leaves it; `words` go wherever a user's or model's text goes."""
    stages = folder / "stages"
    plan = make_plan(before)
    write_profile(stages / "01-profile", before)
    for name in ("02-prune", "02-prune-repaired", "03-distill"):
        write_manifest(stages / name, name.split("-")[1])
        plan.write(stages / name / "plan.json")
    write_manifest(stages / "01-profile", "profile", note=words)
    write_candidates(stages / "02-prune-repaired" / "candidates.json", words)
    write_metrics(folder / "metrics.jsonl", "03-distill")
    write_evaluation(stages / "04-evaluate", list(labels), words, f"answer: {words}")
    write_manifest(stages / "04-evaluate", "evaluate")
    recipe = {"model": words, "stages": ["profile", {"prune": {}}, "distill", "evaluate"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
