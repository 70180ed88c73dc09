"""The preflight's memory and time of a distillation against what a distillation really takes.

    python benchmarks/preflight.py --texts ../shared/data --out runs/preflight
    python benchmarks/preflight.py --texts ../shared/data --out runs/preflight_small --size small

Three student shapes with random weights under SmolLM2-135M, each with several settings; with
`--size small`, under a teacher with random weights and half of its width, with one setting, in
three minutes of one core. Every run
is `regrow.distill` for a few steps in a process of its own. Memory: the highest sum of anonymous
pages (RssAnon, sampled every 2 ms) minus that after all imports, with an allocator that returns
freed memory at once (MALLOC_MMAP_THRESHOLD_). Time, in another process with the usual allocator:
processor seconds of one thread for the shortest step after the first one, against the operations of
a step at the rate of a bf16 matrix product there; the efficiency is fitted on the first shape's
plain run, and the others are predicted. Resumable: what was
measured is kept in `--out`, where `preflight.md` is written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from process_memory import anonymous
from protocol import DENSE
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer import Trainer

from regrow import DataConfig, DistillConfig, Options, distill, load
from regrow.cost.memory import training_memory
from regrow.cost.model import ModelSize
from regrow.stages.distill.preflight import setup_of

LENGTHS = {"full": 256, "small": 128}
"""Tokens per sequence."""
STEPS, TIMED_STEPS = 2, 4
TIMED = ("4 sequences", "4, checkpointing")
"""Settings whose steps are also timed."""
SHAPES: dict[str, dict[str, Any]] = {
    "llama, 24 layers of 576": {"num_hidden_layers": 24, "intermediate_size": 1024},
    "qwen3, 8 layers of 768": {
        "model_type": "qwen3",
        "num_hidden_layers": 8,
        "hidden_size": 768,
        "intermediate_size": 2304,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "gemma3, 10 layers of 512": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 10,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
SMALL_TEACHER = {
    "model_type": "llama",
    "num_hidden_layers": 12,
    "hidden_size": 288,
    "intermediate_size": 768,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
SMALL_SHAPES: dict[str, dict[str, Any]] = {
    "llama, 12 layers of 288": {**SMALL_TEACHER, "intermediate_size": 512},
    "qwen3, 4 layers of 384": {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "gemma3, 6 layers of 256": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
}
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Variables with which glibc returns freed memory to the system."""
KEPT = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the teacher's config that every student has."""
SETTINGS: dict[str, dict[str, Any]] = {
    "4 sequences": {},
    "8 sequences": {"sequences": 8, "machine": {"batch_size": 8}},
    "2 × 2 sequences": {"machine": {"batch_size": 2}},
    "4, checkpointing": {"machine": {"gradient_checkpointing": True}},
    "4, lora": {"training": {"adapter": "lora"}},
    "4, teacher in int8": {"training": {"teacher_dtype": "int8"}},
}


def main() -> None:
    arguments = _arguments()
    if arguments.run:
        print(json.dumps(_run(*arguments.run, arguments)))
        return
    rows = {}
    small = arguments.size == "small"
    for shape in SMALL_SHAPES if small else SHAPES:
        for setting in TIMED[:1] if small else SETTINGS:
            kept = arguments.out / f"{_name(shape)}-{_name(setting)}.json"
            if not kept.exists():
                kept.parent.mkdir(parents=True, exist_ok=True)
                row = _measured(shape, setting, arguments, ALLOCATOR)
                if setting in TIMED:
                    timed = _measured(shape, setting, arguments, {})
                    row |= {key: timed[key] for key in ("seconds", "rate")}
                else:
                    row["seconds"] = None
                kept.write_text(json.dumps(row))
            rows[shape, setting] = json.loads(kept.read_text())
            print(shape, setting, rows[shape, setting], flush=True)
    text = _table(rows)
    (arguments.out / "preflight.md").write_text(text)
    print(text)


def _table(rows: dict[tuple[str, str], dict[str, float]]) -> str:
    first = next(iter(rows.values()))
    efficiency = first["operations"] / first["rate"] / first["seconds"]
    lines = [
        "| student | setting | predicted, GB | measured, GB | error | predicted, s | measured, s "
        "| error |",
        "|---|---|" + "---:|" * 6,
    ]
    for (shape, setting), row in rows.items():
        line = (
            f"| {shape} | {setting} | {row['predicted'] / 1e9:.2f} | {row['measured'] / 1e9:.2f} "
            f"| {row['predicted'] / row['measured'] - 1:+.0%} "
        )
        if row["seconds"]:
            seconds = row["operations"] / row["rate"] / efficiency
            error = seconds / row["seconds"] - 1
            line += f"| {seconds:.1f} | {row['seconds']:.1f} | {error:+.0%} |"
        lines.append(line if row["seconds"] else line + "| – | – | – |")
    lines += ["", f"Efficiency, fitted on the first row: {efficiency:.2f} of a bf16 product."]
    return "\n".join(lines) + "\n"


def _measured(
    shape: str, setting: str, arguments: argparse.Namespace, variables: dict[str, str]
) -> dict[str, Any]:
    flags = ["--texts", str(arguments.texts), "--out", str(arguments.out)]
    flags += ["--size", arguments.size]
    command = [sys.executable, __file__, "--run", shape, setting, *flags]
    shutil.rmtree(_work(shape, setting, arguments), ignore_errors=True)
    environment = {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _run(shape: str, setting: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Distil for a few steps; the largest memory above that of the imports, and a step's time."""
    length, students = LENGTHS[arguments.size], arguments.out / "students"
    student = _written({**SHAPES, **SMALL_SHAPES}[shape], students / _name(shape))
    small = arguments.size == "small"
    teacher = str(_written(SMALL_TEACHER, students / "teacher")) if small else DENSE
    changed = SETTINGS[setting]
    batch_tokens = changed.get("sequences", 4) * length
    training: dict[str, Any] = {"batch_tokens": batch_tokens, "heldout_sequences": 1}
    training |= {"eval_tokens": 10**9, **changed.get("training", {})}
    steps = STEPS if "MALLOC_TRIM_THRESHOLD_" in os.environ else TIMED_STEPS
    training["tokens"] = steps * training["batch_tokens"]
    config = DistillConfig.model_validate(training)
    options = Options(device="cpu", **changed.get("machine", {}))
    data = DataConfig.model_validate(
        {"sources": [str(arguments.texts / "train" / "novels.jsonl.gz")], "sequence_length": length}
    )
    sizes = ModelSize(load(student).config), ModelSize(load(teacher).config)
    setup = setup_of(config, data, options)
    predicted = training_memory(*sizes, setup)
    rate = _rate(4 * length)
    times: list[float] = []
    watch = _Watch()
    Trainer.training_step = _timed(Trainer.training_step, times)  # type: ignore[method-assign]
    with watch:
        distill(student, teacher, data, _work(shape, setting, arguments), config, options)
    backward = 4 if config.adapter != "none" else 6
    backward += 2 if options.gradient_checkpointing else 0
    each = sizes[1].forward(length) + backward / 2 * sizes[0].forward(length)
    micro = [b - a for a, b in pairwise(times)][setup.accumulation :]
    return {
        "predicted": predicted.total,
        "measured": watch.peak,
        "moment": predicted.moment,
        "parts": predicted.parts,
        "at": watch.at,
        "seconds": min(micro, default=0.0) * setup.accumulation,
        "operations": each * config.batch_tokens,
        "rate": rate,
    }


def _work(shape: str, setting: str, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out / "work" / f"{_name(shape)}-{_name(setting)}")


def _rate(tokens: int) -> float:
    """Operations per processor second of a bf16 product of the students' largest shapes."""
    x, w = torch.randn(tokens, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    start = time.process_time()
    for _ in range(20):
        _ = x @ w.T
    return 20 * 2 * x.numel() * len(w) / (time.process_time() - start)


class _Watch(threading.Thread):
    """Samples this process's anonymous memory; `peak` is the largest rise."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.peak, self.at, self.running = anonymous("self"), 0, 0.0, True

    def __enter__(self) -> None:
        self.begin = time.monotonic()
        self.start()

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.join()

    def run(self) -> None:
        while self.running:
            now = anonymous("self") - self.start_bytes
            if now > self.peak:
                self.peak, self.at = now, time.monotonic() - self.begin
            time.sleep(0.002)


def _timed(step: Any, times: list[float]) -> Any:
    def timed(*arguments: Any, **named: Any) -> Any:
        times.append(time.process_time())
        return step(*arguments, **named)

    return timed


def _written(fields: dict[str, Any], folder: Path) -> Path:
    """A model of this shape with random weights in bfloat16, and SmolLM2's tokenizer."""
    if (folder / "config.json").exists():
        return folder
    dense = load(DENSE)
    kept = {key: dense.config[key] for key in KEPT if key in dense.config}
    base = kept if "model_type" in fields else {**dense.config}
    config = AutoConfig.for_model(**{**base, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    dense.tokenizer().save_pretrained(folder)
    return folder


def _name(text: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--size", choices=tuple(LENGTHS), default="full", help="of the models")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
