"""From a teacher's answers to a small model, on one job with an exact answer, step by step.

    python benchmarks/frontier_to_small.py --out runs/frontier-to-small

The job is that of one_job.py: a command to a house becomes an exact instruction. Teacher:
SmolLM2-135M-Instruct, fine-tuned for the job. Student: half of it, cut and repaired on the job's
prompts (the first stages of examples/one_job.yaml). From there nothing sees a right answer: the
teacher answers `--prompts` commands greedily, and the student learns the answers (SFT), then the
teacher's distributions on them (KL), then either pairs of its own answers that the teacher ranks
(DPO) or the teacher's distributions on what it writes itself (on-policy). Two ways are controls
with as many tokens: KL alone instead of SFT and KL, and KL instead of the on-policy step. Test:
the share of exact answers in sentence patterns that no model has seen, with 95 % intervals.
Resumable: run it again and it goes on. Writes `frontier_to_small.md` into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from one_job import CUT, TEACHER, job_recipe
from protocol import figures_in, interval, table

from regrow import (
    DistillConfig,
    EvaluateConfig,
    GenerateConfig,
    Options,
    PreferConfig,
    distill,
    evaluate,
    generate,
    prefer,
    run,
)
from regrow.recipe.recipe import Recipe

HARD: dict[str, Any] = {"losses": {"cross_entropy": 1.0}, "chosen_by": "last"}
OWN: dict[str, Any] = {"on_policy_new_tokens": 32, "on_policy_prompt_tokens": 32}
RATES = (1e-6, 1e-5, 5e-5)
"""Learning rates of DPO."""
OPTIONS = Options(batch_size=8)


def main() -> None:
    arguments = _arguments()
    out: Path = arguments.out
    whole = job_recipe(out)
    recipe = whole.model_copy(update={"stages": whole.stages[:3]})  # to the repaired half
    run(recipe, out / "job", OPTIONS)
    teacher, student = (out / "job" / "stages" / name for name in (TEACHER, CUT))
    asked = GenerateConfig(
        limit=arguments.prompts, greedy=True, chat_template=False, max_new_tokens=32
    )
    answers = generate(teacher, recipe.data, out / "answers", asked, Options(batch_size=32))

    def taught(start: Path, name: str, rate: float = 1e-4, **fields: Any) -> Path:
        config = DistillConfig(
            tokens=arguments.tokens,
            learning_rate=rate,
            eval_tokens=arguments.tokens // 2,
            heldout_sequences=4,
            answers=str(answers),
            **fields,
        )
        return distill(start, teacher, recipe.data, out / name, config, OPTIONS)

    def preferred(start: Path, rate: float) -> Path:
        config = PreferConfig(
            limit=arguments.pairs, max_new_tokens=32, chat_template=False, learning_rate=rate
        )
        return prefer(start, teacher, recipe.data, out / f"dpo-{rate:g}", config, OPTIONS)

    sft = taught(student, "sft", **HARD)
    kl = taught(sft, "sft-kl")
    only_kl = taught(student, "kl")
    models: dict[str, str | Path] = {
        "teacher": teacher,
        "student, repaired": student,
        "SFT": sft,
        "KL": only_kl,
        "SFT, KL": kl,
        "KL, KL": taught(only_kl, "kl-kl"),
        **{f"SFT, KL, DPO at {rate:g}": preferred(kl, rate) for rate in RATES},
        "SFT, KL, on-policy": taught(kl, "on-policy", on_policy_share=1.0, **OWN),
        "SFT, KL, half on-policy at 2e-5": taught(
            kl, "half-on-policy", 2e-5, on_policy_share=0.5, **OWN
        ),
        "SFT, KL, KL": taught(kl, "sft-kl-kl"),
    }
    written = _table(_evaluated(models, recipe, arguments))
    (out / "frontier_to_small.md").write_text(written)
    print(written)


def _evaluated(
    models: dict[str, str | Path], recipe: Recipe, arguments: argparse.Namespace
) -> dict[str, dict[str, dict[str, Any]]]:
    config = EvaluateConfig(
        metrics=("size", "kl", "exact_answers"),
        answers={"test": str(arguments.out / "data" / "test.jsonl")},
        answer_tokens=32,
        limit=arguments.limit,
        heldout_sequences=16,
    )
    place = arguments.out / "evaluation"
    evaluate(models, place, recipe.data, models["teacher"], config, OPTIONS)
    return figures_in(place)


def _table(measured: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = {}
    for label, row in measured.items():
        kept, kl = row.get("exact_answers_kept/test"), row.get("kl/heldout")
        rows[label] = [
            interval(row["exact_answers/test"]),
            "–" if kept is None else interval(kept),
            "–" if kl is None else f"{kl['value']:.3f}",
        ]
    titles = ["model", "exact answers (95 %)", "of the teacher's (95 %)", "KL held-out, nats"]
    return f"{measured['teacher']['exact_answers/test']['n']} test rows.\n\n{table(titles, rows)}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--prompts", type=int, default=1500, help="commands that are answered")
    parser.add_argument("--tokens", type=int, default=16_384, help="training tokens of a step")
    parser.add_argument("--pairs", type=int, default=300, help="commands for DPO")
    parser.add_argument("--limit", type=int, default=300, help="test rows")
    return parser.parse_args()


if __name__ == "__main__":
    main()
