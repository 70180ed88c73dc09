"""Protocol P1: prune 20 % of SmolLM2-135M-Instruct, distil, and compare on text never trained on.

    python benchmarks/p1.py --texts ../shared/data --out runs/p1 --tokens 100000 300000 1000000

Resumable: run it again and it goes on. Calibration and training text: wikipedia, novels and
instructions in `--texts`/train. Test, in bf16 and windows of 512: perplexity on the first 16,384
tokens of WikiText-2 raw test, and perplexity and KL to the dense model on the first 8,192 tokens of
LAMBADA and of the C4 sample, which nothing was trained on. The control is the dense model given the
same training tokens with the plain next-token loss; the mixed runs add a share of that loss to the
KL. Writes `p1.md` into `--out`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol import DENSE, TESTS, blend, figures

from regrow import (
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

CRITERIA = ("activation_l2", "minitron", "magnitude", "random")
LAYERS = "block_influence"
MLP: dict[str, Any] = {"intermediate_size": 1024, "repair_method": "gram"}  # 80.3 % is kept
DEPTH = {"num_layers": 22}  # 79.0 %
ALPHA = 0.3  # weight of the text's cross-entropy beside the KL, in the mixed runs
MIXED = {"forward_kl": 1 - ALPHA, "cross_entropy": ALPHA}
SCHEDULE: dict[int, dict[str, Any]] = {  # short runs need many steps, long ones less noise
    300_000: {"batch_tokens": 1024, "eval_tokens": 50_000},
    1_000_000: {"batch_tokens": 2048, "learning_rate": 1.5e-4, "eval_tokens": 100_000},
}


def main() -> None:
    arguments = _arguments()
    out: Path = arguments.out
    options = Options(batch_size=2)
    data = blend(arguments.texts)
    measured = profile(
        DENSE,
        data,
        out / "profile",
        ProfileConfig(criteria=(*CRITERIA, LAYERS), samples=arguments.samples, gram_tokens=49152),
    )
    models: list[tuple[str, str | Path]] = [("dense", DENSE)]
    for criterion in CRITERIA:
        for repair in (False, True):
            name = f"{criterion}{' + repair' if repair else ''}"
            folder = out / "untrained" / name.replace(" + ", "-")
            prune(DENSE, folder, PruneConfig(criterion=criterion, repair=repair, **MLP), measured)
            models.append((name, folder))
    depth = out / "untrained" / "depth"
    prune(DENSE, depth, PruneConfig(repair=False, **DEPTH), measured)
    models.append(("depth by block influence", depth))
    split = len(models)
    start = out / "untrained" / "activation_l2-repair"
    for tokens in arguments.tokens:
        config = DistillConfig(tokens=tokens, **SCHEDULE.get(tokens, {}))
        distilled = distill(start, DENSE, data, out / f"distilled-{tokens}", config, options)
        models.append((f"distilled {tokens // 1000} k", distilled))
    for tokens in arguments.mixed:
        config = DistillConfig(tokens=tokens, losses=MIXED, **SCHEDULE.get(tokens, {}))
        mixed = distill(start, DENSE, data, out / f"mixed-{tokens}", config, options)
        models.append((f"distilled {tokens // 1000} k, α = {ALPHA}", mixed))
    for tokens in arguments.control:
        config = DistillConfig(tokens=tokens, losses={"cross_entropy": 1.0}, learning_rate=1e-4)
        trained = distill(DENSE, DENSE, data, out / f"control-{tokens}", config, options)
        models.append((f"control: dense + {tokens // 1000} k", trained))
    table: dict[str, dict[str, float]] = {name: {} for name, _ in models}
    # The dense model stands in both groups; the distilled ones first, one waits for those.
    groups = {"distilled": [models[0], *models[split:]], "untrained": models[:split]}
    for name, group in groups.items():
        for model, row in _evaluate(dict(group), arguments.texts, out / f"evaluation-{name}"):
            table[model].update(row)
    text = _markdown(table)
    (out / "p1.md").write_text(text)
    print(text)


def _evaluate(
    models: dict[str, str | Path], texts: Path, out: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Figures of each model: WikiText-2 on 16,384 tokens, the others on 8,192."""
    for part, tokens in {"wikitext2": 16384, "lambada": 8192, "c4": 8192}.items():
        config = EvaluateConfig(
            metrics=("size", "perplexity", "kl"),
            texts={part: str(texts / TESTS[part])},
            text_tokens=tokens,
        )
        folder = evaluate(models, out / part, None, DENSE, config)
        yield from figures(folder).items()


def _markdown(table: dict[str, dict[str, float]]) -> str:
    dense = table["dense"]
    columns = ["wikitext2", "lambada", "c4"]
    lines = [
        "| model | kept | WikiText-2 ppl | × dense | LAMBADA ppl | × dense | C4 ppl | × dense "
        "| KL LAMBADA | KL C4 |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in table.items():
        cells = [name, f"{row['parameters'] / dense['parameters']:.1%}"]
        for column in columns:
            value = row[f"perplexity/{column}"]
            cells += [f"{value:.2f}", f"{value / dense[f'perplexity/{column}']:.3f}"]
        cells += [f"{row.get(f'kl/{column}', 0.0):.3f}" for column in ("lambada", "c4")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tokens", type=int, nargs="*", default=[100_000, 300_000])
    parser.add_argument("--mixed", type=int, nargs="*", default=[300_000])
    parser.add_argument("--control", type=int, nargs="*", default=[100_000])
    parser.add_argument("--samples", type=int, default=96, help="calibration blocks of 512")
    return parser.parse_args()


if __name__ == "__main__":
    main()
