"""Learned masks against the activation criterion, and a dynamic against a fixed blend.

    python benchmarks/learned_masks.py --texts ../shared/data --model ../shared/models/stories260K \
        --out runs/learned_masks

The model is stories260K (5 layers, hidden 64, MLP 172; trained on children's stories), first
trained on `--dense-tokens` tokens of Wikipedia, novels and instructions: this is the dense model
here. It is cut to 4 layers, hidden 48 and MLP 112, without repair, in two ways, each of which sees
`--tokens` tokens of the same blend, with the KL to the dense model as loss:

- learned: masks and weights learn on `--mask-tokens` of them, then the cut model is distilled on
  the rest, with the fixed shares of the sources and, in a second run, with `dynamic_blend`;
- activation: the units are chosen by activation_l2, the layers by block_influence, and the cut
  model is distilled on all of them.

Untrained rows show the cut alone; that of the learned masks has seen the mask tokens. Figures:
cross-entropy in nats per token on the held-out documents of each source, perplexity on the first
16,384 tokens of WikiText-2 raw test, and the KL to the dense model there. One seed.

Resumable: run it again and it goes on. Writes `learned_masks.md` into `--results`.
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

from protocol import BLEND, TESTS, figures

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    LearnMasksConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    distill,
    evaluate,
    learn_masks,
    profile,
    prune,
)

SHAPE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 48,
    "intermediate_size": 112,
    "multiple_of": 16,
}
OPTIONS = Options(batch_size=4)
TEXT = "wikitext2"


def main() -> None:
    arguments = _arguments()
    out, data = arguments.out, _data(arguments, tuple(BLEND))
    rate, rest = arguments.learning_rate, arguments.tokens - arguments.mask_tokens
    dense = _distilled(
        arguments.model,
        arguments.model,
        data,
        out / "dense",
        _training(
            arguments.dense_tokens,
            2 * rate,
            losses={"cross_entropy": 1.0},
            chosen_by="cross_entropy",
        ),
    )
    masks = LearnMasksConfig(
        **SHAPE,
        losses={"forward_kl": 1.0},
        tokens=arguments.mask_tokens,
        batch_tokens=1024,
        learning_rate=rate,
    )
    learned = learn_masks(dense, data, out / "masks", masks, OPTIONS)
    measured = profile(dense, data, out / "profile", ProfileConfig(samples=64), OPTIONS)
    by_masks = {"criterion": "learned_masks", "layer_criterion": "learned_masks"}
    cut = {
        "learned masks": prune(
            learned,
            out / "cut-learned",
            PruneConfig(**SHAPE, **by_masks, repair=False),
            learned / "profile",
        ),
        "activation": prune(
            dense, out / "cut-activation", PruneConfig(**SHAPE, repair=False), measured
        ),
    }
    models: dict[str, tuple[Path, int]] = {
        "dense": (dense, 0),
        "learned masks, cut": (cut["learned masks"], arguments.mask_tokens),
        "activation, cut": (cut["activation"], 0),
    }
    for name, start, tokens, more in (
        ("learned masks, fixed blend", cut["learned masks"], rest, {}),
        ("learned masks, dynamic blend", cut["learned masks"], rest, {"dynamic_blend": True}),
        ("activation, fixed blend", cut["activation"], arguments.tokens, {}),
        ("activation, dynamic blend", cut["activation"], arguments.tokens, {"dynamic_blend": True}),
    ):
        place = out / name.replace(", ", "-").replace(" ", "-")
        models[name] = (
            _distilled(start, dense, data, place, _training(tokens, rate, **more)),
            arguments.tokens,
        )
    table = _table(models, dense, arguments)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "learned_masks.md").write_text(table)
    print(table)


def _data(arguments: argparse.Namespace, names: tuple[str, ...]) -> DataConfig:
    sources = [
        {"source": str(arguments.texts / "train" / f"{name}.jsonl.gz"), "weight": BLEND[name]}
        for name in names
    ]
    return DataConfig.model_validate({"sources": sources, "sequence_length": 256})


def _training(tokens: int, rate: float, **more: Any) -> DistillConfig:
    fields = {"batch_tokens": 1024, "eval_tokens": 50_000, "heldout_sequences": 24}
    return DistillConfig(tokens=tokens, learning_rate=rate, **fields, **more)


def _distilled(
    student: Path | str, teacher: Path | str, data: DataConfig, out: Path, config: DistillConfig
) -> Path:
    made = distill(student, teacher, data, out, config, OPTIONS)
    shutil.rmtree(made / "trainer", ignore_errors=True)
    return made


def _table(models: dict[str, tuple[Path, int]], dense: Path, arguments: argparse.Namespace) -> str:
    lines = [
        f"| model | parameters | tokens | {' | '.join(BLEND)} | WikiText-2 ppl | KL |",
        "|---|" + "---:|" * (4 + len(BLEND)),
    ]
    for name, (model, tokens) in models.items():
        place = arguments.out / "evaluations" / name.replace(", ", "-").replace(" ", "-")
        losses = []
        for source in BLEND:
            config = EvaluateConfig(
                metrics=("size", "perplexity"), heldout_sequences=64, window=256
            )
            data = _data(arguments, (source,))
            evaluate({"model": model}, place / source, data, None, config, OPTIONS)
            found = figures(place / source)["model"]
            losses.append(math.log(found["perplexity/heldout"]))
        config = EvaluateConfig(
            metrics=("size", "perplexity", "kl"),
            texts={TEXT: str(arguments.texts / TESTS[TEXT])},
            text_tokens=16384,
            window=256,
        )
        evaluate({"model": model}, place / TEXT, None, str(dense), config, OPTIONS)
        found = figures(place / TEXT)["model"]
        cells = [name, f"{found['parameters']:,.0f}", f"{tokens:,}"]
        cells += [f"{loss:.3f}" for loss in losses]
        cells += [f"{found[f'perplexity/{TEXT}']:.1f}", f"{found.get(f'kl/{TEXT}', 0.0):.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--model", required=True, help="a small trained model")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--dense-tokens", type=int, default=500_000, help="before the cut")
    parser.add_argument("--tokens", type=int, default=500_000, help="after the dense model")
    parser.add_argument("--mask-tokens", type=int, default=200_000, help="of these, with masks")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
