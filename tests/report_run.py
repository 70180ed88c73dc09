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

TEACHER, STUDENT = "f" * 64, "5" * 64
MADE: dict[str, dict[str, Any]] = {
    "profile": {
        "inputs": {"model": TEACHER},
        "figures": [{"name": "calibration tokens", "value": 24576.0, "unit": "tokens"}],
    },
    "prune": {
        "inputs": {"model": TEACHER},
        "figures": [
            {"name": "parameters", "value": 108_800_000.0},
            {"name": "kept share of parameters", "value": 108_800_000 / 134_515_008},
        ],
    },
    "distill": {
        "inputs": {"student": STUDENT, "teacher": TEACHER},
        "config": {"adapter": "none"},
        "figures": [{"name": "training tokens", "value": 409_600.0, "unit": "tokens"}],
    },
}


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def figures_of(step: int, parameters: int) -> list[dict[str, Any]]:
    convention = "first 16,384 tokens of test.txt, windows of 512"
    values = [28.5, 61.0, 47.0, 42.0]
    rows: list[dict[str, Any]] = [
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
        rows.append(
            {
                "name": f"perplexity/{text}",
                "value": value,
                "n": 16352,
                "stderr": value / 40,
                "convention": convention,
            }
        )
        if step:
            kl = {"name": f"kl/{text}", "value": 0.9 / step, "unit": "nats", "n": 16352}
            rows.append({**kl, "stderr": 0.01, "convention": convention})
    return rows


def write_evaluation(folder: Path, labels: list[str], prompt: str, answer: str) -> None:
    full = 134_515_008
    content = {
        label: figures_of(step, full if step == 0 else 108_800_000)
        for step, label in enumerate(labels)
    }
    generations = {
        label: [{"prompt": prompt, "text": f"{answer} {n}"}] for n, label in enumerate(labels)
    }
    conventions = {f["name"]: f["convention"].partition("; runs")[0] for f in content[labels[1]]}
    evaluation = {
        "labels": labels,
        "teacher": labels[0],
        "figures": content,
        "generations": generations,
        "conventions": conventions,
    }
    write_json(folder / "evaluation.json", evaluation)


def task_figures(step: int) -> list[dict[str, Any]]:
    """Benchmarks and speeds as `regrow evaluate` writes them; less from step to step."""
    rows: list[dict[str, Any]] = []
    scores = {"acc/arc_easy": 0.6, "acc_norm/arc_easy": 0.5, "acc/lambada_openai": 0.4}
    scores |= {"acc/mmlu": 0.3, "acc/mmlu_anatomy": 0.35, "exact_match,strict-match/gsm8k": 0.1}
    for name, full in scores.items():
        value = full * (1 - step / 20)
        figure = {"name": name, "value": value, "n": 1000, "stderr": 0.015}
        rows.append({**figure, "convention": f"1,000 rows of {name.partition('/')[2]}"})
        if step:
            kind, _, task = name.partition("/")
            share = {"name": f"{kind}_kept/{task}", "value": 1 - step / 20, "stderr": 0.02}
            rows.append({**share, "n": 1000, "convention": "Σ scores ÷ Σ scores of the teacher"})
    rows.append({"name": "task_perplexity/lambada_openai", "value": 30.0 + step, "n": 1000})
    for tail in ("", "/4 x 512"):
        speeds = {"prefill": 900.0 + 100 * step, "decode": 30.0 + step, "ttft": 500.0 - step}
        speeds |= {"ttft_p95": 550.0, "time_per_output_token": 33.3, "load_time": 1.25}
        speeds |= {"peak_memory": 300e6} | ({"prefill_speedup": 1.1} if step else {})
        units = {"prefill": "tokens/s", "decode": "tokens/s", "ttft": "ms", "load_time": "s"}
        for name, value in speeds.items():
            if tail and name in ("load_time", "peak_memory"):
                continue
            unit, convention = (
                units.get(name, ""),
                "a prompt of 128 random tokens, batch 1, bfloat16; runs from 1 to 2",
            )
            row = {"name": f"{name}{tail}", "value": value, "unit": unit, "convention": convention}
            rows.append({**row, "n": 5})
    return rows


def add_benchmarks(run: Path) -> None:
    """Give every model of a run's evaluation benchmarks and speeds."""
    path = run / "stages" / "04-evaluate" / "evaluation.json"
    evaluation = json.loads(path.read_text())
    for step, label in enumerate(evaluation["labels"]):
        old = [f for f in evaluation["figures"][label] if f["name"] != "prefill"]
        evaluation["figures"][label] = old + task_figures(step)
    write_json(path, evaluation)


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
    manifest = {
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
    write_json(folder / "manifest.json", manifest)


def write_metrics(
    path: Path, stage: str, steps: int = 200, feature_losses: dict[str, float] | None = None
) -> None:
    """200 steps; `feature_losses` are further losses by name, as shares of the loss."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        common = {"stage": stage, "step": step, "tokens": 2048 * step, "seconds": 7.0 * step}
        loss = 0.4 + 0.5 * math.exp(-step / 40) + draw.gauss(0, 0.03)
        parts = {name: loss * share for name, share in (feature_losses or {}).items()}
        rows.append({**common, "loss": loss, "learning_rate": 2e-4, **parts})
        if step % 25 == 0:
            kl = 0.42 + 0.4 * math.exp(-step / 40)
            parts = {
                f"heldout_{name}": kl * share for name, share in (feature_losses or {}).items()
            }
            rows.append({**common, "heldout_kl": kl, **parts})
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
        write_manifest(stages / name, name.split("-")[1], **MADE[name.split("-")[1]])
        plan.write(stages / name / "plan.json")
    write_manifest(stages / "01-profile", "profile", note=words, **MADE["profile"])
    write_candidates(stages / "02-prune-repaired" / "candidates.json", words)
    write_metrics(folder / "metrics.jsonl", "03-distill")
    write_evaluation(stages / "04-evaluate", list(labels), words, f"answer: {words}")
    fingerprints = dict(zip(labels, (TEACHER, "p" * 64, STUDENT, "e" * 64), strict=False))
    read = {f"model {label}": value for label, value in fingerprints.items()}
    inputs = {**read, "data": "a" * 64, "text wikitext2": "b" * 64}
    write_manifest(stages / "04-evaluate", "evaluate", inputs=inputs)
    stages_of = ["profile", {"prune": {}}, {"distill": {"tokens": 409_600}}, "evaluate"]
    recipe = {"model": words, "data": "text.jsonl", "stages": stages_of}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder
