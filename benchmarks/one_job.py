"""One job, a tenth of the size: accuracy, bytes and speed of ever smaller models for one task.

    python benchmarks/one_job.py --texts ../shared/data --out runs/one-job

The job is to turn a command to a house into an exact instruction (examples/one_job_data.py). The
script runs the recipes of `make demo-task`. In examples/one_job.yaml, SmolLM2-135M-Instruct is
fine-tuned, its vocabulary, layers and MLPs are cut by what the task uses, and it is taught by its
own uncut self. In examples/one_job_hundredth.yaml, a model of a hundredth learns the half's answers
from scratch. The script also cuts the half again, by importance on general text (protocol P1), and
trains it in the same way. Printed is the share of exact answers on sentence patterns that no model
has seen, with intervals. Resumable: run it again and it goes on. Writes `one_job.md` into `--out`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from protocol import blend, figures_in, interval

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    distill,
    evaluate,
    export,
    profile,
    prune,
    run,
)
from regrow.recipe.recipe import Recipe, read

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEACHER, CUT, HALF, QUARTER, INT8 = (
    "01-distill",
    "03-prune-repaired",
    "04-distill",
    "07-distill",
    "08-quantize",
)
HUNDREDTH = "03-distill"
"""Folders of the stages of both recipes."""


def main() -> None:
    arguments = _arguments()
    out: Path = arguments.out
    options = Options(batch_size=arguments.batch_size)
    recipe = job_recipe(out)
    run(recipe, out / "run", options)
    stages = out / "run" / "stages"
    models: dict[str, str | Path] = {
        "teacher": stages / TEACHER,
        "half": stages / HALF,
        "half, cut by general text": _general(stages, recipe, arguments, options),
        "quarter": stages / QUARTER,
        "quarter, int8": stages / INT8,
        "quarter, Q8_0 by llama.cpp": export(stages / QUARTER, out / "quarter.gguf"),
        "hundredth": _tiny(stages, arguments),
    }
    cuts = {
        "half, untrained": stages / CUT,
        "half, cut by general text, untrained": out / "general" / "half",
    }
    measured = _evaluated({**models, **cuts}, recipe, out, arguments, options)
    (out / "one_job.md").write_text(_table(measured))
    print(_table(measured))


def job_recipe(out: Path) -> Recipe:
    """Write the job's data below `out`, and read examples/one_job.yaml for it."""
    data = out / "data"
    maker = [sys.executable, str(EXAMPLES / "one_job_data.py"), "--out", str(data)]
    subprocess.run(maker, check=True)
    return read(
        EXAMPLES / "one_job.yaml",
        [f"stages.evaluate.answers.test={data / 'test.jsonl'}"],
        {"DATA": [str(data / "train.jsonl")]},
    )


def _general(stages: Path, recipe: Recipe, arguments: argparse.Namespace, options: Options) -> Path:
    """The half again, by importance on general text, with the same tokens, taught in the same way.

    The vocabulary is cut last, because general text in the task's tokens would fall into bytes.
    """
    folder = arguments.out / "general"
    text = blend(arguments.texts).model_copy(update={"sequence_length": 256})
    measured, sizes, taught = (step.config for step in recipe.steps()[1:4])
    assert isinstance(measured, ProfileConfig)
    assert isinstance(sizes, PruneConfig)
    assert isinstance(taught, DistillConfig)
    cut = sizes.model_copy(update={"vocab_size": None})
    fewer = PruneConfig(vocab_size=sizes.vocab_size, repair=False)
    scores = profile(stages / TEACHER, text, folder / "profile", measured, options)
    whole = prune(stages / TEACHER, folder / "all-tokens", cut, scores, text, options)
    counts = profile(whole, recipe.data, folder / "counts", measured, options)
    half = prune(whole, folder / "half", fewer, counts, recipe.data, options)
    return distill(half, stages / TEACHER, recipe.data, folder / "taught", taught, options)


def _tiny(stages: Path, arguments: argparse.Namespace) -> Path:
    """A model of a hundredth, from scratch, on answers of the half, which has the same tokens."""
    out = arguments.out
    recipe = read(
        EXAMPLES / "one_job_hundredth.yaml",
        [
            f"stages.generate.limit={arguments.tiny_answers}",
            f"stages.distill.tokens={arguments.tiny_tokens}",
            f"stages.evaluate.answers.test={out / 'data' / 'test.jsonl'}",
        ],
        {"MODEL": str(stages / HALF), "DATA": [str(out / "data" / "train.jsonl")]},
    )
    run(recipe, out / "hundredth", Options(batch_size=32))
    return Path(out / "hundredth" / "stages" / HUNDREDTH)


def _evaluated(
    models: dict[str, str | Path],
    recipe: Recipe,
    out: Path,
    arguments: argparse.Namespace,
    options: Options,
) -> dict[str, dict[str, dict[str, Any]]]:
    config = next(step.config for step in recipe.steps() if step.name == "evaluate")
    assert isinstance(config, EvaluateConfig)
    config = config.model_copy(update={"limit": arguments.limit})
    data: DataConfig | None = None
    folder = evaluate(models, out / "evaluation", data, models["teacher"], config, options)
    return figures_in(folder)


def _table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    full = measured["teacher"]["parameters"]["value"]
    lines = [
        "| model | parameters | share | MB | exact answers (95 %) | of the teacher's (95 %) "
        "| decode, tokens/s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for label, row in measured.items():
        kept = row.get("exact_answers_kept/test")
        cells = [
            label,
            f"{row['parameters']['value'] / 1e6:.1f} M",
            f"{row['parameters']['value'] / full:.1%}",
            f"{row['bytes']['value'] / 1e6:.1f}",
            interval(row["exact_answers/test"]),
            "–" if kept is None else interval(kept),
            f"{row['decode']['value']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rows = measured["teacher"]["exact_answers/test"]["n"]
    return "\n".join([f"{rows} test rows.", "", *lines]) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with general text")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--limit", type=int, default=300, help="test rows")
    parser.add_argument("--tiny-answers", type=int, default=4000, help="answers of the half")
    parser.add_argument("--tiny-tokens", type=int, default=1_000_000, help="tokens of the tiny one")
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
