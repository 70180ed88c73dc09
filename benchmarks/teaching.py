"""Ways of teaching, on the same student, text and budget.

    python benchmarks/teaching.py --texts ../shared/data --out runs/teaching --tokens 250000

Student: SmolLM2-135M-Instruct with its MLPs cut to 1,024 channels (80.3 % of the parameters), or
with 23 of its 30 layers (`--student depth`), repaired; protocol P1. Each way of WAYS is distilled
on `--tokens` tokens, the same in the same order, and measured: perplexity × dense and KL on the
first 16,384 tokens of WikiText-2 raw test, LAMBADA and C4. What needs only the teacher's logits is
taught from one cache of exact hidden states. `contrastive` (DistiLLM-2, arXiv:2503.07067) spends
half of the tokens on that text by KL, a quarter on the teacher's answers to `instructions` by
skewed KL, and a quarter on the student's own by skewed reverse KL; both are drawn before training.
`--tasks` adds the accuracy on LAMBADA and on the first 1,000 rows of HellaSwag. Resumable: run it
again and it goes on; `--ways` runs some. Writes a table per student and budget into `--out`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from protocol import DENSE, TASKS, TESTS, blend, figures, figures_in, measure, score

from regrow import (
    CacheConfig,
    DataConfig,
    DistillConfig,
    GenerateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    SourceConfig,
    cache,
    distill,
    generate,
    profile,
    prune,
)

KL_ONLY = {"forward_kl": 1.0}
WAYS: dict[str, dict[str, Any]] = {
    "KL": {"losses": KL_ONLY},
    "hard labels": {"losses": {"cross_entropy": 1.0}},
    "KL + 0.3 CE": {"losses": {"forward_kl": 0.7, "cross_entropy": 0.3}},
    "KL + hidden": {
        "losses": KL_ONLY,
        "feature_losses": {"hidden": 1.0},
        "balance_feature_losses": True,
    },
    "KL + embeddings + hidden": {
        "losses": KL_ONLY,
        "feature_losses": {"embeddings": 0.5, "hidden": 0.5},
        "balance_feature_losses": True,
    },
    "contrastive": {"losses": KL_ONLY},
    "reverse KL": {"losses": {"reverse_kl": 1.0}},
    "JSD": {"losses": {"jsd": 4.0}},  # its gradient is a quarter of the KL's where models agree
    "KL + logit lens": {
        "losses": KL_ONLY,
        "feature_losses": {"logit_lens": 0.5},
        "balance_feature_losses": True,
    },
    "KL, T = 2": {"losses": KL_ONLY, "temperature": 2.0},
    "skewed KL": {"losses": {"skewed_kl": 1.0}},
    "total variation": {"losses": {"total_variation": 1.0}},
    "KL, int8 teacher": {"losses": KL_ONLY, "teacher_dtype": "int8"},
    "KL, lora": {"losses": KL_ONLY, "adapter": "lora", "learning_rate": 1e-3},
}
ANSWER = 128
"""Tokens of an answer, at most."""
SCORED = ("lambada_openai", "hellaswag")
"""Tasks of `--tasks`."""
STUDENTS = {
    "width": PruneConfig(intermediate_size=1024),
    "depth": PruneConfig(num_layers=23, layer_criterion="block_influence"),
}


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, blend(arguments.texts)
    criteria = ("activation_l2", "block_influence")
    config = ProfileConfig(criteria=criteria, samples=96, gram_tokens=0)
    measured = profile(DENSE, data, out / "profile", config)
    student = prune(DENSE, out / arguments.student, STUDENTS[arguments.student], measured)
    cached = out / f"cache-{arguments.tokens}"
    exact = CacheConfig(tokens=arguments.tokens, format="hidden")
    cache(DENSE, data, cached, exact, Options(batch_size=2))
    measure({"dense": DENSE}, out / "dense", arguments.texts, TESTS)
    _measured(student, out / f"untrained-{arguments.student}", arguments)
    for method in arguments.ways:
        _taught(method, student, data, cached, arguments)
        text = _table(arguments)
        (out / f"teaching_{arguments.student}_{arguments.tokens}.md").write_text(text)
    print(text)


def _place(method: str, arguments: argparse.Namespace) -> Path:
    name = method.replace(" ", "-").replace("=", "").lower()
    place: Path = arguments.out / f"{arguments.student}-{arguments.tokens}" / name
    return place


def _taught(
    method: str, student: Path, data: DataConfig, cached: Path, arguments: argparse.Namespace
) -> None:
    """Distil and measure."""
    place = _place(method, arguments)
    fields = {**WAYS[method], "tokens": arguments.tokens, "batch_tokens": 1024}
    if method == "contrastive":
        data = _with_answers(data, student, arguments)
    elif not {"feature_losses", "teacher_dtype"} & fields.keys():
        fields["cache"] = str(cached)
    config = DistillConfig.model_validate(fields)
    model = distill(student, DENSE, data, place / "model", config, Options(batch_size=2))
    _measured(model, place / "evaluation", arguments)


def _measured(model: Path, out: Path, arguments: argparse.Namespace) -> None:
    measure({"student": model}, out, arguments.texts, TESTS)
    for task in SCORED if arguments.tasks else ():
        place = out.with_name(f"{out.name}-{task}")
        score({"student": model}, place, task, arguments.texts / "eval")


def _with_answers(data: DataConfig, student: Path, arguments: argparse.Namespace) -> DataConfig:
    """Half the data, a quarter each the answers of the teacher and of the student as it is."""
    source = str(arguments.texts / "train" / "instructions.jsonl.gz")
    prompts = DataConfig.model_validate({"source": source})
    config = GenerateConfig(
        limit=arguments.tokens // (4 * ANSWER), max_new_tokens=ANSWER, keep_unfinished=True
    )
    out = _place("answers", arguments)
    half = sum(entry.weight for entry in data.sources)
    sources = list(data.sources)
    for model, loss in ((DENSE, "skewed_kl"), (student, "skewed_reverse_kl")):
        answer_folder = generate(model, prompts, out / loss, config, Options(batch_size=16))
        sources.append(SourceConfig(source=str(answer_folder), weight=half / 2, losses={loss: 1.0}))
    return data.model_copy(update={"sources": sources})


def _table(arguments: argparse.Namespace) -> str:
    out = arguments.out
    dense = figures(out / "dense")["dense"]
    folders = {"untrained": out / f"untrained-{arguments.student}"}
    folders |= {method: _place(method, arguments) / "evaluation" for method in WAYS}
    titles = [f"{test} ppl × dense | KL" for test in TESTS]
    titles += [f"{task} {TASKS[task][0]}" for task in SCORED if arguments.tasks]
    lines = [f"| way | {' | '.join(titles)} |"]
    lines.append("|---" + "|---:" * lines[0].count(" | ") + "|")
    for method, folder in folders.items():
        if (folder / "evaluation.json").exists():
            cells = _cells(folder, dense) + (_scores(folder) if arguments.tasks else [])
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cells(folder: Path, dense: dict[str, float]) -> list[str]:
    """Perplexity against the dense model's, and KL, on each text."""
    measured = figures(folder)["student"]
    cells = []
    for test in TESTS:
        cells.append(f"{measured[f'perplexity/{test}'] / dense[f'perplexity/{test}']:.3f}")
        cells.append(f"{measured[f'kl/{test}']:.3f}")
    return cells


def _scores(folder: Path) -> list[str]:
    """Accuracy of each task with its standard error; a dash where it was not measured yet."""
    cells = []
    for task in SCORED:
        scored = folder.with_name(f"{folder.name}-{task}")
        if not (scored / "evaluation.json").exists():
            cells.append("–")
            continue
        row = figures_in(scored)["student"][f"{TASKS[task][0]}/{task}"]
        cells.append(f"{row['value']:.4f} ± {row['stderr']:.4f}")
    return cells


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tokens", type=int, default=250_000, help="tokens to distil on")
    parser.add_argument("--student", choices=STUDENTS, default="width")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--tasks", action="store_true", help="score LAMBADA and HellaSwag too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
