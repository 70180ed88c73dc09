"""What a profile costs, in plain forward passes over the same batches.

    python benchmarks/profile_cost.py --texts ../shared/data --out benchmarks/results

SmolLM2-135M-Instruct in bf16 over calibration blocks of protocol P1 (p1.py), in one process. Each
batch is run plain and with the hooks of each kind of profile in turn, the order rotating, so that
all see the machine alike; given are ratios of medians, by the clock and by the processor's time,
which another job on the machine disturbs less. Gram matrices are stated apart: they are gathered on
their own number of tokens (`gram_tokens`), not on all. Writes `profile_cost.md` into `--out`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from protocol import DENSE, blend

from regrow import ProfileConfig, families, load
from regrow.data.sequences import build_sequences
from regrow.runtime.progress import Progress
from regrow.stages.profile.collect import Batch, Collector
from regrow.stages.profile.importance import statistics_needed
from regrow.stages.profile.passes import run_through

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "plain forward passes": ((), ()),
    "activation_l2 and block_influence (the default)": (("activation_l2", "block_influence"), ()),
    "minitron": (("minitron",), ()),
    "activation_l2, minitron, wanda, fluctuation, block_influence": (
        ("activation_l2", "minitron", "wanda", "fluctuation", "block_influence"),
        (),
    ),
    "angular_distance": (("angular_distance",), ()),
    "Gram matrices of mlp": ((), ("mlp",)),
    "Gram matrices of mlp and heads": ((), ("mlp", "heads")),
}


def main() -> None:
    arguments = _arguments()
    checkpoint = load(DENSE)
    model = checkpoint.model(torch.bfloat16).requires_grad_(False)
    batches = _batches(checkpoint, arguments)
    family = families.of(checkpoint)
    head_dim = family.sizes(checkpoint.config)["head_dim"]
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    turns = arguments.repeats + 1
    counter = Progress("profile_cost", arguments.samples * 512 * len(KINDS) * turns, "tokens")
    for turn in range(turns):
        for number, batch in enumerate(batches):
            kinds = [*KINDS]
            start = (turn + number) % len(kinds)
            for kind in kinds[start:] + kinds[:start]:
                criteria, grams = KINDS[kind]
                needs = statistics_needed(ProfileConfig(criteria=criteria))
                collector = Collector(family, needs, grams, True, head_dim)
                duration = _time(model, batch, collector, counter)
                if turn > 0 or number > 0:  # the very first batch warms up
                    seconds[kind].append(duration)
    text = _table(seconds, arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "profile_cost.md").write_text(text)
    print(text)


def _time(model: Any, batch: Any, collector: Collector, counter: Progress) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    run_through(model, [batch], collector, counter)
    return time.perf_counter() - clock, time.process_time() - processor


def _batches(checkpoint: Any, arguments: argparse.Namespace) -> Any:
    data, tokenizer = blend(arguments.texts), checkpoint.tokenizer()
    sequences = build_sequences(data, tokenizer, "calibration", arguments.samples)
    return [(Batch(batch["real"], "fit"), batch) for batch in sequences.batches(4)]


def _table(seconds: dict[str, list[tuple[float, float]]], arguments: argparse.Namespace) -> str:
    plain = [median(values) for values in zip(*seconds["plain forward passes"], strict=True)]
    lines = [
        f"| over {arguments.samples} blocks of 512, {torch.get_num_threads()} threads "
        "| × plain, clock | × plain, processor |",
        "|---|---:|---:|",
    ]
    for kind, values in seconds.items():
        medians = [median(column) for column in zip(*values, strict=True)]
        ratios = [column / base for column, base in zip(medians, plain, strict=True)]
        lines.append(f"| {kind} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=24, help="calibration blocks of 512")
    parser.add_argument("--repeats", type=int, default=3, help="turns through all blocks")
    return parser.parse_args()


if __name__ == "__main__":
    main()
