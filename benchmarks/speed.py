"""A student's speed ÷ its teacher's, as a share of the ratio of their operations.

    python benchmarks/speed.py runs/demo/model --out runs/speed

Both models stay loaded and take turns; speed-ups are medians over the turns of one ÷ the other in
the same turn. Operations are those of projections, attention and head, of the prompt or of a token
in the middle of what is generated. Generation at batch 1 is bound by memory, not by operations: its
share is stated, not aimed at. Aim: 0.85 in prefill. Writes `speed.md` into `--out`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from protocol import DENSE

from regrow import EvaluateConfig, Options, evaluate

AIM = 0.85


def main() -> None:
    arguments = _arguments()
    config = EvaluateConfig(
        metrics=("size", "speed", "memory"),
        prefill_tokens=tuple(arguments.prompts),
        batch_sizes=tuple(arguments.batches),
        repeats=arguments.repeats,
    )
    models = {"student": arguments.student}
    options = Options(device=arguments.device)
    folder = evaluate(
        models, arguments.out / "evaluation", None, arguments.teacher, config, options
    )
    figures = json.loads((folder / "evaluation.json").read_text())["figures"]
    student, teacher = (
        {row["name"]: row["value"] for row in figures[label]} for label in ("student", "teacher")
    )
    lines = [
        "| prompts x tokens | prefill × | of the FLOP ratio | decode × | of the FLOP ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for number, (batch, prompt) in enumerate(
        (batch, prompt) for batch in arguments.batches for prompt in arguments.prompts
    ):
        tail = f"/{batch} x {prompt}" if number else ""
        cells = [
            f"{student[f'{kind}_speedup{tail}']:.2f} | {student[f'{kind}_of_flops{tail}']:.2f}"
            for kind in ("prefill", "decode")
        ]
        lines.append(f"| {batch} x {prompt} | " + " | ".join(cells) + " |")
    kept = student["parameters"] / teacher["parameters"]
    lines += ["", f"{kept:.1%} of the parameters; aim in prefill: {AIM}."]
    if "peak_memory" in student:
        memory = student["peak_memory"] / teacher["peak_memory"]
        lines[-1] += f" Peak memory × teacher: {memory:.2f}."
    text = "\n".join(lines) + "\n"
    (arguments.out / "speed.md").write_text(text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="model folder")
    parser.add_argument("--teacher", default=DENSE, help="model to compare with")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512], help="tokens each")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4], help="prompts at once")
    parser.add_argument("--repeats", type=int, default=7, help="turns, after one to warm up")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


if __name__ == "__main__":
    main()
