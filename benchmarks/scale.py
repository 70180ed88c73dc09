"""A distillation of 70 B parameters on 512 devices, on paper: nothing here is measured.

    python benchmarks/scale.py > benchmarks/results/scale.md

All figures are from regrow.cost. Assumptions: H100s with the rates and links of
src/regrow/cost/devices.yaml, and the efficiency that is fitted on one published run. FSDP over all
devices ("fsdp"), or inside a node only, with gradients summed over nodes ("hsdp"). Failures as in
`regrow.cost.failures`. Step times of devices spread by 2 %. A checkpoint of 12 bytes for each
parameter goes to a disk of 20 GB/s, and a restart takes 10 minutes. The last three figures are
guesses; the script takes others.
"""

from __future__ import annotations

import argparse
from statistics import fmean

from regrow.cost import jobs
from regrow.cost.devices import find
from regrow.cost.failures import LongRun, daly_interval, simulate, slowest
from regrow.cost.model import ModelSize

LLAMA_70B = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
LENGTH, TOKENS, BATCH = 4096, 100e9, 4 << 20
STATE = 12
"""Bytes of a checkpoint for each parameter: float32 weights and two moments."""
SEEDS = 20


def main() -> None:
    arguments = _arguments()
    teacher = ModelSize(LLAMA_70B)
    student = teacher.resized(layers=40)
    device = find("h100")
    work = jobs.distil(student, teacher, TOKENS, device, LENGTH)
    print(
        f"Teacher {teacher.parameters / 1e9:.1f}·10⁹ parameters, student "
        f"{student.parameters / 1e9:.1f}·10⁹, {TOKENS / 1e9:.0f}·10⁹ tokens in steps of "
        f"{BATCH / 1e6:.1f}·10⁶: {work.device_hours:,.0f} {device.title} hours.\n"
    )
    print(
        "| GPUs | sharding | state per GPU, GB | efficiency | seconds of a step | slowest GPU | "
        "failure every, h | checkpoint every, min | goodput | days |"
    )
    print("|---:|---|" + "---:|" * 8)
    for count in (64, 128, 256, 512):
        for sharding in ("fsdp", "hsdp"):
            cluster = jobs.Cluster(device, count, BATCH, sharding=sharding)
            print(_row(arguments, cluster, student, teacher))


def _row(
    arguments: argparse.Namespace, cluster: jobs.Cluster, student: ModelSize, teacher: ModelSize
) -> str:
    efficiency = cluster.efficiency(student, teacher, LENGTH)
    each = jobs.distillation_operations(student, teacher, LENGTH)
    step = BATCH * each / jobs.rate(cluster.device) / cluster.count / efficiency
    run = LongRun(
        steps=round(TOKENS / BATCH),
        step_seconds=step,
        devices=cluster.count,
        checkpoint_seconds=STATE * student.parameters / (arguments.disk * 1e9),
        restart_seconds=60 * arguments.restart,
        spread=arguments.spread,
    )
    timelines = [simulate(run, run.every(), seed) for seed in range(SEEDS)]
    group = 8 if cluster.sharding == "hsdp" else cluster.count
    state = (16 * student.parameters + 2 * teacher.parameters) / group / 1e9
    cells = (
        f"{cluster.count}",
        cluster.sharding,
        f"{state:.1f}",
        f"{efficiency:.2f}",
        f"{step:.1f}",
        f"{slowest(run.devices, run.spread) - 1:+.1%}",
        f"{run.mtbf_seconds / 3600:.0f}",
        f"{daly_interval(run.checkpoint_seconds, run.mtbf_seconds) / 60:.0f}",
        f"{fmean(line.goodput for line in timelines):.1%}",
        f"{fmean(line.total for line in timelines) / 86400:.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--disk", type=float, default=20.0, help="GB/s that a checkpoint takes")
    parser.add_argument("--restart", type=float, default=10.0, help="minutes of a restart")
    parser.add_argument("--spread", type=float, default=0.02, help="of a device's step time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
