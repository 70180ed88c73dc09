"""Task-aware pruning: what is redundant for a task, and what calibrating on it brings.

    python benchmarks/task_aware.py --texts ../shared/data --out runs/task_aware

SmolLM2-135M-Instruct is fine-tuned for one task (grade-school maths: `question` + `answer` rows,
only answers scored, plain next-token loss on `--tokens` tokens), then profiled before and after, on
the general blend of protocol P1 (p1.py) and on the task's own calibration split. Printed are the
layers that each criterion would drop, and, for the fine-tuned model cut with each calibration (MLP
to 1,024; four layers fewer), in nats per token: the loss of held-out answers, and the KL to the
uncut model on these and on WikiText-2 raw test. Resumable: run it again and it goes on. Writes
`task_aware.md` into `--out`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from protocol import DENSE, blend, figures

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    distill,
    evaluate,
    profile,
    prune,
)
from regrow.profile_folder import Profile, scores_for

GONE = 4
CUTS = {
    "MLP 1536 → 1024, repaired": ("activation_l2", PruneConfig(intermediate_size=1024)),
    "30 → 26 layers by block_influence": (
        "block_influence",
        PruneConfig(num_layers=30 - GONE, layer_criterion="block_influence"),
    ),
    "30 → 26 layers by kl_drop": (
        "kl_drop",
        PruneConfig(num_layers=30 - GONE, layer_criterion="kl_drop"),
    ),
}


def main() -> None:
    arguments = _arguments()
    out = arguments.out
    text = {"general": blend(arguments.texts), "task": _task(arguments.texts)}
    tuning = DistillConfig(
        tokens=arguments.tokens,
        losses={"cross_entropy": 1.0},
        learning_rate=1e-4,
        eval_tokens=arguments.tokens,
    )
    tuned = distill(DENSE, DENSE, text["task"], out / "tuned", tuning, Options(batch_size=2))
    models: dict[str, str | Path] = {"before": DENSE, "after": tuned}
    config = ProfileConfig(
        criteria=("activation_l2", *arguments.layer_criteria),
        samples=arguments.samples,
        gram_tokens=arguments.samples * 512,
        grams=("mlp",),
        removal_sequences=arguments.removal_sequences,
    )
    profiles = {
        (calibration, kind): profile(model, data, out / f"profile-{calibration}-{kind}", config)
        for calibration, model in models.items()
        for kind, data in text.items()
    }
    lines = _redundant(profiles, arguments.layer_criteria)
    lines += ["", *_pruned(tuned, profiles, text["task"], arguments)]
    (out / "task_aware.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _task(texts: Path) -> DataConfig:
    return DataConfig.model_validate(str(texts / "train" / "gsm8k_train.jsonl.gz"))


def _redundant(profiles: dict[tuple[str, str], Profile], criteria: list[str]) -> list[str]:
    """The first layers to go by each criterion, before and after, on each text."""
    lines = [
        f"| layers dropped, of {GONE} and then of {2 * GONE} | fine-tuning | calibration | |",
        "|---|---|---|---|",
    ]
    for criterion in criteria:
        for (calibration, kind), measured in profiles.items():
            scores = measured.scores(criterion, "layers")["all"]
            sets = [
                sorted(scores_for(scores, gone).argsort(stable=True)[:gone].tolist())
                for gone in (GONE, 2 * GONE)
            ]
            shown = "; ".join(" ".join(map(str, layers)) for layers in sets)
            lines.append(f"| {criterion} | {calibration} | {kind} | {shown} |")
    return lines


def _pruned(
    tuned: Path,
    profiles: dict[tuple[str, str], Profile],
    task: DataConfig,
    arguments: argparse.Namespace,
) -> list[str]:
    """Rows of the fine-tuned model cut by each calibration."""
    models: dict[str, str | Path] = {"uncut": tuned, "before fine-tuning": DENSE}
    for cut, (criterion, config) in CUTS.items():
        if criterion not in ("activation_l2", *arguments.layer_criteria):
            continue
        for kind in ("general", "task"):
            name = f"{cut}; calibrated on {kind} text"
            place = arguments.out / "models" / f"{criterion}-{kind}"
            models[name] = prune(tuned, place, config, profiles["after", kind])
    config = EvaluateConfig(
        metrics=("size", "perplexity", "kl"),
        heldout_sequences=arguments.heldout_sequences,
        texts={"wikitext2": str(arguments.texts / "eval" / "wikitext2_raw_test.txt.gz")},
        text_tokens=8192,
    )
    folder = evaluate(models, arguments.out / "evaluation", task, tuned, config)
    lines = [
        "| model | kept | loss of held-out answers | KL there | KL on WikiText-2 |",
        "|---|---:|---:|---:|---:|",
    ]
    full_parameters = 0.0
    for name, row in figures(folder).items():
        full_parameters = full_parameters or row["parameters"]
        loss = math.log(row["perplexity/heldout"])
        kl = [f"{row.get(f'kl/{text}', 0.0):.3f}" for text in ("heldout", "wikitext2")]
        kept = row["parameters"] / full_parameters
        lines.append(f"| {name} | {kept:.1%} | {loss:.3f} | " + " | ".join(kl) + " |")
    return lines


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tokens", type=int, default=100_000, help="tokens to fine-tune on")
    parser.add_argument("--samples", type=int, default=96, help="calibration blocks of 512")
    parser.add_argument("--removal-sequences", type=int, default=2, help="blocks for kl_drop")
    parser.add_argument("--heldout-sequences", type=int, default=16, help="of 512, of the task")
    criteria = ["block_influence", "angular_distance", "kl_drop"]
    parser.add_argument("--layer-criteria", nargs="+", default=criteria)
    return parser.parse_args()


if __name__ == "__main__":
    main()
