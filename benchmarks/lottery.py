"""Lottery tickets: winning against random ones on a tiny model that learns Wikipedia from a seed.

    python benchmarks/lottery.py --texts ../shared/data --model ../shared/models/stories260K \
        --out runs/lottery

For each seed a random model with the config of `--model` (260 thousand parameters, 512 tokens) is
trained on `--tokens` tokens of Wikipedia. Then, in rounds to 50, 80 and 95 % of zeros, the lowest
weights of the trained model become zero, the others go back to their first values, and the ticket
is trained on the same tokens. A random ticket has the same first values and as many zeros in each
matrix, at random places. Embedding and norms stay dense. The figure is the cross-entropy in nats
per token on the first 16,384 tokens of WikiText-2 raw test: mean and standard deviation over the
seeds, and the seeds in which the winning ticket is better.

Resumable: run it again and it goes on. Writes `lottery.md` and `lottery.svg` into `--results`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from statistics import mean, stdev

from pictures import Line, line_chart
from protocol import TESTS, figures

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    InitializeConfig,
    Options,
    SparsifyConfig,
    distill,
    evaluate,
    initialize,
    sparsify,
)

SHARES = (0.5, 0.8, 0.95)
TEXT = "wikitext2"
OPTIONS = Options(batch_size=8)
Losses = dict[tuple[str, float], list[float]]
"""Cross-entropy of each seed, by the kind of ticket and the share of zeros."""


def main() -> None:
    arguments = _arguments()
    losses: Losses = {}
    for seed in range(arguments.seeds):
        place = arguments.out / f"seed-{seed}"
        first = initialize(arguments.model, place / "first", InitializeConfig(seed=seed))
        last = _train(first, first, place / "dense", arguments)
        losses.setdefault(("dense", 0.0), []).append(_loss(last, arguments))
        for share in SHARES:
            for kind, method in (("winning", "magnitude"), ("random", "random")):
                config = SparsifyConfig(
                    method=method, sparsity=share, rewind_to=str(first), seed=seed
                )
                name = f"{kind}-{share:g}"
                # A random ticket starts from the dense model: it must not inherit chosen zeros.
                source = last if kind == "winning" else place / "dense"
                ticket = sparsify(source, place / f"{name}-ticket", config)
                trained = _train(ticket, first, place / name, arguments)
                losses.setdefault((kind, share), []).append(_loss(trained, arguments))
                if kind == "winning":
                    following = trained
            last = following
        _write(losses, arguments)
    print((arguments.results / "lottery.md").read_text())


def _train(student: Path, first: Path, out: Path, arguments: argparse.Namespace) -> Path:
    """The student after training on the text alone, with its zeros kept."""
    source = str(arguments.texts / "train" / "wikipedia.jsonl.gz")
    data = DataConfig.model_validate({"sources": [source], "sequence_length": 256})
    config = DistillConfig(
        tokens=arguments.tokens,
        batch_tokens=1024,
        learning_rate=arguments.learning_rate,
        min_learning_rate_ratio=0.1,
        losses={"cross_entropy": 1.0},
        chosen_by="cross_entropy",
        eval_tokens=arguments.tokens // 2,
        heldout_sequences=16,
    )
    made = distill(student, first, data, out, config, OPTIONS)
    shutil.rmtree(made / "trainer", ignore_errors=True)
    return made


def _loss(model: Path, arguments: argparse.Namespace) -> float:
    """Cross-entropy in nats per token of the test text."""
    config = EvaluateConfig(
        metrics=("size", "perplexity"),
        texts={TEXT: str(arguments.texts / TESTS[TEXT])},
        text_tokens=16384,
        window=256,
    )
    place = model.parent / "evaluations" / model.name
    evaluate({"model": model}, place, None, None, config, OPTIONS)
    return math.log(figures(place)["model"][f"perplexity/{TEXT}"])


def _write(losses: Losses, arguments: argparse.Namespace) -> None:
    seeds = len(losses["dense", 0.0])
    lines = [
        f"{seeds} seeds, {arguments.tokens:,} tokens for each training.",
        "",
        "| zeros | winning ticket, nats | random ticket, nats | seeds in which winning is better |",
        "|---:|---:|---:|---:|",
        f"| 0 % | {_spread(losses['dense', 0.0])} (dense) | – | – |",
    ]
    for share in SHARES:
        winning, random = losses["winning", share], losses["random", share]
        better = sum(a < b for a, b in zip(winning, random, strict=True))
        lines.append(
            f"| {share:.0%} | {_spread(winning)} | {_spread(random)} | {better} of {seeds} |"
        )
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "lottery.md").write_text("\n".join(lines) + "\n")
    (arguments.results / "lottery.svg").write_text(_picture(losses))


def _spread(values: list[float]) -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


def _picture(losses: Losses) -> str:
    lines = []
    for number, kind in enumerate(("winning", "random")):
        found = {0.0: losses["dense", 0.0], **{share: losses[kind, share] for share in SHARES}}
        points = [(100 * share, mean(values)) for share, values in found.items()]
        spread = [stdev(v) if len(v) > 1 else 0.0 for v in found.values()]
        lines.append(Line(f"{kind} ticket", points, spread, colour=number))
    title = "Cross-entropy after training, nats per token of WikiText-2"
    return line_chart(title, "zeros in the layers' matrices, %", lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--model", required=True, help="the model whose config is used")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tokens", type=int, default=131_072, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
