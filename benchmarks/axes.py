"""Depth against width against a mix, and the other axes, at equal parameters.

    python benchmarks/axes.py --texts ../shared/data --out runs/axes --tokens 250000

SmolLM2-135M-Instruct at four fifths of its parameters; calibration text, blend and test of protocol
P1 (p1.py). For each shape, untrained: KL to the dense model and perplexity × dense on the first
16,384 tokens of WikiText-2 raw test, plain and repaired, and the speed of its shape × dense
(prefill and decode of the evaluate stage, all models in one process, in turn). With `--tokens`, the
best of depth, width and mixes are then distilled alike, and measured again. Resumable: run it again
and it goes on; only the speeds are measured anew. Writes `axes.md` into `--out`, and with
`--tokens` `distilled.md`: those shapes before and after, on three texts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from protocol import DENSE, TESTS, blend, measure

from regrow import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    Options,
    ProfileConfig,
    PruneConfig,
    distill,
    families,
    load,
    profile,
    prune,
)
from regrow.profile_folder import Profile
from regrow.stages.evaluate.eval_model import EvalModel
from regrow.stages.evaluate.folder_model import FolderEvalModel
from regrow.stages.evaluate.metrics import speed

KEEP = 0.803  # what an MLP of 1,024 leaves
PPL, KL = "perplexity/wikitext2", "kl/wikitext2"


@dataclass(frozen=True)
class Cut:
    """A row: its kind (of which the best is distilled), the cut, and the shape that it shares."""

    kind: str
    config: PruneConfig
    shape: str


def main() -> None:
    arguments = _arguments()
    out, texts = arguments.out, arguments.texts
    data = blend(texts)
    criteria = ("activation_l2", *arguments.layer_criteria)
    config = ProfileConfig(
        criteria=criteria, samples=arguments.samples, gram_tokens=arguments.samples * 512
    )
    measured = profile(DENSE, data, out / "profile", config)
    cuts = _cuts(arguments.layer_criteria)
    models = {name: _models(cut, out / "models" / name, measured) for name, cut in cuts.items()}
    flat = {
        f"{name}/{kind}": path for name, paths in models.items() for kind, path in paths.items()
    }
    figures = measure(flat, out / "untrained", texts, text_tokens=arguments.text_tokens)
    after = _distilled(cuts, models, figures, data, arguments) if arguments.tokens else {}
    shapes = {cut.shape: models[name]["plain"] for name, cut in cuts.items()}
    speeds = _speeds({"dense": Path(DENSE), **shapes}, arguments.turns)
    text = _table(cuts, figures, after, speeds)
    (out / "axes.md").write_text(text)
    print(text)


def _cuts(layer_criteria: list[str]) -> dict[str, Cut]:
    """The rows by name; whatever else a shape fixes, its MLP or its one axis meets the target."""
    cuts = {"mlp": Cut("width", PruneConfig(intermediate_size=_meet("mlp")), "mlp")}
    layers = _meet("layers")
    for name in layer_criteria:
        config = PruneConfig(num_layers=layers, layer_criterion=name)
        cuts[f"depth by {name}"] = Cut("depth", config, "depth")
    for gone in (2, 3):
        width = _meet("mlp", layers=30 - gone)
        config = PruneConfig(
            num_layers=30 - gone, intermediate_size=width, layer_criterion=layer_criteria[-1]
        )
        cuts[f"{gone} layers + mlp"] = Cut("mix", config, f"{gone} layers + mlp")
    hidden = PruneConfig(hidden_size=_meet("hidden"), multiple_of=1)
    cuts["hidden"] = Cut("other", hidden, "hidden")
    width = _meet("mlp", kv_heads=2, heads=6)
    groups = PruneConfig(num_key_value_heads=2, intermediate_size=width)
    cuts["1 KV group of 3 + mlp"] = Cut("other", groups, "1 KV group of 3 + mlp")
    return cuts


def _meet(free: str, **fixed: int) -> int:
    """The size of `free` that brings the parameters nearest to the target."""
    checkpoint = load(DENSE)
    family, config = families.of(checkpoint), checkpoint.config
    target, full = KEEP * family.count(config), family.sizes(config)
    step = family.step(free, config, 32 if free == "mlp" else 1)
    sizes = range(step, full[free] + 1, step)
    return min(sizes, key=lambda s: abs(family.count(config, {**fixed, free: s}) - target))


def _models(cut: Cut, place: Path, measured: Profile) -> dict[str, Path]:
    """Folders of the plain and of the repaired model."""
    for kind in ("plain", "repaired"):
        config = cut.config.model_copy(update={"repair": kind == "repaired"})
        prune(DENSE, place / kind, config, measured)
    return {kind: place / kind for kind in ("plain", "repaired")}


def _distilled(
    cuts: dict[str, Cut],
    models: dict[str, dict[str, Path]],
    figures: dict[str, dict[str, float]],
    data: DataConfig,
    arguments: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Figures after distilling, with the same budget, the best untrained row of each kind."""
    config = DistillConfig(tokens=arguments.tokens, batch_tokens=1024)
    distilled, starts = {}, {}
    for kind in ("width", "depth", "mix"):
        rows = {name: list(models[name])[-1] for name, cut in cuts.items() if cut.kind == kind}
        best = min(rows, key=lambda name: figures[f"{name}/{rows[name]}"][KL])
        folder = arguments.out / f"distilled-{arguments.tokens}" / kind
        start = models[best][rows[best]]
        distilled[best] = distill(start, DENSE, data, folder, config, Options(batch_size=2))
        starts[f"{best} before"] = start
    out = arguments.out / f"evaluation-{arguments.tokens}"
    measured = measure(
        {**distilled, **starts}, out, arguments.texts, TESTS, text_tokens=arguments.text_tokens
    )
    lines = ["| shape | " + " | ".join(f"{test} ppl × dense | KL" for test in TESTS) + " |"]
    lines.append("|---|" + "---:|---:|" * len(TESTS))
    for label in (*starts, *distilled):
        row, dense = measured[label], measured["teacher"]
        cells = [
            f"{row[f'perplexity/{test}'] / dense[f'perplexity/{test}']:.3f} "
            f"| {row[f'kl/{test}']:.3f}"
            for test in TESTS
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    (arguments.out / "distilled.md").write_text("\n".join(lines) + "\n")
    return measured


def _speeds(models: dict[str, Path], turns: int) -> dict[str, dict[str, float]]:
    """Prefill and decode of each × dense: medians of the ratios within each turn."""
    options = Options(device="cpu", batch_size=1)
    timed: dict[str, EvalModel] = {}
    for label, path in models.items():
        checkpoint = load(str(path))
        tokenizer = checkpoint.tokenizer()
        timed[label] = FolderEvalModel(
            *(label, checkpoint, tokenizer, [], torch.bfloat16, options, {})
        )
    measured = speed.measure_all(timed, EvaluateConfig(repeats=turns), None)
    values = {label: {f.name: f.value for f in m.figures} for label, m in measured.items()}
    return {
        label: {kind: figures.get(f"{kind}_speedup", 1.0) for kind in ("prefill", "decode")}
        for label, figures in values.items()
    }


def _table(
    cuts: dict[str, Cut],
    figures: dict[str, dict[str, float]],
    after: dict[str, dict[str, float]],
    speeds: dict[str, dict[str, float]],
) -> str:
    lines = [
        "| shape | kept | KL | repaired | distilled | ppl × dense | repaired | distilled "
        "| prefill | decode |",
        "|---|" + "---:|" * 9,
    ]
    dense = figures["teacher"]
    for name, cut in cuts.items():
        rows = [figures.get(f"{name}/{kind}") for kind in ("plain", "repaired")]
        rows.append(after.get(name))
        assert rows[0] is not None
        sizes = ", ".join(f"{dim} {size}" for dim, size in cut.config.sizes().items())
        cells = [f"{name} ({sizes})", f"{rows[0]['parameters'] / dense['parameters']:.1%}"]
        cells += ["–" if row is None else f"{row[KL]:.3f}" for row in rows]
        cells += ["–" if row is None else f"{row[PPL] / dense[PPL]:.3f}" for row in rows]
        cells += [f"{speeds[cut.shape][kind]:.2f} ×" for kind in ("prefill", "decode")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=Path, required=True, help="folder with train/ and eval/")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything made")
    parser.add_argument("--tokens", type=int, default=0, help="tokens to distil on; 0: none")
    parser.add_argument("--samples", type=int, default=96, help="calibration blocks of 512")
    parser.add_argument("--text-tokens", type=int, default=16384, help="test tokens")
    parser.add_argument("--turns", type=int, default=5, help="turns of the speed measurement")
    criteria = ["block_influence", "angular_distance", "kl_drop"]
    parser.add_argument(
        "--layer-criteria", nargs="+", default=criteria, help="of depth; the last one for the mixes"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
